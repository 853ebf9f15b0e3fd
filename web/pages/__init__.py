"""Request handlers, one file per page."""
