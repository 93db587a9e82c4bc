"""The gallery of enrolled faces, its files and its exact search; draws on the layer's tablets."""
