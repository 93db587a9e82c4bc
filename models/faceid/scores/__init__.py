"""How well an embedder tells persons apart, 1:1 and 1:N; draws on the gallery's search."""
