"""What a Python user calls: a raster through a model in one call, and what comes out of it; draws on `segment`."""
