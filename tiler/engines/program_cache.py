"""Programs on disk: what was converted once on this machine is found by every later run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from ..base.text import parse_bytes
from ..system.cache_folder import cache_folder, compiled_folder
from ..system.private_folder import make_private
from .program_ir import ModelParts, names_of

LIMIT_VARIABLE = "OUTSIZE_CACHE_LIMIT"
LIMIT = "2GB"
log = logging.getLogger(__name__)


class ProgramCache:
    """Converted programs of one network.

    A file under constants/ is named by its SHA-256 and checked when it is read, files are written beside their place
    and renamed, graphs after the constants that they need: so processes may share the folder, die in it, or delete it.
    Whatever is missing or damaged is converted again. A folder that cannot be written is as good as none.
    """

    def __init__(self, network: str, folder: Path | None = None) -> None:
        self._root = (folder or cache_folder()) / "programs"
        self._folder = self._root / network

    def read(self, key: str, kept: dict[str, bytes] | None = None) -> ModelParts | None:
        """A program, if it is there and whole.

        Args:
            kept: as of `split_model`.
        """
        kept = {} if kept is None else kept
        try:
            graph = (self._folder / f"{key}.xml").read_bytes()
            digest, graph = graph[:64], graph[65:]
            if hashlib.sha256(graph).hexdigest().encode() != digest:
                return None
            constants: dict[str, bytes] = {}
            for name in names_of(graph):
                if name not in kept:
                    value = (self._folder / "constants" / name).read_bytes()
                    if hashlib.sha256(value).hexdigest() != name:
                        (self._folder / "constants" / name).unlink()
                        return None
                    kept[name] = value
                constants[name] = kept[name]
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(self._folder)
            os.utime(self._folder / f"{key}.xml")
        return ModelParts(graph=graph, constants=constants)

    def write(self, key: str, model: ModelParts) -> None:
        """Keep a program."""
        try:
            make_private(self._folder / "constants")
            for name, value in model.constants.items():
                if not (self._folder / "constants" / name).exists():
                    _write(self._folder / "constants" / name, value)
            digest = hashlib.sha256(model.graph).hexdigest().encode()
            _write(self._folder / f"{key}.xml", digest + b"\n" + model.graph)
        except OSError as error:
            log.info("programs are not kept: %s", error)

    def read_text(self, name: str) -> str | None:
        """What else is kept for the network."""
        with contextlib.suppress(OSError):
            return (self._folder / name).read_text()
        return None

    def write_text(self, name: str, text: str) -> None:
        """Keep something else for the network; a folder that cannot be written is as good as none."""
        with contextlib.suppress(OSError):
            make_private(self._folder)
            _write(self._folder / name, text.encode())

    def trim(self, used: Collection[str] = ()) -> None:
        """Until the limit is kept, delete what was not used for longest: other networks and what torch.compile keeps,
        then this network's programs that are not `used`."""
        limit = parse_bytes(os.environ.get(LIMIT_VARIABLE) or LIMIT)
        with contextlib.suppress(OSError):
            folders = [place for place in self._root.iterdir() if place.is_dir()]
            compiled = compiled_folder()
            folders += [compiled] if compiled.is_dir() else []
            sizes = {folder: _size_of(folder) for folder in folders}
            for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
                if sum(sizes.values()) > limit and folder != self._folder:
                    shutil.rmtree(folder, ignore_errors=True)
                    del sizes[folder]
            if sum(sizes.values()) > limit:
                self._trim_own(sum(sizes.values()) - limit, used)

    def _trim_own(self, excess: int, used: Collection[str]) -> None:
        graphs = sorted(self._folder.glob("*.xml"), key=lambda graph: graph.stat().st_mtime)
        needed = {graph: set(names_of(graph.read_bytes()[65:])) for graph in graphs}
        for graph in graphs:
            if excess > 0 and graph.stem not in used:
                freed = needed.pop(graph).difference(*needed.values())
                for file in (graph, *(self._folder / "constants" / name for name in freed)):
                    excess -= file.stat().st_size
                    file.unlink()


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(path: Path, value: bytes) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(value)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
