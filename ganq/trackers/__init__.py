"""Export the curves and samples of trainings to experiment trackers, from ganq's own record."""
