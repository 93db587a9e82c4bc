"""The commands of `outsize face`: one file a command, and what they share; draws on `base`."""
