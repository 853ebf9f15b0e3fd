"""The page: queue, runs and images in a browser, served from the job table and the volume."""
