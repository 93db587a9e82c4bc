"""Tables for notebooks: a title and named values, as HTML that needs no style sheet."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def render_table(title: str, rows: Mapping[str, str]) -> str:
    """A table with one row a value; names and values are text, whatever characters they hold."""
    body = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{body}</table></div>"
