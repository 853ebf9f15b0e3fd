"""The supervisor process, which holds the lease of one job at a time."""
