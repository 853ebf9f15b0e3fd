"""Texts for the state, progress and results of a job, for the command line and the web page."""
