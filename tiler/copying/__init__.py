"""Copies of rasters into Zarr stores. Above cluster."""
