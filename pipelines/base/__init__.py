"""What all commands draw on: the terminal, pages, interrupts, types of options, a training's folder and log."""
