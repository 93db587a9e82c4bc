"""The output store, format 1 (docs/reference/output-format.md): a Zarr group whose chunks belong to tiles."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Zstd
from zarr.codecs import ZstdCodec
from zarr.errors import BaseZarrError

from ..base.choices import ZarrFormat
from ..base.dtypes import output_nodata
from ..base.errors import DamagedError, OutputError, TilerError
from ..base.geometry import Grid, Window
from ..base.text import first_line, format_bytes
from ..base.typed import find_misfit, fits
from ..rasters.georeference import (
    Georeference,
    axis_attributes,
    geozarr_attributes,
    pixel_centres,
    spatial_ref_attributes,
)
from ..rasters.zarr_bounds import bound_array
from ..system.files import make_folder, read_files, remove_tree
from ..system.places import is_remote, place_of
from ..system.stores import store_at

if TYPE_CHECKING:
    from ..base.tile import Tile
    from ..planning.plan import TilePlan

FORMAT = 1
NODATA = 255
"""Of class and probability in bytes; of class numbers in uint16 it is 65535, and floats are NaN there."""
LEVELS = 254
"""A probability p is written as round(254 p)."""
MISSING, DONE, FAILED = 0, 1, 2
"""Values of `status`."""
STATUS = "status"
"""Name of the array of tiles' states."""
CONTEXT = "nodata_context"
"""Name of the array that marks pixels whose receptive fields touch nodata."""
MASK = "mask"
"""Name of the array beside a raster's pixels that says where they are valid: 0 nodata, 255 valid, as in GDAL."""
VALID = 255
_MOST_CENTRES = 1 << 20
"""Coordinates in one chunk."""


OutputKind = Literal["class", "probability", "logits", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDescription:
    """What the numbers in an output mean."""

    kind: OutputKind
    model: str = ""
    model_sha256: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB of each class, 0..255."""
    task: str = ""
    """"multiclass", "binary", "multilabel" or "regression"; empty: nobody said."""
    activation: str = ""
    """What the network had applied to its values by itself: "none", "sigmoid", "softmax" or "argmax"."""
    threshold: float | None = None
    """Of a binary task: class 1 is where the probability is greater."""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            **({"task": self.task} if self.task else {}),
            **({"activation": self.activation} if self.activation else {}),
            **({"threshold": self.threshold} if self.threshold is not None else {}),
            "classes": [
                {"value": value, "name": name, "colour": list(colour)}
                for value, (name, colour) in enumerate(zip(self.classes, self.colours, strict=True))
            ],
        }

    @classmethod
    def from_json(cls, header: dict[str, Any]) -> OutputDescription:
        """Of an output's header."""
        classes = header["classes"]
        return cls(
            kind=header["kind"],
            model=header["model"],
            model_sha256=header["model_sha256"],
            classes=tuple(entry["name"] for entry in classes),
            colours=tuple((entry["colour"][0], entry["colour"][1], entry["colour"][2]) for entry in classes),
            task=header.get("task", ""),
            activation=header.get("activation", ""),
            threshold=header.get("threshold"),
        )


def channel_numbers(header: dict[str, Any], channels: int) -> list[int]:
    """Number of the class that each channel of an output is about: its own, but 1 of a binary task's only one."""
    return [1] if header.get("task") == "binary" and channels == 1 else list(range(channels))


def create_raster_group(
    path: Path,
    *,
    name: str,
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    dtype: np.dtype[Any],
    chunks: tuple[int, ...],
    place: Georeference,
    fill: float,
    nodata: float | None,
    array_attributes: dict[str, Any] | None = None,
    group_attributes: dict[str, Any] | None = None,
    zarr_format: ZarrFormat = 3,
    masked: bool = False,
) -> zarr.Array[Any]:
    """Create a Zarr group with one raster array, its coordinates and its georeference; returns the array.

    GDAL, rioxarray and xarray open it georeferenced: CF grid mapping and pixel-centre coordinates, beside GeoZarr's
    attributes. GDAL reads Zarr v3 from 3.12 on, v2 long before.

    Args:
        dims: the array's dimensions; two of them are y and x.
        masked: with a validity mask beside the array.
    """
    group = zarr.create_group(store_at(path), overwrite=False, zarr_format=zarr_format)
    y_axis, x_axis = dims.index("y"), dims.index("x")
    shape_yx = (shape[y_axis], shape[x_axis])
    spatial = geozarr_attributes(place, shape_yx)
    placed = bool(place.crs_wkt or place.transform or place.points)
    mapping = {"grid_mapping": "spatial_ref"} if placed else {}
    array = _create_array(
        group,
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        # In v2 the fill value means nodata to GDAL and xarray; null means none.
        fill=None if zarr_format == 2 and nodata is None else dtype.type(fill),
        dims=dims,
        attributes={
            **mapping,
            **({"ancillary_variables": MASK} if masked else {}),
            # Not _FillValue: xarray would turn a class map into floats.
            **({"nodata": nodata if np.isfinite(nodata) else repr(float(nodata))} if nodata is not None else {}),
            **spatial,
            **(array_attributes or {}),
        },
    )
    if masked:
        add_mask(path, name, shape_yx, (chunks[y_axis], chunks[x_axis]))
    if placed:
        reference = _create_array(
            group, "spatial_ref", shape=(), dtype=np.dtype("int64"), dims=(), attributes=spatial_ref_attributes(place)
        )
        reference[...] = 0
    centres = pixel_centres(place, shape_yx)
    if centres is not None and place.transform is not None:
        for axis, values, attributes in zip(("y", "x"), centres, axis_attributes(place), strict=True):
            coordinate = _create_array(
                group,
                axis,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(min(values.shape[0], _MOST_CENTRES),),
                dims=(axis,),
                attributes=dict(attributes),
            )
            coordinate[:] = values
    group.attrs.update({**spatial, **(group_attributes or {})})
    return array


def _create_array(
    group: zarr.Group,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    dims: tuple[str, ...],
    attributes: dict[str, Any],
    chunks: tuple[int, ...] | None = None,
    fill: Any = None,
) -> zarr.Array[Any]:
    """An array in the format of its group, its dimensions named as that format's readers look for them."""
    old = group.metadata.zarr_format == 2
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks or shape,
        fill_value=fill,
        compressors=[Zstd(level=1, checksum=True) if old else ZstdCodec(level=1, checksum=True)],
        chunk_key_encoding={"name": "v2", "separator": "/"} if old else None,
        dimension_names=None if old else dims,
        attributes={**attributes, "_ARRAY_DIMENSIONS": list(dims)} if old else attributes,
    )


def add_mask(path: Path, name: str, shape_yx: tuple[int, int], chunk: tuple[int, int]) -> zarr.Array[Any]:
    """Create the validity mask of the array `name`, all valid."""
    group = zarr.open_group(store_at(path), mode="r+")
    array = group[name]
    assert isinstance(array, zarr.Array)
    array.attrs["ancillary_variables"] = MASK
    if MASK in group:
        # Of a copy that was interrupted just here.
        return open_array(path, MASK, "r+")
    mapping = dict(array.attrs).get("grid_mapping")
    return _create_array(
        group,
        MASK,
        shape=shape_yx,
        dtype=np.dtype(np.uint8),
        chunks=chunk,
        fill=VALID,
        dims=("y", "x"),
        attributes={
            **({"grid_mapping": mapping} if mapping else {}),
            "flag_values": [0, VALID],
            "flag_meanings": "nodata valid",
        },
    )


def finish_metadata(path: Path) -> None:
    """Gather the metadata of a v2 store in one file, where its readers look first."""
    group = zarr.open_group(store_at(path), mode="r+", use_consolidated=False)
    if group.metadata.zarr_format == 2:
        zarr.consolidate_metadata(group.store)


def require_replaceable(path: Path, mark: str, maker: str) -> None:
    """Refuse to replace what somebody else made.

    Args:
        mark: the group attribute by which the command's own stores are known.

    Raises:
        OutputError: a file, a link, or a folder without the mark.
    """
    if not path.exists() and not path.is_symlink():
        return
    try:
        ours = not path.is_symlink() and mark in dict(zarr.open_group(store_at(path, read_only=True), mode="r").attrs)
    except (BaseZarrError, OSError, ValueError, KeyError):
        ours = False
    if not ours:
        raise OutputError(f"{path} was not made by {maker}, so --overwrite does not replace it; choose another path")


def require_space(path: Path, needed: int, what: str, *, check: bool = True) -> None:
    """Refuse what cannot fit on the disk, compression aside; object stores take anything.

    Raises:
        OutputError: `needed` bytes are more than are free.
    """
    if is_remote(path):
        return
    folder = next((parent for parent in (path, *path.parents) if parent.exists()), Path.cwd())
    free = shutil.disk_usage(folder).free
    if check and needed > free:
        raise OutputError(
            f"{what} may need {format_bytes(needed)}, the disk of {path} has {format_bytes(free)} free; choose another "
            "disk, or --no-space-check if it will compress well"
        )


def writable(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The array, set to store chunks that hold only the fill value too: a present chunk means a finished tile.

    The setting is not persisted, so every process that writes needs it.
    """
    return array.with_config({"write_empty_chunks": True})


def create_output(
    path: Path,
    *,
    plan: TilePlan,
    description: OutputDescription,
    place: Georeference,
    header: dict[str, Any],
    zarr_format: ZarrFormat = 3,
) -> None:
    """Create an output store for a plan; `header` goes into the group's `outsize` attribute.

    It is made beside its place and moved there whole, so that a crash leaves no half-made store under the name; in an
    object store, where nothing moves whole, at its place (`RunFolder.making` tells that it is not ready).
    """
    scale = (Fraction(plan.scale[0]), Fraction(plan.scale[1]))
    create_placed_output(
        path,
        plan=plan,
        description=description,
        place=place.at_scale(scale).moved(*plan.output_origin),
        header=header,
        zarr_format=zarr_format,
    )


def create_placed_output(
    path: Path,
    *,
    plan: TilePlan,
    description: OutputDescription,
    place: Georeference,
    header: dict[str, Any],
    zarr_format: ZarrFormat,
) -> None:
    """`create_output` with the place of the output, not that of its raster."""
    dtype = np.dtype(plan.output_dtype)
    channels, height, width = plan.output_shape
    is_class = description.kind == "class"
    axis = "channel" if description.task == "regression" else "class"
    make_folder(path.parent)
    unfinished = path if is_remote(path) else path.with_name(path.name + ".creating")
    remove_tree(unfinished)
    create_raster_group(
        unfinished,
        name=description.kind,
        shape=(height, width) if is_class else (channels, height, width),
        dims=("y", "x") if is_class else (axis, "y", "x"),
        dtype=dtype,
        chunks=plan.chunk if is_class else (1, *plan.chunk),
        place=place,
        zarr_format=zarr_format,
        fill=output_nodata(dtype),
        nodata=output_nodata(dtype),
        array_attributes=_flags(description) if is_class else _scale_of(description),
        group_attributes={
            "outsize": {
                "format": FORMAT,
                "kind": description.kind,
                **description.to_json(),
                "plan": plan.to_json(),
                **header,
            }
        },
    )
    group = zarr.open_group(store_at(unfinished), mode="r+")
    if plan.receptive is not None:
        mapping = dict(group[description.kind].attrs).get("grid_mapping")
        _create_array(
            group,
            CONTEXT,
            shape=(height, width),
            dtype=np.dtype(np.uint8),
            chunks=plan.chunk,
            fill=NODATA,
            dims=("y", "x"),
            attributes={
                **({"grid_mapping": mapping} if mapping else {}),
                "nodata": NODATA,
                "flag_values": [0, 1],
                "flag_meanings": "complete_context touches_nodata",
            },
        )
    if not is_class:
        coordinate = _create_array(
            group, axis, shape=(channels,), dtype=np.dtype(np.int64), dims=(axis,), attributes=_flags(description)
        )
        coordinate[:] = channel_numbers({"task": description.task}, channels)
    finish_metadata(unfinished)
    if unfinished != path:
        unfinished.rename(path)


def _flags(description: OutputDescription) -> dict[str, Any]:
    """CF's names for class numbers."""
    if not description.classes:
        return {}
    return {
        "flag_values": list(range(len(description.classes))),
        "flag_meanings": " ".join(name.replace(" ", "_") for name in description.classes),
    }


def _scale_of(description: OutputDescription) -> dict[str, Any]:
    """What a probability's numbers mean. Not CF's scale_factor: readers would turn bytes into floats unasked."""
    return {"long_name": "probability", "units": f"1/{LEVELS}"} if description.kind == "probability" else {}


def read_header(path: Path) -> dict[str, Any]:
    """The `outsize` attribute of an output.

    Raises:
        OutputError: not an output of format 1.
        DamagedError: one, but its metadata are damaged.
    """
    try:
        header: Any = dict(_open_group(path).attrs).get("outsize")
    except Exception as error:
        # Whatever stands in damaged metadata must not look like a fault of this program.
        reason = first_line(error)
        raise OutputError(f"{path} is not an output of outsize: {reason}; remove it, or choose another path") from error
    if not isinstance(header, dict) or "kind" not in header or "plan" not in header:
        raise OutputError(f"{path} is not an output of outsize; choose another path")
    if header.get("format") != FORMAT:
        raise OutputError(f"{path} has output format {header.get('format')!s:.40}, this version reads {FORMAT}")
    for name, hint in _HEADER.items():
        if not fits(header.get(name), hint) or (name == "classes" and not all(fits(e, _CLASS) for e in header[name])):
            raise DamagedError(
                f"{path} has damaged metadata: {name} is {header.get(name)!r:.60}; segment --overwrite makes it anew"
            )
    run, fill = header.get("run"), (header.get("fingerprint") or {}).get("fill", [])
    counted = run is None or (fits(run, _RUN) and all(fits(run.get(name), float | None) for name in _COUNTED))
    if not counted or not fits(fill, list[float]):
        part = "run" if not counted else "fill"
        raise DamagedError(f"{path} has damaged metadata: {part}; segment --overwrite makes it anew")
    values = [entry["value"] for entry in header["classes"]]
    colours = [entry["colour"] for entry in header["classes"]]
    painted = all(len(colour) == 3 and all(0 <= part <= 255 for part in colour) for colour in colours)
    if values != list(range(len(values))) or not painted:
        raise DamagedError(f"{path} has damaged metadata: its classes; segment --overwrite makes it anew")
    return header


_RUN: dict[str, Any] = {
    **dict.fromkeys(("pixels", "seconds", "startup_s", "mpx_per_s", "peak_bytes", "predicted_peak_bytes"), float),
    "failed_tiles": int,
    "failures": list[Any],
}
_COUNTED = ("read_amplification", "check_read_amplification", "predicted_read_amplification")
_CLASS = {"value": int, "name": str, "colour": list[int]}
_HEADER: dict[str, Any] = {
    "kind": OutputKind,
    "model": str,
    "model_sha256": str,
    "classes": list[Any],
    "plan": dict[str, Any],
    "fingerprint": dict[str, Any] | None,
    "source": {"kind": str, "paths": list[str], "options": dict[str, Any]},
    "run": dict[str, Any] | None,
}
"""What the rest of the program takes for granted in a header."""


def _open_group(path: Path) -> zarr.Group:
    """A v2 store by its gathered metadata, or where those are damaged by each file's own."""
    try:
        return zarr.open_group(store_at(path, read_only=True), mode="r")
    except ValueError:
        return zarr.open_group(store_at(path, read_only=True), mode="r", use_consolidated=False)


def read_attributes(path: Path) -> dict[str, Any]:
    """All attributes of an output's group."""
    return dict(_open_group(path).attrs)


def plan_of(path: Path, header: dict[str, Any]) -> TilePlan:
    """The frozen plan in an output's header.

    Raises:
        OutputError: it is damaged.
    """
    from ..planning.plan import TilePlan

    try:
        if not isinstance(header["fingerprint"], dict) or not isinstance(header["source"], dict):
            raise TypeError("fingerprint or source")
        plan = TilePlan.from_json(header["plan"])
        if misfit := find_misfit(plan):
            raise TypeError(f"its plan's {misfit} is {getattr(plan, misfit)!r:.60}")
        _require_possible(plan)
        return plan
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, TilerError) as error:
        raise OutputError(
            f"{path} has damaged metadata ({type(error).__name__}: {error}); segment --overwrite makes it anew"
        ) from error


def _require_possible(plan: TilePlan) -> None:
    """
    Raises:
        ValueError: sizes of a plan that no plan has.
    """
    shape, grid = plan.output_shape, plan.grid.counts
    if min(*plan.raster_shape, *shape, *plan.core, *plan.chunk, *plan.stride, *plan.region[2:]) < 1:
        raise ValueError("its plan has sizes below 1")
    if (len(plan.rows), len(plan.columns)) != grid:
        raise ValueError(f"its plan has {len(plan.rows)} x {len(plan.columns)} spans for {grid[0]} x {grid[1]} tiles")
    for span in (*plan.rows, *plan.columns):
        if not (0 <= span.core[0] < span.core[1] and 0 <= span.window[0] < span.window[1]):
            raise ValueError(f"its plan has a span {span}")
    if min(map(Fraction, plan.scale)) <= 0:
        raise ValueError(f"its plan has the scale {plan.scale}")


def update_header(path: Path, values: dict[str, Any]) -> None:
    """Add values to the `outsize` attribute."""
    group = zarr.open_group(store_at(path), mode="r+", use_consolidated=False)
    header: Any = dict(group.attrs)["outsize"]
    group.attrs["outsize"] = {**header, **values}
    finish_metadata(path)


def open_array(
    path: str | Path, name: str, mode: Literal["r", "r+"] = "r", zarr_format: ZarrFormat | None = None
) -> zarr.Array[Any]:
    """One array of a store; whose format is known is opened by fewer requests.

    Raises:
        OutputError: its metadata are missing or damaged.
    """
    try:
        array = zarr.open_array(
            store_at(place_of(path), read_only=mode == "r"), mode=mode, path=name, zarr_format=zarr_format
        )
        return writable(array) if mode == "r+" else bound_array(array)
    except (BaseZarrError, ValueError, KeyError, TypeError, FileNotFoundError) as error:
        if isinstance(error, (BaseZarrError, FileNotFoundError)) and not any(
            (place_of(path) / top).exists() for top in ("zarr.json", ".zgroup")
        ):
            # It is gone as a whole, which who writes tells in his own words; its folder may be there again, made for
            # the chunk that was just being written.
            raise
        reason = first_line(error)
        raise OutputError(
            f"{path} has no usable metadata of its array {name}: {reason}; outsize verify --repair writes them again"
        ) from error


def write_core(array: zarr.Array[Any], core: Window, result: npt.NDArray[Any]) -> None:
    """Write a core (channels, h, w) over its whole chunks."""
    rows, columns = core.slices()
    if array.ndim == 2:
        array[rows, columns] = result[0]
    else:
        array[:, rows, columns] = result


def chunks_of(kind: str, plan: TilePlan, tile: Tile, zarr_format: ZarrFormat) -> list[str]:
    """Names in the store of the chunks that a tile owns."""
    cells = Grid(shape=plan.output_shape[1:], cell=plan.chunk).cells_touching(tile.target)
    layers = [()] if kind == "class" else [(channel,) for channel in range(plan.output_shape[0])]
    wanted = [(kind, (*layer, *cell)) for layer in layers for cell in cells]
    wanted += [(CONTEXT, cell) for cell in cells] if plan.receptive is not None else []
    return [chunk_name(array, index, zarr_format) for array, index in wanted]


def seal_chunks(path: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """Flush chunks to the disk, and say what they hold: a record made after this is true after a power cut too. An
    object store answers when it has them; they are read back.

    Returns:
        bytes and hash of each.
    """
    if is_remote(path):
        values = read_files(path, names)
        return {name: (len(value), hash_chunk(value)) for name, value in zip(names, values, strict=True)}
    found: dict[str, tuple[int, str]] = {}
    folders: set[Path] = set()
    for name in names:
        file = path / name
        with file.open("rb") as chunk:
            value = chunk.read()
            os.fsync(chunk.fileno())
        found[name] = len(value), hash_chunk(value)
        # A file is on the disk when its name is, in folders whose names are.
        folders.update(parent for parent in file.parents if path in parent.parents)
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return found


def hash_chunk(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=8).hexdigest()


def find_chunk_fault(
    path: Path, name: str, recorded: tuple[int, str], sizes: Callable[[str], int | None], *, read: bool
) -> str:
    """What is wrong with a chunk by its record: missing, of another size, or, if it is to be read, of another content;
    empty where nothing is.

    Args:
        sizes: of the store's files (`sizes_below`).
    """
    try:
        size = sizes(name)
        if size is None:
            return f"{name} is missing"
        if size != recorded[0]:
            return f"{name} has {size} bytes, was written with {recorded[0]}"
        if read and hash_chunk((path / name).read_bytes()) != recorded[1]:
            return f"{name} has another content than was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return ""


def chunk_name(array: str, index: tuple[int, ...], zarr_format: ZarrFormat) -> str:
    """Name in the store of a chunk of our own arrays."""
    return "/".join((array, *(["c"] if zarr_format == 3 else []), *map(str, index)))


def chunk_window(array: zarr.Array[Any], name: str) -> tuple[slice, ...]:
    """The part of an array that a chunk of ours, named by `chunks_of`, holds."""
    index = [int(part) for part in name.split("/")[1:] if part != "c"]
    return tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, array.chunks, strict=True))


def write_status(path: Path, status: npt.NDArray[np.uint8]) -> None:
    """Write the tiles' states, one value a tile; by one process, at the end."""
    group = zarr.open_group(store_at(path), mode="r+", use_consolidated=False)
    if STATUS not in group:
        _create_array(
            group,
            STATUS,
            shape=status.shape,
            dtype=status.dtype,
            dims=("tile_row", "tile_column"),
            attributes={"flag_values": [0, 1, 2], "flag_meanings": "missing done failed"},
        )
    open_array(path, STATUS, "r+")[:] = status
    finish_metadata(path)
