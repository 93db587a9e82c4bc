"""Labels: polygons burnt by windows equal the whole, values become classes, what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from outsize.tiler.base.errors import RasterError, UsageError
from outsize.tiler.base.geometry import Grid, Window
from outsize.tiler.labels.labels import UNLABELLED, LabelOptions, Labels, open_labels
from outsize.tiler.labels.vectors import read_features
from outsize.tiler.rasters.georeference import Georeference, from_rasterio
from outsize.tiler.rasters.opening import open_raster
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from ...support.rasters import write_geotiff

SHAPE = (1301, 1117)
UTM = from_rasterio(CRS.from_epsg(32618), Affine(10, 0, 346_000, 0, -10, 3_842_000))
NAMES = ("water", "sand", "forest")


def polygons(count: int, place: Georeference, seed: int = 0, *, diagonals: bool = False) -> list[dict[str, Any]]:
    """Rings around random centres, some larger than a block, a few beyond the raster; and rectangles on pixel edges.
    With `diagonals` also edges through pixel centres, where rounding decides."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        y, x = rng.uniform(-20, SHAPE[0]), rng.uniform(-20, SHAPE[1])
        angles = np.sort(rng.uniform(0, 2 * np.pi, 11))
        radii = rng.uniform(5, 300, 11)
        ring = [(y + r * np.sin(a), x + r * np.cos(a)) for a, r in zip(angles, radii, strict=True)]
        found.append([*ring, ring[0]])
    for _ in range(count):
        y, x = (int(v) for v in rng.integers(0, 1000, 2))
        height, width = (int(v) for v in rng.integers(1, 90, 2))
        found.append([(y, x), (y, x + width), (y + height, x + width), (y + height, x), (y, x)])
        if diagonals:
            found.append([(y + 0.5, x + 0.5), (y + 60.5, x + 60.5), (y + 60.5, x + 0.5), (y + 0.5, x + 0.5)])
    return [
        {"type": "Polygon", "coordinates": [[place.position_of(row, column) for row, column in ring]]} for ring in found
    ]


def write_geojson(path: Path, geometries: list[dict[str, Any]], values: list[Any], crs: str | None) -> Path:
    content: dict[str, Any] = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "properties": {"cover": value, "id": index}, "geometry": geometry}
            for index, (geometry, value) in enumerate(zip(geometries, values, strict=True))
        ],
    }
    if crs:
        content["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(content))
    return path


def read_by_windows(labels: Labels, cell: tuple[int, int]) -> np.ndarray:
    found = np.empty(SHAPE, np.uint16)
    reader = labels.open_reader()
    grid = Grid(shape=SHAPE, cell=cell)
    for at in grid:
        window = grid.window(*at)
        found[window.slices()] = reader.read(window)
    reader.close()
    return found


def test_polygons_read_by_any_windows_equal_the_whole_raster_burnt_at_once(tmp_path: Path) -> None:
    geometries = polygons(23, UTM)
    values = [NAMES[index % 3] for index in range(len(geometries))]
    path = write_geojson(tmp_path / "labels.geojson", geometries, values, "EPSG:32618")
    labels = open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions(field="cover"))
    whole = rasterize(
        [(geometry, index % 3) for index, geometry in enumerate(geometries)],
        out_shape=SHAPE,
        fill=UNLABELLED,
        transform=UTM.affine,
        dtype="uint16",
    )
    assert len(np.unique(whole)) == 4
    for cell in ((211, 97), (512, 512), (1301, 1117)):
        assert np.array_equal(read_by_windows(labels, cell), whole)


def test_a_pixel_whose_centre_lies_on_an_edge_has_one_class_in_all_windows(tmp_path: Path) -> None:
    geometries = polygons(17, UTM, seed=1, diagonals=True)
    path = write_geojson(tmp_path / "labels.geojson", geometries, [NAMES[i % 3] for i in range(51)], "EPSG:32618")
    labels = open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions(field="cover"))
    first = read_by_windows(labels, (211, 97))
    for cell in ((512, 512), (1301, 1117), (509, 1000)):
        assert np.array_equal(read_by_windows(labels, cell), first)


def test_polygons_of_another_crs_are_projected(tmp_path: Path) -> None:
    geometries = polygons(11, UTM, seed=3)
    values = [index % 3 for index in range(len(geometries))]
    metres = write_geojson(tmp_path / "metres.geojson", geometries, values, "EPSG:32618")
    degrees = write_geojson(
        tmp_path / "degrees.geojson",
        [transform_geom("EPSG:32618", "EPSG:4326", geometry) for geometry in geometries],
        values,
        None,
    )
    options = LabelOptions(field="cover")
    one, other = (
        read_by_windows(open_labels(str(p), UTM, SHAPE, of="scene", names=NAMES, options=options), (512, 512))
        for p in (metres, degrees)
    )
    assert (one != UNLABELLED).mean() > 0.1
    assert (one != other).mean() < 1e-3


def test_values_of_polygons_become_the_classes_that_are_asked_for(tmp_path: Path) -> None:
    square = {
        "type": "Polygon",
        "coordinates": [[UTM.position_of(*at) for at in ((2, 3), (2, 9), (8, 9), (8, 3), (2, 3))]],
    }
    path = write_geojson(tmp_path / "labels.geojson", [square], [2253.0], "EPSG:32618")
    options = LabelOptions(field="cover", values=("2360", "2253", "6201"))
    labels = open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=options)
    found = labels.open_reader().read(Window(y=0, x=0, height=11, width=13))
    expected = np.full((11, 13), UNLABELLED)
    expected[2:8, 3:9] = 1
    assert np.array_equal(found, expected)
    with pytest.raises(RasterError, match="cover must be one of water, sand, forest, got 2253"):
        open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions(field="cover"))
    with pytest.raises(UsageError, match=r"has 2 fields; name the one .* --label-field: cover, id"):
        open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions())
    with pytest.raises(UsageError, match="has no field kind"):
        open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions(field="kind"))
    far = Georeference(crs_wkt=UTM.crs_wkt, transform=(10, 0, 900_000, 0, -10, 3_842_000))
    with pytest.raises(RasterError, match="all polygons lie outside of scene"):
        open_labels(str(path), far, SHAPE, of="scene", names=NAMES, options=options)
    with pytest.raises(RasterError, match="a raster that says where it lies"):
        open_labels(str(path), Georeference(), SHAPE, of="scene", names=NAMES, options=options)


def test_holes_and_parts_of_polygons_stay_unlabelled(tmp_path: Path) -> None:
    def ring(top: int, left: int, side: int) -> list[tuple[float, float]]:
        corners = ((0, 0), (0, side), (side, side), (side, 0), (0, 0))
        return [UTM.position_of(top + y, left + x) for y, x in corners]

    shape = {"type": "MultiPolygon", "coordinates": [[ring(1, 1, 20), ring(5, 5, 7)], [ring(40, 30, 3)]]}
    path = write_geojson(tmp_path / "labels.geojson", [shape], ["sand"], "EPSG:32618")
    labels = open_labels(str(path), UTM, SHAPE, of="scene", names=NAMES, options=LabelOptions(field="cover"))
    found = labels.open_reader().read(Window(y=0, x=0, height=50, width=50))
    expected = np.full((50, 50), UNLABELLED)
    expected[1:21, 1:21] = 1
    expected[5:12, 5:12] = UNLABELLED
    expected[40:43, 30:33] = 1
    assert np.array_equal(found, expected)


def write_tiff(path: Path, values: np.ndarray, place: Georeference = UTM, nodata: float | None = None) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1, dtype=values.dtype,
        crs=place.crs, transform=place.affine, nodata=nodata,
    ) as dataset:  # fmt: skip
        dataset.write(values, 1)
    return path


def test_labels_in_a_raster_are_mapped_to_classes_and_their_nodata_is_unlabelled(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).choice(np.array([0, 3, 5, 9], np.int16), (41, 53))
    path = write_tiff(tmp_path / "labels.tif", stored, nodata=0)
    options = LabelOptions(values=("5", "9", "3"))
    labels = open_labels(str(path), UTM, (41, 53), of="scene", names=NAMES, options=options)
    found = labels.open_reader().read(Window(y=7, x=11, height=30, width=29))
    part = stored[7:37, 11:40]
    for value, number in ((0, UNLABELLED), (5, 0), (9, 1), (3, 2)):
        assert (found[part == value] == number).all()
    other = open_labels(
        str(path), UTM, (41, 53), of="scene", names=NAMES[:2], options=LabelOptions(values=("5", "9"), nodata=(0, 3))
    )
    assert set(np.unique(other.open_reader().read(Window(y=0, x=0, height=41, width=53)))) == {0, 1, UNLABELLED}


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4, (41, 53)).astype(np.uint8)
    path = str(write_tiff(tmp_path / "labels.tif", stored))
    labels = open_labels(path, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions())
    with pytest.raises(UsageError, match=r"labels must be 0\.\.2, got 3 in window"):
        labels.open_reader().read(Window(y=0, x=0, height=41, width=53))
    with pytest.raises(UsageError, match=r"on the grid of scene, 41 x 52, got one band of 41 x 53 .*where they lie"):
        open_labels(path, Georeference(), (41, 52), of="scene", names=NAMES, options=LabelOptions())
    between = Georeference(crs_wkt=UTM.crs_wkt, transform=(10, 0, 346_005, 0, -10, 3_842_000))
    for grid in (between, Georeference(crs_wkt=UTM.crs_wkt, transform=(20, 0, 346_000, 0, -20, 3_842_000))):
        with pytest.raises(UsageError, match="must lie on the grid of scene"):
            open_labels(path, grid, (41, 53), of="scene", names=NAMES, options=LabelOptions())
    with pytest.raises(UsageError, match=r"must lie over scene: .*, beside it"):
        open_labels(path, UTM.moved(41, 0), (41, 53), of="scene", names=NAMES, options=LabelOptions())
    two = write_geotiff(tmp_path / "two.tif", np.stack([stored, stored]))
    with pytest.raises(UsageError, match="must be one band on the grid of scene, got 2 bands"):
        open_labels(str(two), UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions())
    with pytest.raises(UsageError, match="as many as the 3 classes"):
        open_labels(path, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions(values=("1", "2")))
    with pytest.raises(UsageError, match="must differ"):
        open_labels(path, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions(values=("1", "2", "1")))
    floats = str(write_tiff(tmp_path / "floats.tif", stored.astype(np.float32)))
    with pytest.raises(UsageError, match="must be whole numbers"):
        open_labels(floats, UTM, (41, 53), of="scene", names=NAMES, options=LabelOptions())


def test_a_shapefile_with_latin1_names_is_read(tmp_path: Path) -> None:
    write = pytest.importorskip("pyogrio.raw", reason="the extra vectors is not installed").write
    import shapely

    square = shapely.box(*UTM.position_of(8, 3), *UTM.position_of(2, 9))
    write(
        str(tmp_path / "labels.shp"),
        geometry=np.array([shapely.to_wkb(square)], object),
        field_data=[np.array(["Gewässer"], object)],
        fields=["art"],
        geometry_type="Polygon",
        crs="EPSG:32618",
        encoding="latin1",
    )
    (tmp_path / "labels.cpg").unlink(missing_ok=True)
    features = read_features(str(tmp_path / "labels.shp"), encoding="latin1")
    assert features.values == ("Gewässer",)
    options = LabelOptions(encoding="latin1")
    labels = open_labels(str(tmp_path / "labels.shp"), UTM, SHAPE, of="scene", names=("Gewässer",), options=options)
    assert (labels.open_reader().read(Window(y=2, x=3, height=6, width=6)) == 0).all()


def test_real_polygons_with_latin1_attributes_fall_on_their_scene(shared_dir: Path) -> None:
    pytest.importorskip("pyogrio", reason="the extra vectors is not installed")
    folder = shared_dir / "data/sentinel2_rachel_carson"
    scene = open_raster(next(folder.glob("*B04.tif")))
    names = ("Sand", "WetSand", "Emergent Wetland", "Forested Wetland", "Herbaceous", "Subtidal Haline")
    labels = open_labels(
        str(folder / "rcr_landcover.shp"), scene.place, scene.shape_yx, of=scene.path, names=names,
        options=LabelOptions(field="Classname", encoding="latin1"),
    )  # fmt: skip
    found = labels.open_reader().read(Window.whole(scene.shape_yx))
    counts = np.bincount(found.ravel(), minlength=256)
    assert (counts[:6] > 0).all()
    assert 500 < counts[:6].sum() < 700


def test_geojson_that_is_none_and_files_without_polygons_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.geojson"
    broken.write_text('{"type": "FeatureCollection"')
    with pytest.raises(RasterError, match="no GeoJSON"):
        read_features(str(broken), "cover")
    point = {"type": "Point", "coordinates": [0, 0]}
    path = write_geojson(tmp_path / "points.geojson", [point], ["sand"], None)
    with pytest.raises(RasterError, match="must hold polygons with a value of cover, got Point"):
        read_features(str(path), "cover")
    with pytest.raises(RasterError, match="no such vector file"):
        read_features(str(tmp_path / "nothing.geojson"))
