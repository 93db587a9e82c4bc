"""Every block of Python and of commands in README and docs runs as it is written, unless a comment before it says why
not.

A page is run from top to bottom in a folder with the sample scene: scene.tif, labels.tif, and, where it makes none,
demo/scene.zarr and demo/labels.zarr. Blocks of commands run one line after the other; blocks of Python that follow each
other are one program, as cells of a notebook are. Comments that readers of the page do not see steer it:

    <!-- not run: needs a bucket -->                the next block is not run, for this reason
    <!-- in tests: --steps 300 = --steps 2 -->      what takes minutes is made short
    <!-- exit code 3 -->                            the last command of the next block ends with this code
"""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from outsize.sample_data.small import small_scene_path
from outsize.tests.support.commands import outsize, outsize_here

from .checks import CHECKS, CLOSING

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?P<notes>(?:^ *<!-- .*? -->\n)*)^ *```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$", re.S | re.M)
LANGUAGES = {"python", "sh"}
SHOWN = {"text", "json", "toml", "yaml"}
"""What a program prints, or reads."""
QUIET = {"OUTSIZE_NO_DASHBOARD": "1", "OUTSIZE_THREADS": "1", "MPLBACKEND": "agg"}
"""One thread: several that wait for each other on busy cores take four times as long for such small scenes."""


@dataclass(frozen=True, kw_only=True)
class Block:
    language: str
    text: str
    """As it is run: what is made short is short."""
    code: int
    """Exit code of its last command."""
    skipped: str
    """Why it is not run; empty: it is."""


@cache
def blocks_of(page: Path) -> tuple[Block, ...]:
    found = []
    for match in BLOCK.finditer(page.read_text()):
        notes = re.findall(r"<!-- (.*?) -->", match["notes"])
        text, code, skipped = match["text"], 0, ""
        for note in notes:
            if note.startswith("not run: "):
                skipped = note.removeprefix("not run: ")
            elif note.startswith("in tests: "):
                old, new = note.removeprefix("in tests: ").split(" = ")
                assert old in text, f"{page.name}: {old!r} is not in the block"
                text = text.replace(old, new)
            elif note.startswith("exit code "):
                code = int(note.removeprefix("exit code "))
        found.append(Block(language=match["language"], text=text, code=code, skipped=skipped))
    return tuple(found)


def run_pages() -> list[Path]:
    return [page for page in PAGES if any(b.language in LANGUAGES and not b.skipped for b in blocks_of(page))]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages are given."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("scene.tif", "labels.tif"):
        shutil.copy(small_scene_path().with_name(name), folder / name)
    done = outsize_here("sample", str(folder / "demo"), "--size", "256")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("page", run_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, scene: Path, tmp_path: Path) -> None:
    leave = shutil.ignore_patterns(*["demo"] if "outsize sample demo" in page.read_text() else [])
    shutil.copytree(scene, tmp_path, ignore=leave, dirs_exist_ok=True)
    name = str(page.relative_to(ROOT))
    blocks = [block for block in blocks_of(page) if block.language in LANGUAGES and not block.skipped]
    printed = ""
    for language, group in groupby(blocks, key=lambda block: block.language):
        if language == "sh":
            printed += "".join(run_commands(block, tmp_path) for block in group)
        else:
            program = "\n".join(block.text for block in group)
            printed += run_python(f"{program}\n{CLOSING.get(name, '')}", tmp_path)
    if name in CHECKS:
        CHECKS[name](tmp_path, printed)


def run_commands(block: Block, folder: Path) -> str:
    """What they print."""
    printed = ""
    lines = block.text.replace("\\\n", " ").splitlines()
    # A comment has a space behind its sign, unlike the colour #2667B2.
    calls = [words for words in (shlex.split(re.sub(r"(^|\s)# .*", "", line)) for line in lines) if words]
    for number, words in enumerate(calls):
        assert words[0] == "outsize", f"{words[0]} is no command of ours; say why it is not run"
        done = outsize(*words[1:], cwd=folder, env=QUIET)
        code = block.code if number == len(calls) - 1 else 0
        assert done.returncode == code, f"{' '.join(words)}\n{done.stderr}"
        printed += done.stdout
    return printed


def run_python(program: str, folder: Path) -> str:
    """In a process of its own; a block whose first line is `# NAME.py` is a file that others import, and a script."""
    printed = ""
    for text in re.split(r"^(?=# \w+\.py$)", program, flags=re.M):
        if named := re.match(r"# (\w+\.py)$", text, re.M):
            (folder / named[1]).write_text(text)
        first = f"import sys; sys.path.insert(0, '.')\n{text}"
        done = outsize("--version", first=first, cwd=folder, env=QUIET)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        printed += done.stdout
    return printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES | SHOWN, f"{block.language!r}: {block.text[:60]}"
        if block.skipped:
            assert re.match(r"(needs|takes) ", block.skipped), block.skipped


def test_what_a_reader_must_not_miss_is_run() -> None:
    names = {str(page.relative_to(ROOT)) for page in run_pages()}
    assert {"README.md", *CHECKS, *CLOSING} <= names
    assert {str(page.relative_to(ROOT)) for page in PAGES if page.parent.name == "tutorials"} <= names
