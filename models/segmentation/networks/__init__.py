"""A segmentation network and what its numbers mean: classes, scaling, ending, task; nothing of files or training."""
