"""Benchmarks: ratios of ganq to named peers that are measured in the same run (`make bench`)."""
