"""Pictures: what is read, what is turned into colours, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from outsize.models.faceid.pictures.images import ImageError, find_people, read_picture
from outsize.tiler.base.errors import UsageError
from PIL import Image

HEIGHT, WIDTH = 23, 17


def make(path: Path, mode: str = "RGB", size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """A picture whose pixels all differ, written without loss."""
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(values).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_every_usual_kind_is_read_as_red_green_and_blue(tmp_path: Path, mode: str) -> None:
    picture = make(tmp_path / "a.png", mode)
    found = read_picture(tmp_path / "a.png", HEIGHT, WIDTH)
    assert found.pixels.dtype == np.uint8
    assert (found.pixels == np.asarray(picture.convert("RGB"))).all()
    assert found.was_grey == (mode in ("L", "LA", "1"))
    assert not found.was_resized


def test_a_camera_s_turn_is_followed(tmp_path: Path) -> None:
    picture = make(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    found = read_picture(tmp_path / "turned.png", HEIGHT, WIDTH)
    assert (found.pixels == np.asarray(picture)).all()


def test_other_sizes_are_refused_or_scaled_where_asked(tmp_path: Path) -> None:
    make(tmp_path / "twice.png", size=(2 * WIDTH, 2 * HEIGHT))
    with pytest.raises(ImageError, match=r"it must be 23 x 17 pixels, got 46 x 34; crop it, or give --resize$"):
        read_picture(tmp_path / "twice.png", HEIGHT, WIDTH)
    found = read_picture(tmp_path / "twice.png", HEIGHT, WIDTH, resize=True)
    assert found.was_resized
    assert found.pixels.shape == (HEIGHT, WIDTH, 3)
    make(tmp_path / "wide.png", size=(40, 20))
    with pytest.raises(ImageError, match=r"the shape of 23 x 17 pixels, got 20 x 40; crop it$"):
        read_picture(tmp_path / "wide.png", HEIGHT, WIDTH, resize=True)
    make(tmp_path / "lying.png", size=(HEIGHT, WIDTH))
    with pytest.raises(ImageError, match="got 17 x 23"):
        read_picture(tmp_path / "lying.png", HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "what", ["empty", "gone", "text", "cut png", "cut jpeg", "sixteen bits", "folder", "bomb", "gif"]
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("a.jpg" if what == "cut jpeg" else "a.png")
    reason = "it cannot be read"
    if what == "empty":
        path.touch()
    elif what == "text":
        path.write_text("not a picture")
    elif what.startswith("cut"):
        make(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif what == "sixteen bits":
        Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save(path)
        reason = "8 bits a channel, this one is I;16"
    elif what == "gone":
        reason = "^it is not there$"
    elif what == "folder":
        path.mkdir()
    elif what == "bomb":
        make(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        reason = "too large for a face"
    else:
        make(tmp_path / "b.gif")
        (tmp_path / "b.gif").rename(path)
    with pytest.raises(ImageError, match=reason) as refusal:
        read_picture(path, HEIGHT, WIDTH)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


def test_a_folder_of_people_is_listed_by_name(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a/x.webp", "stray.png", "b/notes.txt", ".hidden/1.png", "b/.1.png.swp"):
        make(tmp_path / "f" / name) if name.endswith(("png", "JPG", "webp")) else (tmp_path / "f" / name).touch()
    (tmp_path / "f" / "nobody").mkdir()
    found = find_people(tmp_path / "f")
    assert {name: [path.name for path in paths] for name, paths in found.people.items()} == {
        "a": ["x.webp"],
        "b": ["1.png", "2.JPG"],
    }
    assert list(found.people) == ["a", "b"]
    assert found.empty == ["nobody"]
    assert [path.name for path in found.stray] == ["notes.txt", "stray.png"]
    with pytest.raises(UsageError, match="got 0 empty folders and 2 other files"):
        find_people(_only_files(tmp_path))
    with pytest.raises(UsageError, match="must be a folder with one folder for each person"):
        find_people(tmp_path / "elsewhere")


def _only_files(folder: Path) -> Path:
    place = folder / "files"
    place.mkdir()
    (place / "1.png").touch()
    (place / "2.txt").touch()
    return place
