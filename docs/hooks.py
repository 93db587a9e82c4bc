"""What `mkdocs build` does besides: names and commands come from the code, and pages load nothing from other hosts.

- `::: outsize.segment` in a page: public names are loaded on first use, which no static reader follows. The line
  becomes the place that defines the name, under its public name.
- `::: command line` in a page: every command with its help, usage and options, from the click code.
- The theme would load a script of another host to search pages that are opened from a disk; ours does it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

_NAME = re.compile(r"^::: (outsize(?:\.tiler|\.models)?)\.(\w+)$", re.MULTILINE)
_ROOT = Path(__file__).parents[1]
_PACKAGES = ("tiler", "models", "pipelines", "sample_data", "__init__.py")
_COMMANDS = "::: command line"
_SHIM = "https://unpkg.com/iframe-worker/shim"
"""Where the theme finds it otherwise."""


def on_startup(**_: Any) -> None:
    """Show the packages under the name by which they are imported: the repository's folder may be called anything."""
    folder = _ROOT / "build" / "docs" / "outsize"
    folder.mkdir(parents=True, exist_ok=True)
    for name in _PACKAGES:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(_ROOT / name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says of itself in the places of the marks."""
    if _COMMANDS in markdown:
        cli = _defined("outsize.pipelines.commands.cli", "cli")
        markdown = markdown.replace(_COMMANDS, "\n".join(describe_commands(cli, None, "outsize")))
    return _NAME.sub(lambda found: _directive_of(found[1], found[2]), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Take the script from this site."""
    above = "../" * page.url.count("/")
    return output.replace(_SHIM, f"{above}assets/offline-worker.js")


def on_post_template(output: str, **_: Any) -> str:
    """The same in pages that have no text of their own, such as 404.html."""
    return output.replace(_SHIM, "assets/offline-worker.js")


def describe_commands(command: click.Command, above: click.Context | None, name: str) -> Iterator[str]:
    """Lines of Markdown: the command, then, of a group, its commands in the order of `--help`."""
    context = click.Context(command, parent=above, info_name=name)
    yield f"{'#' * (2 if above is None or above.parent is None else 3)} {context.command_path}"
    yield ""
    yield from _describe_help(command.help or "")
    yield from ("```text", f"{context.command_path} {' '.join(command.collect_usage_pieces(context))}", "```", "")
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    yield from ("| option | |", "|---|---|")
    for names, text in (record for record in records if record is not None and record[1]):
        yield f"| `{_in_table(names)}` | {_in_table(text).replace('<', '&lt;').replace('*', '&#42;')} |"
    yield ""
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            below = command.get_command(context, each)
            if below is not None and not below.hidden:
                yield from describe_commands(below, context, each)


def _describe_help(text: str) -> Iterator[str]:
    """Paragraphs; those that click leaves as they are stand as code."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            yield from ("```text", paragraph.removeprefix("\b").strip("\n"), "```", "")
        else:
            yield from (re.sub(r"([<*_])", r"\\\1", " ".join(paragraph.split())), "")


def _in_table(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _directive_of(package: str, name: str) -> str:
    defined = _defined(package, name)
    return f"""::: {defined.__module__}.{defined.__qualname__}
    options:
      heading: {package}.{name}
      toc_label: {name}"""


def _defined(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
