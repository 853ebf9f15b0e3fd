"""The submit commands."""
