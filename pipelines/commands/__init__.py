"""The command line: options in, one call out; on top of everything."""
