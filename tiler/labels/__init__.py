"""Labels of rasters: other rasters on their grid, and polygons. Above rasters."""
