"""`python -m outsize`."""

from .pipelines.commands.cli import run

run()
