"""Runs: tiles read, computed, checked and written. Above cluster."""
