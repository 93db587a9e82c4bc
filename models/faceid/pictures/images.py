"""Pictures of faces: a folder for each person, crops of one size, read as red, green and blue."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ....tiler.base.errors import TilerError, UsageError
from ....tiler.base.text import reason_of
from ....tiler.system.plain_file import open_plain
from ..base.name_list import compose

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
SHAPE_TOLERANCE = 0.02
"""By which a resized picture's ratio of height to width may differ from the embedder's."""
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")


class ImageError(TilerError):
    """A picture that cannot be used; carries what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleFolder:
    """Pictures by person."""

    people: dict[str, list[Path]]
    """In the order of names, which are composed (`name_list.compose`): folders that differ in nothing else are one
    person's; pictures too."""
    empty: list[str]
    """Folders without a picture."""
    stray: list[Path]
    """Files that are in no person's folder, or are no pictures by their name."""


def is_picture(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in FORMATS and not path.name.startswith(".")


def find_people(folder: Path) -> PeopleFolder:
    """The pictures of a folder of folders; hidden files do not count.

    Raises:
        UsageError: no folder, or no folder with a picture in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} must be a folder with one folder for each person, got none there")
    people: dict[str, list[Path]] = {}
    empty: set[str] = set()
    stray: list[Path] = []
    for entry in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not entry.is_dir():
            stray.append(entry)
            continue
        name = compose(entry.name)
        files = sorted(path for path in entry.iterdir() if not path.name.startswith("."))
        pictures = [path for path in files if is_picture(path) and not path.is_dir()]
        stray += sorted({*files} - {*pictures})
        if pictures:
            people.setdefault(name, []).extend(pictures)
        else:
            empty.add(name)
    if not people:
        raise UsageError(
            f"{folder} must hold a folder for each person with pictures ({', '.join(FORMATS)}), got {len(empty)} empty "
            f"folders and {len(stray)} other files"
        )
    return PeopleFolder(people=dict(sorted(people.items())), empty=sorted(empty - people.keys()), stray=stray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One face."""

    pixels: npt.NDArray[np.uint8]
    """(height, width, 3)."""
    was_grey: bool
    was_resized: bool


def read_picture(source: Path | bytes, height: int, width: int, *, resize: bool = False) -> Picture:
    """A picture, of a file or of its bytes, as red, green and blue of 8 bits, turned as its camera says. Grey ones get
    their grey in each channel; what is transparent is taken as it lies under it.

    Args:
        resize: take other sizes too, of the same shape, and scale them.

    Raises:
        ImageError: not there, damaged, of another size or shape, or of another kind than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                io.BytesIO(source) if isinstance(source, bytes) else open_plain(source) as file,
                Image.open(file, formats=tuple(sorted(set(FORMATS.values())))) as image,
            ):
                if image.mode not in (*_GREY, *_COLOUR):
                    raise ImageError(f"pictures must have 8 bits a channel, this one is {image.mode}")
                _require_size((image.height, image.width), (height, width), resize=resize, turned=True)
                turned = ImageOps.exif_transpose(image)
                _require_size((turned.height, turned.width), (height, width), resize=resize, turned=False)
                colours = turned.convert("RGB")
                was_resized = colours.size != (width, height)
                if was_resized:
                    colours = colours.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
                return Picture(pixels=np.array(colours), was_grey=image.mode in _GREY, was_resized=was_resized)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"it is too large for a face: {error}") from error
    except FileNotFoundError as error:
        raise ImageError("it is not there") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        said, cut, _ = reason_of(error).partition(" <_io")  # how PIL calls a file that is open
        name = f" {source.name!r}" if cut and isinstance(source, Path) else ""
        raise ImageError(f"it cannot be read: {said}{name}") from error


def _require_size(found: tuple[int, int], wanted: tuple[int, int], *, resize: bool, turned: bool) -> None:
    """Before it is decoded a picture may still lie on its side."""
    for size in (found, found[::-1]) if turned else (found,):
        if resize and abs(size[0] * wanted[1] / (size[1] * wanted[0]) - 1) <= SHAPE_TOLERANCE:
            return
        if size == wanted:
            return
    sizes = f"{wanted[0]} x {wanted[1]} pixels, got {found[0]} x {found[1]}; crop it"
    raise ImageError(f"it must have the shape of {sizes}" if resize else f"it must be {sizes}, or give --resize")
