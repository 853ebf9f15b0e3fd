"""The child process with torch in it that does the work."""
