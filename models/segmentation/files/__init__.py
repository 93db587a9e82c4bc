"""Where models come from and how they are saved; draws on `networks`."""
