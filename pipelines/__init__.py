"""One file per job; `cli` on top."""
