"""`python -m outsize`."""

from .pipelines.cli import main

main()
