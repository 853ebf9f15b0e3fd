"""How good pictures are: features, and distances between sets of them."""
