"""What `mkdocs build` does besides: shows the code's packages to mkdocstrings, and lists the public names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click
import outsize
from outsize.pipelines.commands.cli import cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("tiler", "models", "pipelines", "sample_data", "__init__.py")
SHIM = "https://unpkg.com/iframe-worker/shim"
"""Where the theme finds it otherwise."""
NAMES, COMMANDS = "<!-- public names -->", "<!-- commands -->"
"""Marks in pages, and what is put in their place."""
WIDTH = 80
"""Columns of a command's help."""
SECTIONS = {
    "From a raster to a result": ("segment", "Result", "open_result", "Model", "load_model", "save_model"),
    "Options": ("PlanOptions", "WriteOptions", "ClusterOptions", "ReadOptions"),
    "Rasters": ("open_raster", "open_stack", "open_mosaic", "copy_raster", "Raster", "Window"),
}
"""Names that belong together, in the order of use; the others follow by their alphabet."""


def on_startup(**_: Any) -> None:
    """Name the packages as they are imported: the repository's folder may be called anything."""
    folder = ROOT / "build" / "docs" / "outsize"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says of itself in the places of the marks."""
    for mark, make in ((NAMES, list_names), (COMMANDS, list_commands)):
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    return markdown


def list_names() -> str:
    """A section for each group of names, each name by its docstring."""
    left = {name for name in outsize.__all__ if not name.startswith("_") and name != "SegmentationModel"}
    classes = {name: value for name in left if inspect.isclass(value := getattr(outsize, name))}
    errors = {name for name, value in classes.items() if issubclass(value, Exception)}
    text = []
    for title, names in SECTIONS.items():
        left -= set(names)
        text.append(f"## {title}\n")
        text += map(describe, names)
    text.append("## Networks, plans, training\n")
    text += map(describe, sorted(left - errors, key=str.lower))
    text.append("## Errors\n\nEach says the rule, the value and the remedy in one line.\n")
    text += map(describe, sorted(errors))
    return "\n".join(text)


def list_commands() -> str:
    """Each command with its help, as a terminal shows it."""
    text: list[str] = []

    def add(command: click.Command, path: tuple[str, ...], parent: click.Context | None) -> None:
        context = command.context_class(command, info_name=path[-1], parent=parent, max_content_width=WIDTH)
        context.terminal_width = WIDTH
        text.append(f"{'#' * (len(path) + 1)} {' '.join(path)}\n\n```text\n{command.get_help(context)}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                add(command.commands[name], (*path, name), context)

    add(cli, ("outsize",), None)
    return "\n".join(text)


def describe(name: str) -> str:
    value = getattr(outsize, name)
    options = f"      heading: outsize.{name}\n      toc_label: {name}\n"
    return f"::: {value.__module__}.{value.__name__}\n    options:\n{options}"


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Take what lets the search work without a server from this site, and nothing from other hosts."""
    above = "../" * page.url.count("/")
    return output.replace(SHIM, f"{above}assets/offline-worker.js")


def on_post_template(output: str, **_: Any) -> str:
    return output.replace(SHIM, "assets/offline-worker.js")
