"""Training: gradients of the whole image, tile by tile. Above cluster."""
