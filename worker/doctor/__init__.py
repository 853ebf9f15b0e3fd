"""Checks of ganq doctor, one file per subject."""
