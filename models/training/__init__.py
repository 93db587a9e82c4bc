"""What trainings of all networks share: optimisers and learning rates. It may import tiler's errors alone."""
