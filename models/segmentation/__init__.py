"""The modest segmentation network, its weights, losses and metrics."""
