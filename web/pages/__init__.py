"""One file per page: what a handler reads, and what it gives to the template."""
