"""Losses, samples, steps and scores of a training: values and tensors, nothing of files or terminals but its checkpoint; may draw on `files` and `networks`."""
