"""Every block of README, of the tutorials and of short pages runs as it is written, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    DOCS / "index.md",
    *sorted((DOCS / "tutorials").glob("*.md")),
    DOCS / "how-to/cluster.md",
    DOCS / "how-to/resume.md",
]
NEEDS_A_SCENE = {"cluster.md", "resume.md"}
"""Pages for those who have read the others."""
BLOCK = re.compile(
    r"^(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
SMALLER = {
    "--size 1024": "--size 256",
    "--size 768": "--size 256",
    "[:640]": "[:170]",
    "--steps 40 --core 128": "--steps 4 --core 64",
    "--val-every 20": "--val-every 2",
    "--identities 30": "--identities 6",
    "--images 4": "--images 2",
    "synthetic:200 --steps 60 --held-out 20": "synthetic:30 --steps 3 --held-out 6",
}
"""The same on less, sooner."""


@dataclass(frozen=True)
class Block:
    kind: str
    text: str
    is_run: bool


def blocks_of(text: str) -> list[Block]:
    return [
        Block(kind=match["kind"], text=match["text"], is_run=match["mark"] is None) for match in BLOCK.finditer(text)
    ]


def program_of(page: Path) -> str:
    """The page as one program: commands by the command line's own function, code as it is."""
    parts = ["from outsize.pipelines.commands.cli import main as _main"]
    if page.name in NEEDS_A_SCENE:
        parts.append("_main(['sample', 'demo', '--size', '256'])")
    text = page.read_text()
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    for block in blocks_of(text):
        if not block.is_run or block.kind not in ("sh", "python"):
            continue
        if block.kind == "python":
            parts.append(block.text)
            continue
        for line in block.text.splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "outsize":
                words = [*words[1:], *(["--no-dashboard"] if words[1] == "segment" else [])]
                parts.append(f"_main({words!r})")
            elif words:
                raise AssertionError(f"{page.name}: a command of others: {line}")
    return f"if __name__ == '__main__':\n{textwrap.indent(chr(10).join(parts), '    ')}"


@pytest.mark.system
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_works_as_it_is_written(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page.read_text())
    assert any(block.is_run for block in blocks)
    script = tmp_path / "page.py"
    script.write_text(program_of(page))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
