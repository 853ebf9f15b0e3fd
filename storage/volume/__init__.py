"""The shared volume: layout, durable writes, checkpoints."""
