"""The process that owns the lease of one job at a time."""
