"""Evaluate a model against the real images."""
