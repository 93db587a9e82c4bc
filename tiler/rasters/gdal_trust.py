"""What GDAL may open without leave: formats that hold their own pixels, and VRTs of such files on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rasterio
from rasterio.env import ensure_env

from ..base.errors import RasterError
from ..system.files import MOST_TEXT, read_regular
from ..system.places import gdal_name, is_far, place_of, scheme_of, url_of

PLAIN_DRIVERS = re.findall(
    r"\w+",
    "AAIGrid ACE2 AIG AVIF BAG BIGGIF BMP BSB BT BYN COG CTable2 DTED ECW EHdr ENVI GIF GPKG GRASSASCIIGrid GRIB GS7BG "
    "GSAG GSBG GTiff GTX GXF HDF4 HDF4Image HDF5 HDF5Image HEIF HF2 HFA IRIS ISCE JP2ECW JP2KAK JP2Lura JP2MrSID "
    "JP2OpenJPEG JPEG JPEGLS JPEGXL KRO LCP LIBERTIFF Leveller MBTiles MrSID NITF NTv2 NWT_GRD PCRaster PNG PNM RIK "
    "RMF ROI_PAC RRASTER RST S102 S104 S111 SAGA SGI SIGDEM SNAP_TIFF SRTMHGT TGA Terragen USGSDEM WEBP XYZ ZMap "
    "netCDF",
)
"""Their files hold pixels, or have them in a file of the same name. Those of the others name files and addresses of
any kind, or are asked for over a network."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAGIC = (
    *_TIFF,
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",  # JPEG 2000
    b"\x89PNG",
    b"\xff\xd8\xff",  # JPEG
    b"EHFA_HEADER_TAG",  # ERDAS .img
    b"GRIB",
    b"GIF8",
    b"RIFF",  # WebP
)
"""How files begin that a VRT may name: GDAL takes any driver for them."""
_HEAD = 65_536
_MARK = b"<VRTDATASET"
_PCIDSK = b"PCIDSK"
_DEPTH = 8
_ARCHIVES = ("/vsizip", "/vsitar", "/vsigzip", "/vsi7z", "/vsirar")
_TAGS = frozenset(
    re.findall(
        r"\w+",
        "vrtdataset srs geotransform gcplist gcp vrtrasterband description unittype offset scale nodatavalue "
        "colorinterp colortable entry categorynames category hidenodatavalue histograms histitem histmin "
        "histmax bucketcount includeoutofrange approximate histcounts simplesource complexsource "
        "averagedsource nodatafrommasksource kernelfilteredsource sourcefilename sourceband sourceproperties "
        "srcrect dstrect scaleoffset scaleratio lut usemaskband nodata colortablecomponent exponent srcmin "
        "srcmax dstmin dstmax clamp openoptions ooi kernel size coefs maskband overviewlist overview "
        "resampling pixelfunctiontype pixelfunctionlanguage pixelfunctionarguments sourcetransfertype "
        "gdalrasterattributetable fielddefn name type usage row f masksource maskvaluethreshold nodatamask "
        "blockxsize blockysize",
    )
)
"""Of VRTs that are mosaics, stacks, parts or scalings of other files, in small letters."""
REMEDY = "if you trust where it comes from, --trust-sources (from Python: trust=True)"


def drivers_for(name: str, *, trust: bool) -> list[str] | None:
    """The drivers that GDAL may take for one of its names; None: all of them.

    Args:
        trust: the user trusts what the name stands for.

    Raises:
        RasterError: a file that names what may not be read without leave.
    """
    if trust:
        return None
    strange = {found for found in re.findall(r"/vsi[a-z0-9_]+", name) if not is_far(f"{found}/")} - {*_ARCHIVES}
    if strange:
        raise refuse(name, f"{min(strange)}/ reads from elsewhere than a file")
    if is_far(name):
        if not name.lower().endswith(".vrt"):
            return PLAIN_DRIVERS
        _require_plain_vrt(name, _read_far(name), 0)
        return ["VRT"]
    path = Path(name)
    if not path.is_file():
        return PLAIN_DRIVERS
    _require_plain_neighbours(path)
    if _is_vrt(path):
        _require_plain_vrt(name, _read(path), 0)
        return ["VRT"]
    if _read_head(path).startswith(_PCIDSK):
        # Left to the plain drivers, an unrelated header beside it would make another raster of its bytes.
        raise refuse(name, "a PCIDSK file may name other files")
    return PLAIN_DRIVERS


@ensure_env
def open_by(name: str, drivers: list[str]) -> rasterio.DatasetReader:
    """As rasterio.open, which takes one driver or all.

    Raises:
        RasterioError: none of the drivers opens it.
        RasterError: it says that its overviews are elsewhere, which GDAL believes as soon as it is asked for masks.
    """
    dataset = rasterio.DatasetReader(name, driver=drivers)
    if "OVERVIEWS" in dataset.tag_namespaces() and "OVERVIEW_FILE" in dataset.tags(ns="OVERVIEWS"):
        dataset.close()
        raise refuse(name, "its metadata name overviews elsewhere")
    return dataset


def explain_drivers(name: str, reason: str) -> str:
    """GDAL's reason why a name could not be opened by drivers that need no leave, and what more there is to do."""
    is_file = is_far(name) or Path(name).exists()
    if is_file and "not recognized as being in a supported file format" not in reason:
        return reason
    return f"{reason}; if it is of a format that names other files or addresses, and {REMEDY.removeprefix('if ')}"


def refuse(name: str, why: str) -> RasterError:
    """What is said of a name that is not opened."""
    return RasterError(f"{name} is not opened: {why}; {REMEDY}")


def _is_vrt(path: Path) -> bool:
    return path.suffix.lower() == ".vrt" or _MARK in _read_head(path).upper()


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, MOST_TEXT)
    except OSError as error:
        raise RasterError(f"{path} cannot be read: {error.strerror}") from error


def _read_far(name: str) -> bytes:
    url = url_of(name) or name.removeprefix("/vsicurl/")
    try:
        if not scheme_of(url):
            raise ValueError("its address cannot be told")
        return place_of(url).read_bytes()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refuse(name, f"what it names cannot be looked at first ({reason})") from error


def _require_plain_vrt(name: str, text: bytes, depth: int) -> None:
    """A VRT whose bands come from files that it may name."""
    if depth > _DEPTH:
        raise refuse(name, f"VRTs name VRTs more than {_DEPTH} deep")
    root = _parse(name, text)
    for element in root.iter():
        _require_known(name, element)
    for file in dict.fromkeys(_find_sources(name, root)):
        if is_far(file):
            # Of the same store as the VRT itself; those who can write there have the pixels in their hands.
            if file.lower().endswith(".vrt"):
                _require_plain_vrt(file, _read_far(file), depth + 1)
            continue
        path = Path(file)
        if not path.exists():
            continue  # GDAL says so
        if not path.is_file():
            raise refuse(name, f"it names {file}, which is no file")
        _require_plain_neighbours(path)
        if _is_vrt(path):
            _require_plain_vrt(file, _read(path), depth + 1)
        elif not _read_head(path).startswith(_MAGIC):
            raise refuse(name, f"it names {file}, which is no raster of a format that holds its own pixels")
        else:
            open_by(file, PLAIN_DRIVERS).close()


def _parse(name: str, text: bytes) -> ElementTree.Element:
    """Its XML. GDAL's parser is another, so that what the two may take for different things is refused."""
    told = re.match(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([^\"']*)", text)
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text or (told and told[1].lower() not in (b"utf-8", b"us-ascii")):
        raise refuse(name, "its XML is of an unusual kind")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise RasterError(f"{name} is not a VRT: {error}") from error
    for metadata in [element for element in root.iter() if _tag(element) == "metadata"]:
        if "OVERVIEW_FILE" in ElementTree.tostring(metadata, "unicode").upper():
            raise refuse(name, "it names a file of overviews")
        for child in list(metadata):
            metadata.remove(child)  # texts of any kind
    return root


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).lower()


def _attribute(element: ElementTree.Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.lower() == name), "")


def _require_known(name: str, element: ElementTree.Element) -> None:
    tag, kind = _tag(element), _attribute(element, "subclass").lower()
    if kind == "vrtrawrasterband":
        raise refuse(name, "its raw bands take the bytes of any file for pixels")
    if kind not in ("", "vrtsourcedrasterband", "vrtderivedrasterband"):
        raise refuse(name, f"what a {_attribute(element, 'subclass')} reads is not looked through")
    if tag == "pixelfunctionlanguage" and (element.text or "").strip().lower() not in ("", "c"):
        raise refuse(name, "its pixel function is code")
    if tag == "pixelfunctioncode":
        raise refuse(name, "its pixel function is code")
    if tag not in _TAGS and tag != "metadata":
        raise refuse(name, f"it has an element {str(element.tag)!r:.60}, which is not looked through")


def _find_sources(name: str, root: ElementTree.Element) -> Iterator[str]:
    """The files that a VRT names, as GDAL would find them."""
    for element in root.iter():
        if _tag(element) != "sourcefilename":
            continue
        said, relative = (element.text or "").strip(), _attribute(element, "relativetovrt") or "0"
        if len(element) or relative not in ("0", "1"):
            raise refuse(name, "one of its file names is of an unusual kind")
        if relative == "1" and not said.startswith("/"):
            said = f"{name.rpartition('/')[0]}/{said}" if is_far(name) else str(Path(name).resolve().parent / said)
        if is_far(name) and _store_of(said) == _store_of(name) and ".." not in said:
            yield said
        elif said.startswith("/vsi") or scheme_of(said):
            raise refuse(name, f"it names {said:.200}, which is no file of this machine{_or_of_its_store(name)}")
        elif is_far(name):
            raise refuse(name, f"it names {said:.200}, which is no file of its own store")
        elif "<" in said or re.match(r"[A-Za-z0-9_]+:", said):
            raise refuse(name, f"it names {said:.200}, which is more than a file")
        else:
            yield said


def _or_of_its_store(name: str) -> str:
    return " or of its own store" if is_far(name) else ""


def _store_of(name: str) -> str:
    """The bucket or host of one of GDAL's names: of /vsis3/b/k.tif, /vsis3/b."""
    name = gdal_name(name)
    if name.startswith("/vsicurl/"):
        return "/".join(name.split("/")[:5])
    return "/".join(name.split("/")[:3]) if is_far(name) else ""


def _require_plain_neighbours(path: Path) -> None:
    """What GDAL looks for beside a file: a mask and overviews, which it would open with any driver, and metadata, which
    may name overviews elsewhere."""
    for suffix in (".msk", ".MSK", ".ovr", ".OVR", ".msk.ovr"):
        beside = path.with_name(path.name + suffix)
        if beside.is_file() and not _read_head(beside).startswith(_TIFF):
            raise refuse(str(path), f"{beside.name} beside it is no TIFF")
    metadata = path.with_name(f"{path.name}.aux.xml")
    if metadata.is_file():
        for value in re.findall(rb"OVERVIEW_FILE[^>]*>([^<]*)", _read(metadata), re.IGNORECASE):
            if not value.startswith(b":::BASE:::") or b"/" in value:
                raise refuse(str(path), f"{metadata.name} beside it names overviews elsewhere")


_VECTORS = {
    ".shp": b"\0\0\x27\x0a",
    ".gpkg": b"SQLite format 3\0",
    ".fgb": b"fgb",
}
"""How files of features begin, by their suffix."""
_ROOTS = {".kml": ("kml",), ".gml": ("featurecollection",)}
"""What the outermost element of files of features in XML is called, in small letters and without its namespace."""


def require_plain_features(path: str) -> None:
    """Refuse a file of features that is another format than its name says: some of those name other files, databases
    and addresses.

    Raises:
        RasterError: as said.
    """
    suffix, head = Path(path).suffix.lower(), _read_head(Path(path))
    if suffix in _VECTORS and not head.startswith(_VECTORS[suffix]):
        raise refuse(path, f"it is no {suffix} by what stands in it")
    if suffix in _ROOTS and _root_of(head) not in _ROOTS[suffix]:
        raise refuse(path, f"it is no {suffix} by what stands in it")


def _root_of(head: bytes) -> str:
    """Name of the outermost element of an XML file, by its beginning."""
    parser = ElementTree.XMLPullParser(events=("start",))
    try:
        parser.feed(head)
        event: Any = next(iter(parser.read_events()))
    except (ElementTree.ParseError, ValueError, StopIteration):
        return ""
    return _tag(event[1]).rpartition("}")[2]
