"""Metrics of generated images: feature networks, and distances between sets of features."""
