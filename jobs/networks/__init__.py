"""Generator and discriminator architectures, their layouts and weight formats."""
