"""The reference names every public name once, and every command with all of its options."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import click
import outsize
import outsize.models
import outsize.tiler
import pytest
from outsize.pipelines.commands.cli import cli

pytest.importorskip("mkdocs")

DOCS = Path(__file__).parents[2] / "docs"


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("outsize_docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_one_place() -> None:
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = Counter()
    for package, name in re.findall(r"^::: (outsize(?:\.\w+)*)\.(\w+)$", pages, re.M):
        named[getattr(importlib.import_module(package), name)] += 1
    assert [thing for thing, count in named.items() if count > 1] == []
    packages = (outsize, outsize.tiler, outsize.models)
    public = {getattr(package, name) for package in packages for name in package.__all__ if name != "__version__"}
    assert {thing.__name__ for thing in public ^ set(named)} == set()


def test_a_name_stands_under_its_public_name_at_the_place_that_defines_it() -> None:
    directive = hooks().on_page_markdown("::: outsize.segment\n")
    assert directive.startswith("::: outsize.pipelines.api.segment.segment\n")
    assert "heading: outsize.segment" in directive


def test_the_reference_has_every_command_and_option() -> None:
    text = hooks().on_page_markdown("::: command line")

    def look(command: click.Command, path: str) -> None:
        section = re.search(rf"^##+ {re.escape(path)}$(.*?)(?=^##|\Z)", text, re.M | re.S)
        assert section is not None, path
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[0] in section[1], f"{path} {parameter.opts[0]}"
        if isinstance(command, click.Group):
            for name, below in command.commands.items():
                look(below, f"{path} {name}")

    look(cli, "outsize")


def test_pages_take_the_script_of_the_search_from_the_site() -> None:
    class Page:
        url = "reference/cli.html"

    foreign = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
    assert hooks().on_post_page(foreign, Page()) == '<script src="../assets/offline-worker.js"></script>'
    assert (DOCS / "assets/offline-worker.js").is_file()
