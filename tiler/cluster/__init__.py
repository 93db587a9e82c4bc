"""Dask: clusters, jobs on them, and the map of tiles in its dashboard. Above output."""
