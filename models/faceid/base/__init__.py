"""What every room of the face layer may use: errors, plain files, names, and what ranks tell each other; nothing of the layer."""
