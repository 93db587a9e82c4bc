"""The plan: every decision of a run, made before a pixel is read. Above engines."""
