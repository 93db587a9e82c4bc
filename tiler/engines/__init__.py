"""What runs a network on windows and tiles: OpenVINO, torch, CUDA. Above analysis and rasters."""
