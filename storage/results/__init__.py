"""Published results: write, read, verify and convert generated images."""
