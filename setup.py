"""Which packages there are: all folders of the code, under the name `outsize`; the rest is in pyproject.toml."""

from setuptools import find_packages, setup

found = find_packages(exclude=["tests", "tests.*", "build", "build.*", "docs", "docs.*"])
setup(packages=["outsize", *(f"outsize.{name}" for name in found)])
