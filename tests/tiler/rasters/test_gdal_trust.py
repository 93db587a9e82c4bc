"""Files that name other files, addresses or code are not followed without leave; ordinary ones need none."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from distributed import Client
from outsize.tests.support.commands import outsize_here
from outsize.tiler.base.errors import TilerError
from outsize.tiler.base.geometry import Window
from outsize.tiler.labels.labels import LabelOptions, open_labels
from outsize.tiler.labels.vectors import read_features
from outsize.tiler.rasters.bands import select_bands
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.rasters.parts import open_reference, open_stack, reference_to
from outsize.tiler.rasters.raster import Raster
from outsize.tiler.runs.run import predict
from torch import Tensor, nn

from ...support.rasters import missing_of, unique_pixels, write_geotiff

IMAGE = unique_pixels(1, 20, 20, np.uint8)
SECRET = "root:x:0:0:a line of somebody's file of secrets, long enough for some pixels" * 8


class Listener:
    """A server on this machine, and what it was asked for."""

    def __init__(self) -> None:
        asked = self.asked = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a raster of one band, and a file of secrets."""
    write_geotiff(tmp_path / "a.tif", IMAGE)
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vrt(inside: str, attributes: str = "", after: str = "") -> str:
    return (
        f'<VRTDataset rasterXSize="20" rasterYSize="20"><VRTRasterBand dataType="Byte" band="1"{attributes}>'
        f"{inside}</VRTRasterBand>{after}</VRTDataset>"
    )


def of(name: str | Path, relative: int = 1, more: str = "") -> str:
    return (
        f'<SimpleSource><SourceFilename relativeToVRT="{relative}">{name}</SourceFilename><SourceBand>1</SourceBand>'
        f"{more}</SimpleSource>"
    )


RAW = (
    '<SourceFilename relativeToVRT="1">secret</SourceFilename><ImageOffset>0</ImageOffset>'
    "<PixelOffset>1</PixelOffset><LineOffset>20</LineOffset>"
)
RAW_BAND = ' subClass="VRTRawRasterBand"'
WMS = (
    '<GDAL_WMS><Service name="TMS"><ServerUrl>{url}/wms</ServerUrl></Service><DataWindow><UpperLeftX>0</UpperLeftX>'
    "<UpperLeftY>20</UpperLeftY><LowerRightX>20</LowerRightX><LowerRightY>0</LowerRightY><SizeX>20</SizeX>"
    "<SizeY>20</SizeY><TileLevel>0</TileLevel></DataWindow><BlockSizeX>20</BlockSizeX><BlockSizeY>20</BlockSizeY>"
    "<BandsCount>1</BandsCount></GDAL_WMS>"
)
CODE = "<PixelFunctionType>f</PixelFunctionType><PixelFunctionLanguage>Python</PixelFunctionLanguage>"
WARPED = (
    '<VRTDataset rasterXSize="20" rasterYSize="20" subClass="VRTWarpedDataset"><GDALWarpOptions>'
    "<SourceDataset>{far}</SourceDataset></GDALWarpOptions></VRTDataset>"
)
STAC = {"type": "Feature", "stac_version": "1.0.0", "assets": {"a": {"href": "{url}/s.tif"}}}

HOSTILE: dict[str, tuple[str, str, str]] = {
    # what: (name, content; {url} of the listener, {far} GDAL's name for it), words of the refusal
    "raw bands": ("m.vrt", vrt(RAW, RAW_BAND), "raw bands take the bytes of any file"),
    "raw bands by another name": ("m.tif", vrt(RAW, RAW_BAND), "raw bands take the bytes of any file"),
    "raw bands in small letters": ("m.vrt", vrt(RAW, RAW_BAND.lower()), "raw bands take the bytes of any file"),
    "raw bands by an element": ("m.vrt", vrt(f"<subClass>VRTRawRasterBand</subClass>{RAW}"), "an element 'subClass'"),
    "a raw mask": (
        "m.vrt",
        vrt(of("a.tif"), "", f'<MaskBand><VRTRasterBand dataType="Byte"{RAW_BAND}>{RAW}</VRTRasterBand></MaskBand>'),
        "raw bands take the bytes of any file",
    ),
    "no raster": ("m.vrt", vrt(of("secret")), "names .*secret, which is no raster of a format"),
    "an address": ("m.vrt", vrt(of("{far}", 0)), "names /vsicurl/.*, which is no file of this machine"),
    "an address among blanks": ("m.vrt", vrt(of("\n {far}\n", 0)), "which is no file of this machine"),
    "a URL": ("m.vrt", vrt(of("{url}/x.tif", 0)), "which is no file of this machine"),
    "an address in GDAL's words": ("m.vrt", vrt(of("GTIFF_DIR:1:{far}", 0)), "which is more than a file"),
    "an address of overviews": (
        "m.vrt",
        vrt(of("a.tif") + "<Overview><SourceFilename>{far}</SourceFilename></Overview>"),
        "which is no file of this machine",
    ),
    "an address in metadata": (
        "m.vrt",
        vrt(of("a.tif"), "", '<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{far}</MDI></Metadata>'),
        "it names a file of overviews",
    ),
    "itself": ("m.vrt", vrt(of("m.vrt")), "VRTs name VRTs more than 8 deep"),
    "code": ("m.vrt", vrt(CODE + of("a.tif"), ' subClass="VRTDerivedRasterBand"'), "its pixel function is code"),
    "a warp": ("m.vrt", WARPED, "what a VRTWarpedDataset reads is not looked through"),
    "entities": ("m.vrt", f"<!DOCTYPE a [<!ENTITY b 'c'>]>{vrt(of('a.tif'))}", "XML is of an unusual kind"),
    "another alphabet": ("m.vrt", f'<?xml version="1.0" encoding="cp037"?>{vrt(of("a.tif"))}', "of an unusual kind"),
    "tiles of a server": ("m.xml", WMS, "--trust-sources"),
    "tiles of a server by another name": ("m.tif", WMS, "--trust-sources"),
    "an item": ("m.json", json.dumps(STAC), "--trust-sources"),
}


def read(raster: Raster) -> np.ndarray:
    window = Window.whole(raster.shape_yx)
    reader = raster.open_reader()
    image = reader.read(window)
    reader.read_missing(window, image)
    return image


@pytest.mark.parametrize("what", HOSTILE)
def test_what_reaches_for_other_places_is_refused_and_asks_nobody(folder: Path, listener: Listener, what: str) -> None:
    name, content, words = HOSTILE[what]
    far = f"/vsicurl/{listener.url}/x.tif"
    (folder / name).write_text(content.replace("{url}", listener.url).replace("{far}", far))
    (folder / "around.vrt").write_text(vrt(of(name)))
    listener.asked.clear()
    for source in (name, "around.vrt"):
        with pytest.raises(TilerError, match=words if source == name else "--trust-sources") as refusal:
            read(open_raster(source))
        assert "\n" not in str(refusal.value)
        assert "--trust-sources" in str(refusal.value)
    assert not listener.asked


def test_a_raw_band_is_read_with_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "m.vrt").write_text(vrt(RAW, RAW_BAND))
    raster = open_raster("m.vrt", trust=True)
    assert bytes(read(raster).ravel()) == SECRET.encode()[:400]
    assert read(select_bands(raster, (1, 1))).shape[0] == 2  # opened anew, with the same leave
    # Leave is this call's: what is kept of a raster does not give it.
    reference = reference_to(raster)
    assert "trust" not in reference["options"]
    for options in (reference["options"], {**reference["options"], "trust": True}):
        with pytest.raises(TilerError, match="raw bands"):
            open_reference({**reference, "options": options})
    assert open_reference(reference, trust=True).identity == raster.identity
    with pytest.raises(TilerError, match="raw bands"):
        open_stack(["a.tif", "m.vrt"])
    refused = outsize_here("ingest", "m.vrt", "o.zarr")
    assert (refused.returncode, "--trust-sources" in refused.stderr) == (1, True)
    assert not (folder / "o.zarr").exists()
    assert outsize_here("ingest", "m.vrt", "o.zarr", "--trust-sources").returncode == 0
    monkeypatch.setenv("OUTSIZE_TRUST_SOURCES", "1")
    assert outsize_here("ingest", "m.vrt", "o.zarr", "--overwrite").returncode == 0


class AsFloats(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_pictures_of_what_was_read_with_leave_need_it_too(folder: Path, client: Client) -> None:
    placed = "<GeoTransform>0, 1, 0, 20, 0, -1</GeoTransform>"
    (folder / "m.vrt").write_text(vrt(RAW, RAW_BAND, placed))
    network = AsFloats(1, 2, 1)
    predict(open_raster("m.vrt", trust=True), network, "o.zarr", client=client, engine="torch")
    for words in (("export", "o.zarr", "o.png"), ("report", "o.zarr", "o.html")):
        shown = outsize_here(*words)
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"quicklook without the input: .*m.vrt is not opened: .*--trust-sources", shown.stderr)
        assert "quicklook without" not in outsize_here(*words, "--overwrite", "--trust-sources").stderr


def tag(folder: Path, listener: Listener) -> None:
    with rasterio.open(folder / "a.tif", "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{listener.url}/o.ovr")


def metadata(folder: Path, listener: Listener) -> None:
    (folder / "a.tif.aux.xml").write_text(
        f'<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">/vsicurl/{listener.url}/o.ovr</MDI>'
        "</Metadata></PAMDataset>"
    )


BESIDE: dict[str, Callable[[Path, Listener], object]] = {
    "a mask that is a VRT": lambda folder, _: (folder / "a.tif.msk").write_text(vrt(RAW, RAW_BAND)),
    "overviews that are a VRT": lambda folder, _: (folder / "a.tif.ovr").write_text(vrt(RAW, RAW_BAND)),
    "metadata that name overviews": metadata,
    "a tag that names overviews": tag,
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_a_raster_is_not_followed_elsewhere(folder: Path, listener: Listener, what: str) -> None:
    BESIDE[what](folder, listener)
    (folder / "around.vrt").write_text(vrt(of("a.tif")))
    listener.asked.clear()
    for source in ("a.tif", "around.vrt"):
        with pytest.raises(TilerError, match=r"a.tif is not opened: .*--trust-sources"):
            read(open_raster(source))
    assert not listener.asked


@pytest.mark.parametrize(
    "name",
    [
        "/vsistdin/",
        "/vsicurl_streaming/{url}/x.tif",
        "/vsisubfile/0_100,secret",
        "/vsizip//vsistdin/",
        "WMTS:{url}/w",
        "DERIVED_SUBDATASET:AMPLITUDE:a.tif",
        "STACIT:secret:asset=a",
        "WMS:{url}/w",
    ],
)
def test_names_that_are_more_than_a_file_are_refused_and_ask_nobody(
    folder: Path, listener: Listener, name: str
) -> None:
    del folder
    listener.asked.clear()
    with pytest.raises(TilerError, match="--trust-sources"):
        open_raster(name.replace("{url}", listener.url))
    assert not listener.asked


def test_pipes_and_devices_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "p.tif")
    for name in ("p.tif", "/dev/zero"):
        with pytest.raises(TilerError, match="is no file, but a pipe, a device or a socket"):
            open_raster(name)
    (folder / "m.vrt").write_text(vrt(of("p.tif")))
    with pytest.raises(TilerError, match=r"names .*p.tif, which is no file"):
        open_raster("m.vrt")


def test_ordinary_mosaics_need_no_leave(folder: Path) -> None:
    """Relative and absolute, scaled, in each other, with masks and metadata, by links and from other folders."""
    (folder / "below").mkdir()
    whole = folder / "below/whole.tif"
    write_geotiff(whole, IMAGE)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(whole, "r+") as file:
        file.write_mask(IMAGE[0] > 7)
    rasterio.shutil.copy("a.tif", "copied.vrt", driver="VRT")
    scaled = of("a.tif").replace("SimpleSource", "ComplexSource").replace("</Com", "<ScaleRatio>1</ScaleRatio></Com")
    sizes = '<SrcRect xOff="0" yOff="0" xSize="20" ySize="20"/><DstRect xOff="0" yOff="0" xSize="20" ySize="20"/>'
    notes = '<Metadata><MDI key="seen">http://example.org</MDI></Metadata>'
    written = {
        "relative.vrt": vrt(notes + of("a.tif", 1, sizes), "", "<SRS>EPSG:32633</SRS>"),
        "absolute.vrt": vrt(of(folder / "a.tif", 0)),
        "from here.vrt": vrt(of("a.tif", 0)),
        "up.vrt": vrt(of("below/../a.tif")),
        "nested.vrt": vrt(of("relative.vrt")),
        "scaled.vrt": vrt(scaled),
        "below/above.vrt": vrt(of("../a.tif")),
    }
    for name, text in written.items():
        (folder / name).write_text(text)
    Path("link.vrt").symlink_to("below/above.vrt")
    Path("named.vrt").write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{written["relative.vrt"]}')
    for name in (*written, "copied.vrt", "link.vrt", "named.vrt"):
        assert np.array_equal(read(open_raster(name)), IMAGE), name
    masked = f'{of("whole.tif")}</VRTRasterBand><MaskBand><VRTRasterBand dataType="Byte">'
    masked += of("whole.tif").replace("<SourceBand>1", "<SourceBand>mask,1")
    (folder / "below/masked.vrt").write_text(vrt(masked).replace("</VRTDataset>", "</MaskBand></VRTDataset>"))
    assert np.array_equal(missing_of(open_raster("below/masked.vrt")), IMAGE[0] <= 7)


def test_a_mosaic_of_a_missing_file_says_which(folder: Path) -> None:
    (folder / "m.vrt").write_text(vrt(of("nothing.tif")))
    with pytest.raises(TilerError, match=r"nothing.tif"):
        read(open_raster("m.vrt"))


# Labels


def test_files_of_features_that_are_something_else_are_refused(folder: Path, listener: Listener) -> None:
    pytest.importorskip("pyogrio")
    features = {"type": "FeatureCollection", "features": []}
    (folder / "f.geojson").write_text(json.dumps(features))
    source = (
        '<OGRVRTDataSource><OGRVRTLayer name="a"><SrcDataSource>{}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>'
    )
    listener.asked.clear()
    for suffix in (".gpkg", ".shp", ".fgb", ".kml", ".gml"):
        for place in ("f.geojson", f"/vsicurl/{listener.url}/f.geojson"):
            path = folder / f"labels{suffix}"
            path.write_text(source.format(place))
            with pytest.raises(TilerError, match=f"it is no {suffix} by what stands in it; .*--trust-sources"):
                read_features(str(path))
    assert not listener.asked
    os.mkfifo(folder / "p.geojson")
    with pytest.raises(TilerError, match="is no file"):
        read_features("p.geojson")


def test_features_in_gml_fetch_no_schema(folder: Path, listener: Listener) -> None:
    pytest.importorskip("pyogrio")
    (folder / "a.gml").write_text(
        '<?xml version="1.0"?><ogr:FeatureCollection xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        f'xsi:schemaLocation="http://ogr.maptools.org/ {listener.url}/a.xsd" xmlns:ogr="http://ogr.maptools.org/" '
        'xmlns:gml="http://www.opengis.net/gml"><gml:featureMember><ogr:a fid="1"><ogr:geometryProperty><gml:Polygon '
        'srsName="EPSG:4326"><gml:outerBoundaryIs><gml:LinearRing><gml:coordinates>0,0 0,1 1,1 0,0</gml:coordinates>'
        "</gml:LinearRing></gml:outerBoundaryIs></gml:Polygon></ogr:geometryProperty><ogr:cover>water</ogr:cover></ogr:a>"
        "</gml:featureMember></ogr:FeatureCollection>"
    )
    listener.asked.clear()
    assert read_features("a.gml", "cover").values == ("water",)
    assert not listener.asked


def test_labels_in_a_raw_band_need_leave(folder: Path) -> None:
    (folder / "m.vrt").write_text(vrt(RAW, RAW_BAND))
    raster = open_raster("a.tif")
    said = {"of": "a.tif", "names": ("a", "b")}
    with pytest.raises(TilerError, match="raw bands"):
        open_labels("m.vrt", raster.place, raster.shape_yx, **said, options=LabelOptions())
    assert open_labels("m.vrt", raster.place, raster.shape_yx, **said, options=LabelOptions(trust=True)).path == "m.vrt"


def test_a_header_beside_a_file_of_another_format_makes_no_raster_of_it(tmp_path: Path) -> None:
    image = np.arange(1, 101, dtype=np.uint8).reshape(1, 10, 10)
    for driver, name in (("ENVI", "e.img"), ("PCIDSK", "e.pix")):
        settings = {"driver": driver, "count": 1, "height": 10, "width": 10, "dtype": "uint8"}
        with rasterio.open(tmp_path / name, "w", transform=rasterio.Affine(2, 0, 5, 0, -2, 9), **settings) as file:
            file.write(image)
    assert (tmp_path / "e.hdr").is_file()
    with pytest.raises(TilerError, match=r"PCIDSK file may name other files.*--trust-sources"):
        open_raster(tmp_path / "e.pix")
    assert np.array_equal(read(open_raster(tmp_path / "e.img")), image)
    assert np.array_equal(read(open_raster(tmp_path / "e.pix", trust=True)), image)
