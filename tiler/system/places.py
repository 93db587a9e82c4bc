"""Places: folders and files of this machine, or of an object store by its URL, under one set of names."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from ..base.errors import RasterError, UsageError

if TYPE_CHECKING:
    pass

_GDAL_FOLDERS = {
    "s3": "/vsis3/",
    "gs": "/vsigs/",
    "az": "/vsiaz/",
    "http": "/vsicurl/http://",
    "https": "/vsicurl/https://",
}
"""GDAL's own file systems, by the scheme of a URL."""
OBJECT_STORES = ("s3", "gs", "az", "abfs")
"""Schemes of places that can be listed and written."""
STORE_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        # Others write beside us: what was listed a moment ago is no answer.
        "use_listings_cache": False,
        "config_kwargs": {
            "retries": {"max_attempts": 8, "mode": "standard"},
            "connect_timeout": 10,
            "read_timeout": 60,
        },
    }
}
"""Of fsspec's file systems."""


def scheme_of(name: str | os.PathLike[str]) -> str:
    """Of a URL; empty for a path, GDAL's own names too."""
    scheme, mark, _ = str(name).partition("://")
    return scheme.lower() if mark and scheme.isalnum() else ""


def is_path(value: object) -> bool:
    """Whether a value names a place: a string, a path, or universal-pathlib's object for a URL (no PathLike)."""
    return isinstance(value, str | os.PathLike) or any(
        kind.__module__.partition(".")[0] == "upath" for kind in type(value).__mro__
    )


def place_of(name: str | os.PathLike[str]) -> Path:
    """A path; for s3:// and other URLs an object with a path's methods.

    Raises:
        UsageError: the library for that kind of URL is not installed.
    """
    if "\0" in str(name):
        raise UsageError(f"no name of a file holds a zero byte, got {str(name)!r:.200}")
    scheme = scheme_of(name)
    if not scheme:
        return Path(name)
    try:
        from upath import UPath

        # Not a subclass of Path, but made to be used as one.
        return cast("Path", UPath(str(name), **STORE_OPTIONS.get(scheme, {})))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{scheme}:// needs what `pip install 'outsize[object-stores]'` brings, for {name}: {error}"
        ) from error


def require_lasting(place: Path) -> None:
    """Refuse a place that nothing outlasts, or that nothing can be written to, such as memory:// or https://.

    Raises:
        UsageError: names it, and what may be written to.
    """
    scheme = scheme_of(str(place)) if is_remote(place) else ""
    if scheme and scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in OBJECT_STORES)
        raise UsageError(f"outputs go to folders of this machine or to {known}; got {place}")


def is_remote(place: Path) -> bool:
    """Whether a place is in an object store."""
    return not isinstance(place, Path)


def gdal_name(name: str) -> str:
    """The name by which GDAL knows a URL; other names as they are."""
    scheme = scheme_of(name)
    folder = _GDAL_FOLDERS.get(scheme)
    return name if folder is None else folder + name.split("://", 1)[1]


_ARCHIVES = {"zip": "/vsizip/", "tar": "/vsitar/", "gzip": "/vsigzip/"}
"""GDAL's own file systems for what is packed, by the scheme of rasterio's names."""
_LISTED = 12


def archive_name(name: str) -> str:
    """GDAL's name for a file in an archive: of zip://A.zip!B.tif and zip+file://A.zip!/B.tif as rasterio has them, of
    zip://B.tif::A.zip as fsspec has it, and of A.zip itself if it holds one raster; other names as they are.

    Raises:
        RasterError: no such archive or file in it, or several rasters and none named.
    """
    scheme, mark, rest = name.partition("://")
    kind = scheme.lower().removesuffix("+file")
    if not mark:
        if not (name.lower().endswith(".zip") and not name.startswith("/vsi") and Path(name).is_file()):
            return name
        kind, rest = "zip", name
    if kind not in _ARCHIVES:
        return name
    inner, chained, archive = rest.partition("::")
    if not chained:
        archive, _, inner = rest.partition("!")
    archive, inner = archive.removeprefix("file://"), inner.strip("/")
    place = Path(archive)
    if not place.is_file():
        raise RasterError(f"no such archive: {archive or name}; write zip://ARCHIVE!FILE, such as zip://a.zip!b.tif")
    if kind == "zip":
        inner = _find_packed(place, inner)
    return f"{_ARCHIVES[kind]}{place.resolve()}{'/' if inner else ''}{inner}"


def _find_packed(archive: Path, inner: str) -> str:
    """The one file of a zip archive that is meant."""
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise RasterError(f"{archive} is no zip archive that can be read: {error}") from error
    if any(name.rpartition("/")[2] in ("zarr.json", ".zgroup", ".zarray") for name in names) and not inner:
        raise RasterError(f"{archive} holds a Zarr store, which is not read from archives; unpack it first")
    if inner in names:
        return inner
    shown = ", ".join(names[:_LISTED]) + (f", ... ({len(names)})" if len(names) > _LISTED else "")
    if inner:
        raise RasterError(f"{archive} holds no {inner}, it holds {shown or 'nothing'}")
    if len(names) != 1:
        such = f"zip://{archive}!{names[0]}" if names else f"zip://{archive}!FILE"
        raise RasterError(f"{archive} holds {shown or 'nothing'}; name one raster in it, such as {such}")
    return names[0]


def url_of(name: str) -> str:
    """The URL of one of GDAL's names for a bucket's object; empty for other names."""
    for scheme in ("s3", "gs", "az"):
        if name.startswith(_GDAL_FOLDERS[scheme]):
            return f"{scheme}://{name.removeprefix(_GDAL_FOLDERS[scheme])}"
    return ""


def is_far(name: str) -> bool:
    """Whether a raster's path, GDAL's names too, is reached through a network."""
    return bool(scheme_of(name)) or name.startswith(("/vsis3/", "/vsigs/", "/vsiaz/", "/vsicurl/"))


def set_gdal_options() -> None:
    """Tell GDAL what fsspec's libraries take from AWS_ENDPOINT_URL, and to try again; variables that are set stay."""
    options = {
        "GDAL_HTTP_MAX_RETRY": "8",
        "GDAL_HTTP_RETRY_DELAY": "0.5",
        "GDAL_HTTP_TIMEOUT": "60",
        "GDAL_HTTP_CONNECTTIMEOUT": "10",
        # An answer that was cut short would be kept, and read again for ever: now it goes with the open file.
        "CPL_VSIL_CURL_NON_CACHED": ":".join(("/vsis3/", "/vsigs/", "/vsiaz/", "/vsicurl/")),
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {
            "AWS_S3_ENDPOINT": parts.netloc,
            "AWS_HTTPS": "NO" if parts.scheme == "http" else "YES",
            "AWS_VIRTUAL_HOSTING": "FALSE",
        }
    for name, value in options.items():
        os.environ.setdefault(name, value)


def identify(place: Path) -> str:
    """Size and ETag, or time of change, of an object."""
    status = place.stat()
    info: Any = getattr(status, "info", {})
    return f"{place}:{status.st_size}:{info.get('ETag') or status.st_mtime}"
