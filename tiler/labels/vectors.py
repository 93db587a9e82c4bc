"""Vector files: the polygons of one layer with one attribute each, in the pixels of a raster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.errors import CRSError
from rasterio.warp import transform_geom

from ..base.errors import RasterError, UsageError
from ..rasters.bounds import find_turns, turn_of
from ..rasters.gdal_trust import require_plain_features
from ..rasters.georeference import Georeference

VECTOR_SUFFIXES = (".geojson", ".json", ".shp", ".gpkg", ".fgb", ".kml", ".gml")
_GEOJSON = (".geojson", ".json")
_AREAS = ("Polygon", "MultiPolygon")

Geometry = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Polygons with the value of one attribute each, in the file's order."""

    path: str
    field: str
    geometries: tuple[Geometry, ...]
    """As GeoJSON has them, in `crs`."""
    values: tuple[str, ...]
    """As text: 3 and "3" are one value."""
    crs: CRS | None


def is_vector_file(path: str) -> bool:
    """Whether the name is that of a vector file."""
    return Path(path).suffix.lower() in VECTOR_SUFFIXES


def read_features(path: str, field: str | None = None, *, encoding: str | None = None, trust: bool = False) -> Features:
    """Read the polygons of a vector file's first layer.

    GeoJSON is read here; other formats by pyogrio, the extra `vectors`.

    Args:
        field: attribute that tells the class; None: the only one there is.
        encoding: of texts in a file that does not say it, or says it wrongly, such as latin1.
        trust: the file may be one that names other files and addresses.

    Raises:
        RasterError: a file that cannot be read, or holds no polygon.
        UsageError: a field that is not there, or none named where there are several.
    """
    if not Path(path).exists():
        raise RasterError(f"no such vector file: {path}")
    if not Path(path).is_file():
        raise RasterError(f"{path} is no file")
    if not trust:
        require_plain_features(path)
    read = _read_geojson if Path(path).suffix.lower() in _GEOJSON else _read_by_gdal
    geometries, attributes, crs = read(path, encoding)
    field = _choose_field(path, field, attributes)
    values = attributes[field]
    # A polygon without a class is as if it were not there; so is a feature without geometry.
    chosen = [
        (geometry, _as_text(value))
        for geometry, value in zip(geometries, values, strict=True)
        if geometry is not None and value is not None
    ]
    kinds = Counter(geometry["type"] for geometry, _ in chosen)
    areas = [(geometry, value) for geometry, value in chosen if geometry["type"] in _AREAS]
    if not areas:
        found = ", ".join(sorted(kinds)) or "nothing"
        raise RasterError(f"{path} must hold polygons with a value of {field}, got {found}; buffer points and lines")
    return Features(
        path=path,
        field=field,
        geometries=tuple(geometry for geometry, _ in areas),
        values=tuple(value for _, value in areas),
        crs=crs,
    )


def _as_text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _choose_field(path: str, field: str | None, attributes: Mapping[str, Sequence[Any]]) -> str:
    names = list(attributes)
    if field is None and len(names) == 1:
        return names[0]
    if field is None or field not in attributes:
        what = f"has no field {field}" if field is not None else f"has {len(names)} fields"
        raise UsageError(f"{path} {what}; name the one that tells the class with --label-field: {', '.join(names)}")
    return field


_Layer = tuple[list[Geometry | None], dict[str, list[Any]], CRS | None]


def _read_geojson(path: str, encoding: str | None) -> _Layer:
    try:
        content = json.loads(Path(path).read_text(encoding=encoding or "utf-8-sig"))
        features = content["features"] if content["type"] == "FeatureCollection" else [content]
        geometries = [feature["geometry"] for feature in features]
        properties = [feature.get("properties") or {} for feature in features]
        # RFC 7946 knows WGS 84 only; what came before it, and GDAL today, names others in a member `crs`.
        named = ((content.get("crs") or {}).get("properties") or {}).get("name")
        crs = CRS.from_user_input(named or "OGC:CRS84")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LookupError, RecursionError, CRSError) as error:
        reason = " ".join(str(error).split())
        raise RasterError(f"{path} is no GeoJSON of features: {type(error).__name__}: {reason}") from error
    names = dict.fromkeys(name for entry in properties for name in entry)
    return geometries, {name: [entry.get(name) for entry in properties] for name in names}, crs


def _read_by_gdal(path: str, encoding: str | None) -> _Layer:
    try:
        import shapely
        from pyogrio.errors import DataSourceError
        from pyogrio.raw import read
    except ImportError as error:
        raise RasterError(
            f"{path}: vector files other than GeoJSON need the extra vectors: pip install 'outsize[vectors]'"
        ) from error
    try:
        # What else GDAL asks for over a network.
        schema: dict[str, Any] = {"DOWNLOAD_SCHEMA": "NO"} if path.lower().endswith(".gml") else {}
        meta, _, shapes, columns = read(path, encoding=encoding, **schema)
    except UnicodeDecodeError as error:
        raise RasterError(
            f"{path} has texts that are not UTF-8; say their encoding: --label-encoding latin1"
        ) from error
    except (DataSourceError, ValueError) as error:
        raise RasterError(f"{path} cannot be read: {error}") from error
    geometries: list[Geometry | None] = [
        None if shape is None else shapely.geometry.mapping(shapely.from_wkb(shape)) for shape in shapes
    ]
    attributes = {str(name): column.tolist() for name, column in zip(meta["fields"], columns, strict=True)}
    return geometries, attributes, CRS.from_user_input(meta["crs"]) if meta["crs"] else None


def to_pixels(
    features: Features, place: Georeference, raster: str, shape_yx: tuple[int, int] | None = None
) -> list[Geometry]:
    """The polygons with (column, row) of a raster's pixels in place of coordinates.

    Args:
        shape_yx: of the raster: polygons are moved by whole turns around the Earth to where it lies; None: they stay.

    Raises:
        RasterError: one of the two does not say where it lies, or a polygon cannot be projected.
    """
    crs = place.crs
    if crs is None or place.transform is None:
        raise RasterError(f"labels as polygons need a raster that says where it lies; {raster} has no CRS or transform")
    if features.crs is None:
        raise RasterError(
            f"{features.path} does not say its CRS; write one beside it (.prj), or convert it to GeoPackage"
        )
    geometries = list(features.geometries)
    if features.crs != crs:
        try:
            geometries = [_project(geometry, features.crs, place) for geometry in geometries]
        except Exception as error:  # GDAL's own classes, which rasterio does not export
            raise RasterError(f"{features.path} cannot be projected to the CRS of {raster}: {error}") from error
    if shape_yx is not None:
        geometries = [_turn(geometry, place, shape_yx) for geometry in geometries]
    inverse = ~place.affine

    def move(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        x, y = points[:, 0], points[:, 1]
        moved = [inverse.a * x + inverse.b * y + inverse.c, inverse.d * x + inverse.e * y + inverse.f]
        return np.stack(moved, axis=1)

    return [_map_points(geometry, move) for geometry in geometries]


def _project(geometry: Geometry, crs: CRS, place: Georeference) -> Geometry:
    projected = transform_geom(crs, place.crs, geometry)
    turn = turn_of(place.crs_wkt)
    if turn is None or not crs.is_geographic or (place.crs and place.crs.is_geographic):
        return projected
    # A ring across the projection's seam comes back with points at both ends of the world.
    degrees = turn_of(crs.to_wkt())
    before, after = ([len(ring) for ring in _rings_of(shape)] for shape in (geometry, projected))
    if degrees is None or before != after:
        return projected
    known = iter(_rings_of(geometry))

    def unwrap(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        places = np.asarray([point[:2] for point in next(known)], np.float64)
        wanted = (places[:, 0] - places[0, 0]) / degrees * turn
        turns = np.round((wanted - (points[:, 0] - points[0, 0])) / turn)
        return points + np.stack([turns * turn, np.zeros(len(points))], axis=1)

    return _map_points(projected, unwrap)


def _rings_of(geometry: Geometry) -> list[Any]:
    parts = geometry["coordinates"]
    return list(parts) if geometry["type"] == "Polygon" else [ring for polygon in parts for ring in polygon]


def _turn(geometry: Geometry, place: Georeference, shape_yx: tuple[int, int]) -> Geometry:
    """The polygon wherever whole turns around the Earth bring it over the raster: once, or at both of its ends; as it
    is where none does."""
    turn = turn_of(place.crs_wkt)
    if turn is None:
        return geometry
    parts = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    found: list[Any] = []
    for polygon in parts:
        x = [point[0] for point in polygon[0]] if polygon else []
        turns = find_turns(place, min(x), max(x), shape_yx) if x else []
        found += [
            [[(point[0] + k * turn, point[1]) for point in ring] for ring in polygon] if k else polygon
            for k in turns or [0]
        ]
    if len(found) == 1:
        return {"type": "Polygon", "coordinates": found[0]}
    return {"type": "MultiPolygon", "coordinates": found}


def _map_points(geometry: Geometry, move: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Geometry:
    def rings(polygon: Sequence[Any]) -> list[Any]:
        return [move(np.asarray([point[:2] for point in ring], np.float64)).tolist() for ring in polygon]

    parts = geometry["coordinates"]
    moved = rings(parts) if geometry["type"] == "Polygon" else [rings(polygon) for polygon in parts]
    return {"type": geometry["type"], "coordinates": moved}


def bounds_of(geometry: Geometry) -> tuple[float, float, float, float]:
    """(least x, least y, greatest x, greatest y)."""
    parts = geometry["coordinates"]
    outer = [parts[0]] if geometry["type"] == "Polygon" else [polygon[0] for polygon in parts]
    points = np.concatenate([np.asarray(ring, np.float64) for ring in outer if len(ring)])
    (left, top), (right, bottom) = points.min(0), points.max(0)
    return float(left), float(top), float(right), float(bottom)
