"""Networks that make features of pictures, their files, their steps; draws on `layer` and `pictures`."""
