"""What a network does to pixels: its traced graph, its halo, programs for parts of an image. Above system."""
