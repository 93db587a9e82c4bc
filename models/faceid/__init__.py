"""The giant classification layer: margins, sharded rows, streamed passes, checkpoints."""
