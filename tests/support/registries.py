"""Things added to registries from outside, for the length of a test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from outsize.tiler.base.registry import Registry


@contextmanager
def as_before(registries: Sequence[Registry[Any]]) -> Iterator[None]:
    """Afterwards the registries know what they knew, and `sys.modules` too."""
    fields = ("_places", "_decorated", "_collisions", "_things")
    known = [{name: dict(getattr(registry, name)) for name in fields} for registry in registries]
    looked = [registry._has_looked for registry in registries]
    modules = set(sys.modules)
    for registry in registries:
        registry._has_looked = False
    try:
        yield
    finally:
        for registry, state, has_looked in zip(registries, known, looked, strict=True):
            vars(registry).update(state, _has_looked=has_looked)
        for name in set(sys.modules) - modules:
            if name.startswith("toy_"):
                del sys.modules[name]


def write_module(folder: Path, name: str, code: str) -> str:
    """A module of another program, in a folder of `sys.path`."""
    (folder / f"{name}.py").write_text(dedent(code))
    importlib.invalidate_caches()
    return name


def write_package(folder: Path, name: str, group: str, points: dict[str, str]) -> None:
    """What an installed package leaves beside its modules: its name, and its entry points of one group."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{point} = {value}\n" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")


def on_path(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A new folder of `sys.path`, which other processes get too."""
    folder.mkdir(exist_ok=True)
    patch.syspath_prepend(str(folder))
    patch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder
