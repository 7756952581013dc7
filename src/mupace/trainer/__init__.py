"""The reference trainer: data, model, checkpoints and the loop, readable top to bottom."""
