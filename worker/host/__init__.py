"""What a machine offers: GPUs, cores, processes, embedded Redis, logs."""
