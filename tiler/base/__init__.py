"""Values that everything knows: windows, tiles, names, sizes, errors. Imports nothing of the package but itself."""
