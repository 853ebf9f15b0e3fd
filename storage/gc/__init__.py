"""Garbage collection of the volume: scan, decide, delete."""
