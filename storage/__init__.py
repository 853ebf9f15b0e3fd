"""The job table and the shared volume: the only code that changes a state or writes a file."""
