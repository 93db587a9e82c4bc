"""Networks that make features of pictures, their files, and their step through the layer; draws on `layer` and `pictures`."""
