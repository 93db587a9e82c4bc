"""The commands on rasters and models: one file a command; draws on `base`."""
