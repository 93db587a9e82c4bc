"""`outsize train`: data, run, workers, page; draws on `segment` for models' sources, and on `base`."""
