"""A job in words: its state, progress and results, for the command line and the page."""
