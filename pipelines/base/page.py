"""Pages: one HTML file that needs no other, in the house's style, from a template of `templates/`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ... import __version__
from ...tiler.base.errors import OutputError, UsageError
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.system.places import require_lasting


def render_page(template: str, kind: str, values: dict[str, Any], **filters: Callable[[Any], str]) -> str:
    """The page of a template that extends page.html.

    Args:
        kind: what the page is, for its title.
        values: what the template names; `out` is the heading.
        filters: beside bytes, seconds and words.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("outsize.pipelines", package_path="templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(bytes=format_bytes, seconds=format_seconds, words=shlex.join, **filters)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    return environment.get_template(template).render(kind=kind, made=made, version=__version__, **values)


def describe_choice(value: Any) -> str:
    """An option as a page shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {describe_choice(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def require_page_target(target: Path, *, overwrite: bool) -> None:
    """Refuse what is no name for a page, before the work begins.

    Raises:
        UsageError: another suffix.
        OutputError: something is there.
    """
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"a report is a page, its name ends in .html, got {target.name}")
    require_lasting(target)
    if target.is_dir():
        raise OutputError(f"{target} is a folder; choose another path")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another path, or --overwrite")
