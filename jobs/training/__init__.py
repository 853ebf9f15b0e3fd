"""Train one GAN: the loop, its phases, state, checkpoints and evaluation."""
