"""Checkpoints as folders and hub repositories: which files they are, and tensors in and out of them. No networks."""
