"""What ganq costs and gains, as ratios against named peers measured in the same run: `make bench`."""
