"""`python -m outsize`."""

from .pipelines.cli import run

run()
