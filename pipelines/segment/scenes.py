"""Scenes: the inputs of a batch, from paths, patterns, folders, lists and STAC items, and their outputs' names."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...tiler.base.errors import UsageError
from ...tiler.base.text import one_line, reason_of
from ...tiler.rasters.band_names import band_name_of
from ...tiler.rasters.zarr_arrays import split_zarr_path
from ...tiler.system.files import MOST_TEXT, find_matching, read_place, read_regular
from ...tiler.system.places import OBJECT_STORES, place_of, scheme_of
from ..base.console import count_of

SUFFIXES = (".tif", ".tiff", ".vrt", ".jp2", ".img")
"""Of rasters that are looked for in a folder, beside Zarr stores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScene:
    """One input of a batch."""

    name: str
    """Its output is DIR/NAME.zarr."""
    paths: tuple[str, ...]
    """One raster, or several that are the bands of one."""
    bands: tuple[str, ...] = ()
    """Their names as a STAC item gives them; empty: the files' own."""

    @property
    def label(self) -> str:
        return one_line(self.paths[0] if len(self.paths) == 1 else f"{self.name} ({len(self.paths)} files)")


def find_scenes(sources: Sequence[str], lists: Sequence[Path] = (), assets: Sequence[str] = ()) -> list[BatchScene]:
    """All scenes that are named, in the order given; those of a folder or a pattern by name.

    Args:
        sources: paths of rasters, patterns (* ? []), folders of rasters, STAC items or ItemCollections (.json).
        lists: text files with a path on each line, a name for it after a tab if wanted; lines of # are comments.
        assets: of STAC items; several are the bands of one raster. None: the one asset whose role is data.

    Raises:
        UsageError: nothing is found, or two scenes would have one output.
    """
    scenes = [scene for source in sources for scene in _expand(source, assets)]
    scenes += [scene for file in lists for scene in _read_list(file)]
    if not scenes:
        raise UsageError("a batch needs an input, got none")
    by_name: dict[str, BatchScene] = {}
    for scene in scenes:
        if scene.name in ("", ".", "..") or "/" in scene.name or not scene.name.isprintable():
            raise UsageError(
                f"{scene.label} must be written to a name in --out-dir, got {scene.name!r}; give a name without a slash"
            )
        other = by_name.setdefault(scene.name, scene)
        if other is not scene:
            raise UsageError(
                f"{other.label} and {scene.label} would both be written to {scene.name}.zarr; name them in a --list "
                "file, PATH, a tab, NAME"
            )
    return scenes


def _expand(source: str, assets: Sequence[str]) -> list[BatchScene]:
    in_store = scheme_of(source) in OBJECT_STORES
    path = place_of(source) if in_store else Path(source)
    if path.suffix.lower() == ".json" and path.is_file():
        return list(_read_stac(path, assets))
    if path.exists():
        if not path.is_dir() or split_zarr_path(path) is not None:
            return [_scene_of(source)]
        found = sorted(entry for entry in path.iterdir() if _is_raster(entry))
        if not found:
            raise UsageError(f"{source} holds no raster ({', '.join(SUFFIXES)} or Zarr); give a pattern or a list")
        return [_scene_of(str(entry)) for entry in found]
    if glob.has_magic(source):
        # Path.glob takes no absolute pattern.
        matches = find_matching(source) if in_store else sorted(glob.glob(source, recursive=True))  # noqa: PTH207
        if not matches:
            raise UsageError(f"no file fits {source}")
        return [_scene_of(match) for match in matches]
    return [_scene_of(source)]  # not there, or elsewhere: opening it says why


def _is_raster(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES if path.is_file() else path.suffix == ".zarr"


def _scene_of(source: str, name: str | None = None) -> BatchScene:
    return BatchScene(name=name or Path(source.rstrip("/")).stem, paths=(source,))


def _read_list(file: Path) -> Iterator[BatchScene]:
    try:
        # By newlines alone: names may hold what else ends a line somewhere.
        lines = read_regular(file, MOST_TEXT).decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no list of paths: {reason_of(error)}") from error
    for line in lines:
        source, _, name = line.partition("\t")
        if source.strip() and not source.startswith("#"):
            # Relative to where the command is called, as on its line.
            yield _scene_of(source.strip(), name.strip() or None)


def _read_stac(file: Path, assets: Sequence[str]) -> Iterator[BatchScene]:
    try:
        found = json.loads(read_place(file, MOST_TEXT).decode("utf-8-sig"))
        features = found["features"] if found["type"] == "FeatureCollection" else [found]
        items = [(str(item["id"]), dict(item["assets"])) for item in features]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{file} is neither a STAC item nor an ItemCollection: {error!r}") from error
    if not items:
        raise UsageError(f"{file} has no items")
    for name, known in items:
        item = f"STAC item {one_line(name)}"
        for key, asset in known.items():
            if not isinstance(asset, dict):
                raise UsageError(f"{item}: asset {key!r} must be an object with a href, got {asset!r:.40}")
        there = one_line(", ".join(known)) or "none"
        chosen = assets or [key for key, asset in known.items() if "data" in (asset.get("roles") or ())]
        if not assets and len(chosen) != 1:
            raise UsageError(
                f"{item} has {count_of(len(chosen), 'asset')} of role data; choose with --asset, once for each "
                f"band file; it has: {there}"
            )
        for key in chosen:
            if key not in known or "href" not in known[key]:
                raise UsageError(f"{item} has no asset {key}, it has: {there}")
        named = [_find_band_names(known[key]) for key in chosen]
        yield BatchScene(
            name=_as_file_name(name),
            paths=tuple(_resolve(file, known[key]) for key in chosen),
            # What one of them leaves open the files may say.
            bands=tuple(band for bands in named for band in bands) if all(named) else (),
        )


def _find_band_names(asset: dict[str, Any]) -> list[str]:
    """Of an asset's bands, as STAC 1.1 (`bands`) or its extension eo before that (`eo:bands`) names them."""
    entries = asset.get("bands") or asset.get("eo:bands")
    return [band_name_of(entry) for entry in entries] if isinstance(entries, list) else []


def _resolve(file: Path, asset: dict[str, Any]) -> str:
    href = str(asset["href"])
    if href.startswith("file:"):
        place = href.removeprefix("file:")
        return unquote("/" + place[2:].partition("/")[2] if place.startswith("//") else place)
    if "://" in href:
        return href
    return href if href.startswith("/") else str(file.parent / href)


def _as_file_name(name: str) -> str:
    """An id as a name in one folder, and on one line of a terminal."""
    return "".join(c if c.isprintable() and c != "/" else "_" for c in name).lstrip(".") or "item"
