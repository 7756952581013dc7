"""Reading checkpoints without loading them."""
