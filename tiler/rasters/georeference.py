"""Where a raster lies on the Earth: CRS and transform, to and from the attributes that Zarr readers understand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import CRSError


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPoint:
    """A ground control point: a place in the raster, and where on the Earth that is."""

    row: float
    column: float
    x: float
    y: float
    z: float | None = None
    name: str = ""
    info: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Georeference:
    """CRS and affine transform of a raster, or ground control points in place of a transform; any may be missing."""

    crs_wkt: str | None = None
    """Of the transform, or of the points."""
    transform: tuple[float, float, float, float, float, float] | None = None
    """(a, b, c, d, e, f): x = a*column + b*row + c, y = d*column + e*row + f, of pixel corners."""
    points: tuple[ControlPoint, ...] = ()
    """Only where there is no transform."""

    @property
    def crs(self) -> CRS | None:
        return CRS.from_wkt(self.crs_wkt) if self.crs_wkt else None

    @property
    def crs_name(self) -> str:
        """For people: EPSG:32632, or its name."""
        if self.crs_wkt is None or self.crs is None:
            return "no CRS"
        authority = self.crs.to_authority()
        if authority is not None:
            return ":".join(authority)
        quoted = re.search(r'"([^"]*)"', self.crs_wkt)
        return quoted[1] if quoted else "a CRS of its own"

    @property
    def affine(self) -> Affine:
        return Affine(*self.transform) if self.transform else Affine.identity()

    @property
    def is_rotated(self) -> bool:
        return self.transform is not None and (self.transform[1] != 0 or self.transform[3] != 0)

    def position_of(self, row: float, column: float) -> tuple[float, float]:
        """(x, y) of a pixel's corner."""
        transform = self.affine
        return (
            transform.a * column + transform.b * row + transform.c,
            transform.d * column + transform.e * row + transform.f,
        )

    def pixel_of(self, x: float, y: float) -> tuple[float, float]:
        """(row, column), with fractions, of a position."""
        transform = self.affine
        determinant = transform.a * transform.e - transform.b * transform.d
        dx, dy = x - transform.c, y - transform.f
        return (
            (transform.a * dy - transform.d * dx) / determinant,
            (transform.e * dx - transform.b * dy) / determinant,
        )

    def moved(self, rows: int, columns: int) -> Georeference:
        """The georeference of a grid whose first pixel is that many rows and columns further."""
        if (rows, columns) == (0, 0):
            return self
        if self.transform is None:
            points = (replace(p, row=p.row - rows, column=p.column - columns) for p in self.points)
            return replace(self, points=tuple(points))
        a, b, _, d, e, _ = self.transform
        x, y = self.position_of(rows, columns)
        return Georeference(crs_wkt=self.crs_wkt, transform=(a, b, x, d, e, y))

    def at_scale(self, scale_yx: tuple[Fraction, Fraction]) -> Georeference:
        """The georeference of a grid with `scale_yx` pixels for each pixel of this one, from the same corner."""
        sy, sx = float(scale_yx[0]), float(scale_yx[1])
        if self.transform is None:
            points = (replace(p, row=p.row * sy, column=p.column * sx) for p in self.points)
            return replace(self, points=tuple(points))
        a, b, c, d, e, f = self.transform
        return Georeference(crs_wkt=self.crs_wkt, transform=(a / sx, b / sy, c, d / sx, e / sy, f))


OFF_GRID = 0.01
"""Pixels by which a raster may miss another's grid: writers round their transforms."""


def find_offset(place: Georeference, other: Georeference, shape_yx: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) from one raster's corner to that of another; None where they are not parts of one grid.

    Args:
        shape_yx: of the other.
    """
    if place.transform is None or other.transform is None:
        return (0, 0) if place == other else None
    if place.crs != other.crs or place.affine.is_degenerate:
        return None
    row, column = place.pixel_of(*other.position_of(0, 0))
    whole = (round(row), round(column))
    # All corners: pixels of nearly one size drift apart over a large raster, and axes may be turned.
    height, width = shape_yx
    for y, x in ((0, 0), (0, width), (height, 0), (height, width)):
        row, column = place.pixel_of(*other.position_of(y, x))
        if max(abs(row - whole[0] - y), abs(column - whole[1] - x)) > OFF_GRID:
            return None
    return whole


EARTH_A, EARTH_F = 6_378_137.0, 1 / 298.257223563
"""WGS 84: half the longer axis in metres, flattening."""


def pixel_areas(place: Georeference, rows: int) -> npt.NDArray[np.float64] | None:
    """(rows,) square metres of one pixel of each row: on the ellipsoid WGS 84 where the CRS has degrees, else in the
    CRS's own plane; None where the raster does not say where it lies, or lies turned in degrees."""
    crs = place.crs
    if crs is None or place.transform is None:
        return None
    transform = place.affine
    if not crs.is_geographic:
        try:
            metres = float(crs.linear_units_factor[1])
        except CRSError:  # a local grid, or geocentric coordinates
            return None
        return np.full(rows, abs(transform.determinant) * metres**2)
    if place.is_rotated:
        return None
    edges = np.radians(np.clip(transform.f + transform.e * np.arange(rows + 1), -90, 90))
    sines, e = np.sin(edges), np.sqrt(EARTH_F * (2 - EARTH_F))
    # Authalic q of Snyder, Map Projections (1987), 3-12: the area between two parallels is pi a^2 (q2 - q1).
    q = (1 - e**2) * (sines / (1 - (e * sines) ** 2) - np.log((1 - e * sines) / (1 + e * sines)) / (2 * e))
    return EARTH_A**2 / 2 * np.radians(abs(transform.a)) * np.abs(np.diff(q))


def from_rasterio(
    crs: CRS | None,
    transform: Affine,
    gcps: tuple[Sequence[Any], CRS | None] = ((), None),
) -> Georeference:
    """The georeference of an open rasterio dataset; an identity transform without CRS counts as none.

    Args:
        gcps: the dataset's ground control points, which count where it has no transform.
    """
    if gcps[0] and transform.is_identity:
        points = (
            ControlPoint(
                row=float(p.row),
                column=float(p.col),
                x=float(p.x),
                y=float(p.y),
                z=None if p.z is None else float(p.z),
                name=str(p.id or ""),
                info=str(p.info or ""),
            )
            for p in gcps[0]
        )
        placed = gcps[1] or crs
        return Georeference(crs_wkt=placed.to_wkt() if placed else None, points=tuple(points))
    known = bool(crs) or not transform.is_identity
    return Georeference(
        crs_wkt=crs.to_wkt() if crs else None,
        transform=(transform.a, transform.b, transform.c, transform.d, transform.e, transform.f) if known else None,
    )


def to_rasterio(place: Georeference) -> dict[str, Any]:
    """Arguments for writing a file that GDAL places there."""
    if place.points:
        gcps = [
            GroundControlPoint(row=p.row, col=p.column, x=p.x, y=p.y, z=p.z, id=p.name or None, info=p.info or None)
            for p in place.points
        ]
        return {"gcps": gcps, "crs": place.crs}
    return {"crs": place.crs, "transform": place.affine if place.transform else None}


def spatial_ref_attributes(place: Georeference) -> dict[str, Any]:
    """Attributes of the CF grid-mapping variable, as rioxarray and GDAL read them."""
    attributes: dict[str, Any] = {}
    if place.crs_wkt:
        attributes["crs_wkt"] = place.crs_wkt
        attributes["spatial_ref"] = place.crs_wkt
    if place.transform:
        a, b, c, d, e, f = place.transform
        attributes["GeoTransform"] = " ".join(repr(v) for v in (c, a, b, f, d, e))
    if place.points:
        # As rioxarray has them (`write_gcps`).
        features = [
            {
                "type": "Feature",
                "properties": {"id": p.name, "info": p.info, "row": p.row, "col": p.column},
                "geometry": {"type": "Point", "coordinates": [p.x, p.y, *([] if p.z is None else [p.z])]},
            }
            for p in place.points
        ]
        attributes["gcps"] = json.dumps({"type": "FeatureCollection", "features": features})
    return attributes


def geozarr_attributes(place: Georeference, shape_yx: tuple[int, int]) -> dict[str, Any]:
    """GeoZarr's `spatial:` and `proj:` attributes."""
    attributes: dict[str, Any] = {"spatial:dimensions": ["y", "x"], "spatial:shape": list(shape_yx)}
    if place.transform:
        attributes["spatial:transform"] = list(place.transform)
        attributes["spatial:transform_type"] = "affine"
        attributes["spatial:registration"] = "pixel"
    if place.crs_wkt:
        crs = place.crs
        authority = crs.to_authority() if crs else None
        attributes["proj:wkt2"] = crs.to_wkt(version="WKT2_2019") if crs else place.crs_wkt
        if authority:
            attributes["proj:code"] = ":".join(authority)
    return attributes


def pixel_centres(
    place: Georeference, shape_yx: tuple[int, int]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """(y, x) coordinates of row and column centres; None for rotated grids, whose rows have no one coordinate."""
    if place.is_rotated:
        return None
    transform = place.affine
    y = transform.f + transform.e * (np.arange(shape_yx[0]) + 0.5)
    x = transform.c + transform.a * (np.arange(shape_yx[1]) + 0.5)
    return y.astype(np.float64), x.astype(np.float64)


def axis_attributes(place: Georeference) -> tuple[dict[str, str], dict[str, str]]:
    """CF attributes of the y and x coordinate variables."""
    crs = place.crs
    if crs and crs.is_geographic:
        return (
            {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"},
            {"standard_name": "longitude", "units": "degrees_east", "axis": "X"},
        )
    units = {"units": "m"} if crs and crs.is_projected and crs.linear_units.lower() in ("metre", "meter", "m") else {}
    return (
        {"standard_name": "projection_y_coordinate", "axis": "Y", **units},
        {"standard_name": "projection_x_coordinate", "axis": "X", **units},
    )


def from_attributes(attributes: Mapping[str, Any], spatial_ref: Mapping[str, Any] | None) -> Georeference:
    """Read what `spatial_ref_attributes` or `geozarr_attributes`, or another writer of the same conventions, wrote."""
    said: list[Any] = []
    transform: tuple[float, ...] | None = None
    if spatial_ref:
        said += [spatial_ref.get("crs_wkt"), spatial_ref.get("spatial_ref")]
        numbers = _numbers(spatial_ref.get("GeoTransform"))
        if numbers is not None:
            c, a, b, f, d, e = numbers
            transform = (a, b, c, d, e, f)
    said += [attributes.get(key) for key in ("proj:wkt2", "proj:code", "proj:projjson", "proj:epsg", "crs")]
    crs_wkt = next((wkt for value in said if (wkt := _as_wkt(value)) is not None), None)
    if transform is None:
        transform = _numbers(attributes.get("spatial:transform"))
    points = _points((spatial_ref or {}).get("gcps")) if transform is None else ()
    return Georeference(crs_wkt=crs_wkt, transform=transform, points=points)


def _points(value: Any) -> tuple[ControlPoint, ...]:
    """Ground control points as rioxarray writes them; none where it is anything else."""
    try:
        features = json.loads(value)["features"] if isinstance(value, str) else []
        return tuple(
            ControlPoint(
                row=float(feature["properties"]["row"]),
                column=float(feature["properties"]["col"]),
                x=float(feature["geometry"]["coordinates"][0]),
                y=float(feature["geometry"]["coordinates"][1]),
                z=float(feature["geometry"]["coordinates"][2]) if len(feature["geometry"]["coordinates"]) > 2 else None,
                name=str(feature["properties"].get("id") or ""),
                info=str(feature["properties"].get("info") or ""),
            )
            for feature in features
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return ()


def _as_wkt(value: Any) -> str | None:
    """A CRS in any of its usual spellings as WKT; None for what is none."""
    if isinstance(value, Mapping):
        value = json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not value:
        return None
    try:
        return CRS.from_user_input(value).to_wkt()
    except (CRSError, ValueError):
        return None


def _numbers(value: Any) -> tuple[float, float, float, float, float, float] | None:
    """The six numbers of a transform, from a list (of nine, too) or a text; None for anything else."""
    try:
        numbers = [float(v) for v in (value.split() if isinstance(value, str) else value)]
    except (TypeError, ValueError, AttributeError):
        return None
    if len(numbers) not in (6, 9) or not np.isfinite(numbers).all():
        return None
    a, b, c, d, e, f = numbers[:6]
    return (a, b, c, d, e, f)


def from_centres(
    y: npt.NDArray[Any], x: npt.NDArray[Any], shape_yx: tuple[int, int]
) -> tuple[float, float, float, float, float, float] | None:
    """The transform of evenly spaced pixel centres; None where spacing is uneven or there is one row or column.

    Args:
        y: all centres of `shape_yx` rows, or the first two and the last; x likewise.
    """
    if len(y) < 2 or len(x) < 2:
        return None
    dy, dx = (float(v[-1] - v[0]) / (n - 1) for v, n in zip((y, x), shape_yx, strict=True))
    for values, step, count in ((y, dy, shape_yx[0]), (x, dx, shape_yx[1])):
        if step == 0 or not np.isfinite(step):
            return None
        gaps = np.diff(values) if len(values) == count else values[1:2] - values[:1]
        if not np.allclose(gaps, step, rtol=1e-3):
            return None
    return (dx, 0.0, float(x[0]) - dx / 2, 0.0, dy, float(y[0]) - dy / 2)
