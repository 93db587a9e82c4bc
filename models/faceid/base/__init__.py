"""What every room of the face layer may use: errors, plain files, names, what ranks tell each other; no layer."""
