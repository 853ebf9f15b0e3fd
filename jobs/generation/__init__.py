"""Generate images from a checkpoint, in micro-batches that fix their bits."""
