"""Labels of another extent of the same grid, across 180 degrees, and values that mean no class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, Labels, open_labels
from outsize.tiler.rasters.bounds import find_turns, turn_of, window_of_bounds
from outsize.tiler.rasters.georeference import Georeference
from rasterio.crs import CRS
from rasterio.features import rasterize

from ...support.rasters import write_geotiff

NAMES = ("water", "sand", "forest")
UTM = Georeference(crs_wkt=CRS.from_epsg(32633).to_wkt(), transform=(10, 0, 400_000, 0, -10, 5_600_000))


def place_at(epsg: int, west: float, north: float, step: float) -> Georeference:
    return Georeference(crs_wkt=CRS.from_epsg(epsg).to_wkt(), transform=(step, 0, west, 0, -step, north))


def read_all(labels: Labels, shape: tuple[int, int], cell: tuple[int, int] = (13, 17)) -> np.ndarray:
    found = np.empty(shape, np.uint16)
    reader = labels.open_reader()
    grid = Grid(shape=shape, cell=cell)
    for at in grid:
        window = grid.window(*at)
        found[window.slices()] = reader.read(window)
    reader.close()
    return found


def write_labels(path: Path, values: np.ndarray, place: Georeference) -> str:
    return str(write_geotiff(path, values[None], crs=place.crs, transform=place.affine, photometric="minisblack"))


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        ((0, 0), (41, 53), ""),
        ((-7, -9), (90, 80), "cover 100 % of it, and are cropped to it"),
        ((5, 8), (20, 30), "cover 27.6 % of it, the rest is unlabelled"),
        ((-10, 40), (30, 60), "of it, the rest is unlabelled"),
        ((30, -20), (41, 53), "of it, the rest is unlabelled"),
    ],
)
def test_labels_of_any_extent_of_the_grid_are_aligned(
    tmp_path: Path, offset: tuple[int, int], size: tuple[int, int], words: str
) -> None:
    shape = (41, 53)
    values = np.random.default_rng(0).integers(0, 3, size).astype(np.uint8)
    path = write_labels(tmp_path / "labels.tif", values, UTM.moved(*offset))
    labels = open_labels(path, UTM, shape, of="scene", names=NAMES, options=LabelOptions())
    canvas = np.full((300, 300), UNLABELLED, np.uint16)
    canvas[100 + offset[0] : 100 + offset[0] + size[0], 100 + offset[1] : 100 + offset[1] + size[1]] = values
    assert np.array_equal(read_all(labels, shape), canvas[100:141, 100:153])
    assert words in labels.note
    assert bool(words) == bool(labels.note)


def test_raster_labels_are_found_around_the_earth(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 3, (18, 36)).astype(np.uint8)
    path = write_labels(tmp_path / "world.tif", values, place_at(4326, 0, 90, 10))
    # Columns of 0..360 as a scene of -180..180 has them, and as one of 150..210 does.
    whole = open_labels(path, place_at(4326, -180, 90, 10), (18, 36), of="scene", names=NAMES, options=LabelOptions())
    assert np.array_equal(read_all(whole, (18, 36)), np.roll(values, 18, axis=1))
    half = write_labels(tmp_path / "half.tif", values, place_at(4326, -180, 90, 10))
    across = open_labels(half, place_at(4326, 150, 90, 10), (18, 6), of="scene", names=NAMES, options=LabelOptions())
    assert np.array_equal(read_all(across, (18, 6)), np.concatenate([values[:, 33:], values[:, :3]], axis=1))


def test_values_below_zero_are_of_no_class_and_counted(tmp_path: Path) -> None:
    values = np.random.default_rng(2).choice(np.array([-100, -1, 0, 1, 2], np.int32), (41, 53))
    path = write_labels(tmp_path / "labels.tif", values, UTM)
    labels = open_labels(path, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions())
    reader = labels.open_reader()
    found = reader.read(Window(y=0, x=0, height=41, width=53))
    assert np.array_equal(found, np.where(values < 0, UNLABELLED, values))
    assert dict(reader.ignored) == {-100: (values == -100).sum(), -1: (values == -1).sum()}
    # Who names them wants them.
    named = open_labels(
        path, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions(values=("-1", "0", "1"), nodata=(2,))
    )
    expected = np.select([values == -1, values == 0, values == 1], [0, 1, 2], UNLABELLED)
    assert np.array_equal(read_all(named, (41, 53)), expected)


def box(west: float, south: float, east: float, north: float) -> list[list[tuple[float, float]]]:
    return [[(west, south), (east, south), (east, north), (west, north), (west, south)]]


def write_polygons(path: Path, *polygons: tuple[str, list[object]], crs: str | None = None) -> str:
    """(value, polygons of one feature) each."""
    features = [
        {
            "type": "Feature",
            "properties": {"cover": value},
            "geometry": {"type": "MultiPolygon", "coordinates": parts},
        }
        for value, parts in polygons
    ]
    named = {"crs": {"type": "name", "properties": {"name": crs}}} if crs else {}
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **named}))
    return str(path)


def burn(place: Georeference, shape: tuple[int, int], *shapes: tuple[int, list[object]]) -> np.ndarray:
    """All at once, each polygon as it lies in the scene's own coordinates."""
    return rasterize(
        [({"type": "MultiPolygon", "coordinates": parts}, value) for value, parts in shapes],
        out_shape=shape,
        fill=UNLABELLED,
        transform=place.affine,
        dtype="uint16",
    )


SPLIT = [box(179.03, -0.87, 180, 0.91), box(-180, -0.87, -178.52, 0.91)]
"""As RFC 7946 (3.1.9) has a polygon across 180 degrees cut."""


@pytest.mark.parametrize("west", [178.0, -182.0])
def test_both_halves_of_a_polygon_cut_at_180_degrees_lie_in_a_scene_across_it(tmp_path: Path, west: float) -> None:
    place, shape = place_at(4326, west, 1.5, 0.05), (60, 80)
    path = write_polygons(tmp_path / "cut.geojson", ("sand", [*SPLIT]), ("water", [box(-179.6, -0.2, -179.1, 1.2)]))
    labels = open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions())
    turn = 0 if west > 0 else -360
    expected = burn(
        place,
        shape,
        (1, [box(179.03 + turn, -0.87, 181.48 + turn, 0.91)]),
        (0, [box(180.4 + turn, -0.2, 180.9 + turn, 1.2)]),
    )
    assert (expected == 1).sum() > 1000
    assert np.array_equal(read_all(labels, shape), expected)


def test_polygons_across_greenwich_lie_at_both_ends_of_a_scene_from_0_to_360(tmp_path: Path) -> None:
    place, shape = place_at(4326, 0, 90, 2.5), (72, 144)
    path = write_polygons(tmp_path / "g.geojson", ("sand", [box(-31, -40, 22, 35)]))
    labels = open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions())
    expected = burn(place, shape, (1, [box(0, -40, 22, 35), box(329, -40, 360, 35)]))
    assert np.array_equal(read_all(labels, shape), expected)
    # And the other way round: polygons of 0..360 in a scene of -180..180.
    place = place_at(4326, -180, 90, 2.5)
    path = write_polygons(tmp_path / "p.geojson", ("sand", [box(149, -40, 222, 35)]))
    labels = open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions())
    assert np.array_equal(
        read_all(labels, shape), burn(place, shape, (1, [box(149, -40, 180, 35), box(-180, -40, -138, 35)]))
    )


def test_polygons_in_metres_across_180_degrees_lie_in_a_scene_in_degrees(tmp_path: Path) -> None:
    place, shape = place_at(4326, 178, 1.5, 0.05), (60, 80)
    path = write_polygons(
        tmp_path / "utm.geojson", ("sand", [box(700_000, 1_000, 1_000_000, 90_000)]), crs="EPSG:32660"
    )
    labels = open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions())
    columns = np.flatnonzero((read_all(labels, shape) == 1).any(0))
    # From 178.8 to 181.5, without a gap.
    assert (columns[0], columns[-1]) == (16, 69)
    assert len(columns) == 54


@pytest.mark.parametrize("epsg", [3857, 3832, 32660])
def test_polygons_across_180_degrees_lie_in_projected_scenes(tmp_path: Path, epsg: int) -> None:
    steps = {3857: (20_037_508.342789244 - 222_000, 166_000), 3832: (3_117_000, 166_000), 32660: (611_000, 166_000)}
    west, north = steps[epsg]
    place, shape = place_at(epsg, west, north, 5_000), (66, 90)
    cut = write_polygons(tmp_path / "cut.geojson", ("sand", [*SPLIT]))
    whole = write_polygons(tmp_path / "whole.geojson", ("sand", [box(179.03, -0.87, 181.48, 0.91)]))
    found = [
        read_all(open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions()), shape) == 1
        for path in (cut, whole)
    ]
    columns = np.flatnonzero(found[0].any(0))
    assert len(columns) == columns[-1] - columns[0] + 1
    # 2.45 degrees of 111.3 km.
    assert abs(len(columns) * 5 - 2.45 * 111.3) < 11
    # Edges without points between their ends are straight lines in either projection.
    assert (found[0] != found[1]).mean() < 0.002


def test_polygons_of_minus_100_take_their_pixels_from_every_class(tmp_path: Path) -> None:
    place, shape = place_at(4326, 10, 1.5, 0.05), (60, 80)
    path = write_polygons(tmp_path / "p.geojson", ("1", [box(11, -1, 13, 1)]), ("-100", [box(12, 0, 13, 1)]))
    labels = open_labels(path, place, shape, of="scene", names=NAMES, options=LabelOptions())
    expected = burn(place, shape, (1, [box(11, -1, 13, 1)]), (UNLABELLED, [box(12, 0, 13, 1)]))
    assert np.array_equal(read_all(labels, shape), expected)
    assert "polygons of -100 are of no class" in labels.note


def test_bounds_across_180_degrees_choose_the_pixels_there() -> None:
    shape = (60, 80)
    for west in (178, -182):
        place = place_at(4326, west, 1.5, 0.05)
        for bounds in ((179.0, -1.0, -179.0, 1.0), (179.0, -1.0, 181.0, 1.0), (-181.0, -1.0, -179.0, 1.0)):
            assert window_of_bounds(place, bounds, shape) == Window(y=10, x=20, height=40, width=40)
    world = place_at(4326, -180, 90, 1)
    with pytest.raises(
        UsageError, match=r"must touch one end alone of the raster's -180,-90,180,90, got 179,-1,-179,1"
    ):
        window_of_bounds(world, (179.0, -1.0, -179.0, 1.0), (180, 360))
    assert window_of_bounds(world, (350.0, -1.0, 355.0, 1.0), (180, 360)) == Window(y=89, x=170, height=2, width=5)
    with pytest.raises(UsageError, match="west < east"):
        window_of_bounds(UTM, (500_000, 0, 400_000, 10), shape)


def test_a_turn_around_the_earth_is_known_where_it_is_a_way_along_x() -> None:
    assert turn_of(CRS.from_epsg(4326).to_wkt()) == pytest.approx(360, abs=1e-9)
    assert turn_of(CRS.from_epsg(3857).to_wkt()) == pytest.approx(2 * np.pi * 6_378_137, rel=1e-9)
    assert turn_of(CRS.from_epsg(3832).to_wkt()) == pytest.approx(2 * np.pi * 6_378_137, rel=1e-9)
    for epsg in (32660, 3995, 3035, 8857):
        assert turn_of(CRS.from_epsg(epsg).to_wkt()) is None
    assert turn_of(None) is None
    assert find_turns(place_at(4326, 178, 1, 0.1), -180, -178, (10, 40)) == [1]
    assert find_turns(place_at(4326, 178, 1, 0.1), 10, 20, (10, 40)) == []
