"""Rasters: what a file or an array holds, and readers of its windows. Above system."""
