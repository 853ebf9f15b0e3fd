"""Data sets: read sources, decode, cache by fingerprint."""
