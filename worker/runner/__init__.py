"""The runner process, which executes jobs with torch."""
