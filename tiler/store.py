"""The output store, format 1 (docs/output-format.md): a Zarr group whose chunks belong to tiles."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.errors import BaseZarrError

from .errors import OutputError
from .geometry import Grid, Window
from .georeference import (
    Georeference,
    axis_attributes,
    geozarr_attributes,
    pixel_centres,
    spatial_ref_attributes,
)
from .plan import Tile, TilePlan

FORMAT = 1
NODATA = 255
"""Of class and probability; logits are NaN there."""
MISSING, DONE, FAILED = 0, 1, 2
"""Values of `status`."""

OutputKind = Literal["class", "probability", "logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDescription:
    """What the numbers in an output mean."""

    kind: OutputKind
    model: str = ""
    model_sha256: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB of each class, 0..255."""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_sha256": self.model_sha256,
            "classes": [
                {"value": value, "name": name, "colour": list(colour)}
                for value, (name, colour) in enumerate(zip(self.classes, self.colours, strict=True))
            ],
        }


def output_nodata(dtype: np.dtype[Any]) -> float:
    """The value of nodata pixels in an output of that dtype."""
    return float("nan") if dtype.kind == "f" else NODATA


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
) -> zarr.Array[Any]:
    """Create a Zarr v3 group with one raster array, its coordinates and its georeference; returns the array.

    GDAL 3.12, rioxarray and xarray open it georeferenced: CF grid mapping and pixel-centre coordinates, beside
    GeoZarr's attributes.
    """
    group = zarr.create_group(str(path), overwrite=False, zarr_format=3)
    shape_yx = (shape[-2], shape[-1])
    spatial = geozarr_attributes(place, shape_yx)
    array = group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        fill_value=dtype.type(fill),
        compressors=[ZstdCodec(level=1, checksum=True)],
        dimension_names=dims,
        attributes={
            **({"grid_mapping": "spatial_ref"} if place.crs_wkt or place.transform else {}),
            # Not _FillValue: xarray would turn a class map into floats.
            **({"nodata": nodata if np.isfinite(nodata) else "nan"} if nodata is not None else {}),
            **spatial,
            **(array_attributes or {}),
        },
    )
    if place.crs_wkt or place.transform:
        reference = group.create_array(
            "spatial_ref", shape=(), dtype="int64", attributes=spatial_ref_attributes(place), dimension_names=()
        )
        reference[...] = 0
    centres = pixel_centres(place, shape_yx)
    if centres is not None and place.transform is not None:
        for axis, values, attributes in zip(("y", "x"), centres, axis_attributes(place), strict=True):
            coordinate = group.create_array(
                axis,
                shape=values.shape,
                dtype="float64",
                chunks=values.shape,
                dimension_names=(axis,),
                attributes=dict(attributes),
            )
            coordinate[:] = values
    group.attrs.update({**spatial, **(group_attributes or {})})
    return array


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
) -> None:
    """Create an output store for a plan; `header` goes into the group's `outsize` attribute.

    It is made beside its place and moved there whole, so that a crash leaves no half-made store under the name.
    """
    dtype = np.dtype(plan.output_dtype)
    channels, height, width = plan.output_shape
    is_class = description.kind == "class"
    scale = (Fraction(plan.scale[0]), Fraction(plan.scale[1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".creating")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    array_attributes: dict[str, Any] = {}
    if description.classes and is_class:
        array_attributes = {
            "flag_values": list(range(len(description.classes))),
            "flag_meanings": " ".join(name.replace(" ", "_") for name in description.classes),
        }
    create_raster_group(
        unfinished,
        name=description.kind,
        shape=(height, width) if is_class else (channels, height, width),
        dims=("y", "x") if is_class else ("class", "y", "x"),
        dtype=dtype,
        chunks=plan.chunk if is_class else (1, *plan.chunk),
        place=place.at_scale(scale),
        fill=output_nodata(dtype),
        nodata=output_nodata(dtype),
        array_attributes=array_attributes,
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
    unfinished.rename(path)


def read_header(path: Path) -> dict[str, Any]:
    """The `outsize` attribute of an output.

    Raises:
        OutputError: not an output of format 1.
    """
    try:
        header = dict(zarr.open_group(str(path), mode="r").attrs).get("outsize")
    except (BaseZarrError, OSError, ValueError, KeyError) as error:
        raise OutputError(f"{path} is not an output of outsize: {(str(error).splitlines() or [''])[0]}") from error
    if not isinstance(header, dict) or "kind" not in header or "plan" not in header:
        raise OutputError(f"{path} is not an output of outsize; choose another path")
    if header.get("format") != FORMAT:
        raise OutputError(f"{path} has output format {header.get('format')}, this version reads {FORMAT}")
    return header


def update_header(path: Path, values: dict[str, Any]) -> None:
    """Add values to the `outsize` attribute."""
    group = zarr.open_group(str(path), mode="r+")
    header: Any = dict(group.attrs)["outsize"]
    group.attrs["outsize"] = {**header, **values}


def open_array(path: str | Path, name: str, mode: Literal["r", "r+"] = "r") -> zarr.Array[Any]:
    """One array of a store."""
    array = zarr.open_array(str(path), mode=mode, path=name)
    return writable(array) if mode == "r+" else array


def write_core(array: zarr.Array[Any], core: Window, result: npt.NDArray[Any]) -> None:
    """Write a core (channels, h, w) over its whole chunks."""
    rows, columns = core.slices()
    if array.ndim == 2:
        array[rows, columns] = result[0]
    else:
        array[:, rows, columns] = result


def has_all_chunks(path: Path, kind: str, plan: TilePlan, tile: Tile) -> bool:
    """Whether every chunk of a tile is present in the store."""
    chunks = Grid(shape=plan.output_shape[1:], cell=plan.chunk).cells_touching(tile.core)
    layers = [""] if kind == "class" else [f"{channel}/" for channel in range(plan.output_shape[0])]
    return all((path / kind / "c" / f"{layer}{row}/{column}").is_file() for layer in layers for row, column in chunks)


def write_status(path: Path, status: npt.NDArray[np.uint8]) -> None:
    """Write the tiles' states, one value a tile; by one process, at the end."""
    group = zarr.open_group(str(path), mode="r+")
    array = group.create_array(
        "status",
        shape=status.shape,
        dtype="uint8",
        chunks=status.shape,
        overwrite=True,
        dimension_names=("tile_row", "tile_column"),
        attributes={"flag_values": [0, 1, 2], "flag_meanings": "missing done failed"},
    )
    array[:] = status
