"""What several test modules share: networks, rasters, runs, commands. No test module imports another."""
