"""The giant classification layer: margins, sharded rows, streamed passes, plans, checkpoints; draws on `base` alone."""
