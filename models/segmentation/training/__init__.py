"""Losses, samples, steps, scores and checkpoints of a training; nothing of terminals; draws on `files`."""
