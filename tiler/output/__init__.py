"""What a run leaves: the store of its results, and the records beside it. Above planning."""
