"""RecordIO against a writer of its own, which follows the format's description alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from outsize.models.faceid.errors import HeadError
from outsize.models.faceid.face_source import RecordPictures
from outsize.models.faceid.images import ImageError
from outsize.models.faceid.record_io import RecordFile

from ...support.record_files import MAGIC, entry, indexed, picture, write


def test_pictures_and_labels_are_those_that_were_written(tmp_path: Path) -> None:
    source = RecordPictures(RecordFile(indexed(tmp_path, [0, 0, 0, 1, 2, 2])), (10, 12))
    assert (len(source), source.identities) == (6, 3)
    everything = np.arange(6)
    assert source.labels_of(everything, everything).tolist() == [0, 0, 0, 1, 2, 2]
    pixels, failed, _ = source.read(everything[::-1], everything)
    assert not failed
    for number, found in enumerate(pixels):
        assert found is not None
        assert (found == picture(6 - number)[0]).all()


def test_a_file_without_an_index_inside_is_read_record_by_record(tmp_path: Path) -> None:
    path = write(tmp_path, {key: entry(label, picture(key)[1]) for key, label in ((3, 70.0), (1, 5.0), (2, 5.0))})
    file = RecordFile(path)
    assert file.keys.tolist() == [1, 2, 3]
    assert file.labels.tolist() == [5, 5, 70]
    source = RecordPictures(file, (10, 12))
    assert source.identities == 2  # labels that nobody has are no classes
    assert source.labels_of(np.arange(3), np.zeros(3, np.int64)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "content", [MAGIC, MAGIC * 3, b"ab" + MAGIC, b"abcd" + MAGIC + b"x", b"abc" + MAGIC + MAGIC, b""]
)
def test_a_record_that_holds_the_magic_is_put_together_again(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, {1: entry(0.0, content), 2: entry(1.0, b"next")})
    file = RecordFile(path)
    assert file.read(0) == content
    assert file.read(1) == b"next"


def test_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = indexed(tmp_path, [0, 0, 1, 1], wrong={2: 7.0})
    body = bytearray(path.read_bytes())
    at = int((tmp_path / "train.idx").read_text().splitlines()[3].split("\t")[1])
    body[at] ^= 1
    path.write_bytes(body)
    source = RecordPictures(RecordFile(path), (10, 12))
    pixels, failed, _ = source.read(np.arange(4), np.zeros(4, np.int64))
    assert [found is None for found in pixels] == [False, True, True, False]
    assert failed[0] == (f"{path}, record 2", "its label is 7, the file's index says 0")
    assert failed[1] == (f"{path}, record 3", f"it is damaged: no record begins at byte {at:,}")
    file = RecordFile(write(tmp_path, {1: entry(0.0, b"no picture"), 2: entry(1.0, b"")}))
    assert RecordPictures(file, (10, 12)).read(np.arange(2), np.arange(2))[1][0][1].startswith("it cannot be read")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({1: entry(-1.0, b"x")}, "labels must be whole numbers from 0, record 1"),
        ({1: entry(0.5, b"x"), 2: entry(1.0, b"")}, "labels must be whole numbers from 0, record 1"),
        ({1: entry(float("nan"), b"x")}, "labels must be whole numbers from 0, record 1"),
        ({1: b"short"}, "5 bytes are no header"),
        ({1: (9).to_bytes(4, "little") + bytes(20)}, "claims 9 labels"),
        (
            {0: entry([2, 3], b""), 1: entry(0.0, b""), 2: entry([0, 9], b"")},
            r"pictures 0 \.\.\. 8, there are 1 \.\.\. 1",
        ),
        (
            {0: entry([2, 4], b""), 1: entry(0.0, b""), 2: entry([1, 2], b"")},
            "record 3 says whose the pictures are, and it is not in train.idx; copy",
        ),
        ({0: entry([1, 1], b"")}, "must hold pictures"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, entries: dict[int, bytes], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        RecordFile(write(tmp_path, entries))


def test_without_an_index_inside_a_cut_file_gives_what_is_whole(tmp_path: Path) -> None:
    path = write(tmp_path, {key: entry(key // 2, b"picture") for key in range(1, 5)})
    path.write_bytes(path.read_bytes()[:-50])  # a record takes 40 bytes
    file = RecordFile(path)
    assert (file.keys.tolist(), file.labels.tolist(), file.read(1)) == ([1, 2], [0, 1], b"picture")
    assert file.damaged == [
        (f"{path}, record 3", "it is cut off: it would end at byte 119, the file at 110"),
        (f"{path}, record 4", "it would begin at byte 120, where the file of 110 bytes has ended"),
    ]


@pytest.mark.parametrize("flag", [1.0, [1.0, 0.0]], ids=["one label", "two labels"])
def test_a_damaged_record_0_is_left_out_as_any_other(tmp_path: Path, flag: float | list[float]) -> None:
    path = write(tmp_path, {0: entry(flag, b"a"), 1: entry(flag, b"b"), 2: entry(3.0, b""), 3: entry(flag, b"c")})
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    file = RecordFile(path)
    assert (file.keys.tolist(), file.labels.tolist()) == ([1, 2, 3], [1, 3, 1])
    assert (file.read(0), file.read(2)) == (b"b", b"c")
    assert file.damaged == [(f"{path}, record 0", "it is damaged: no record begins at byte 0")]


def test_an_index_that_is_lost_is_missed(tmp_path: Path) -> None:
    """Its identities must not be taken for pictures, nor pictures for what it would have said of them."""
    path = indexed(tmp_path, [0, 0, 1])
    whole, index = path.read_bytes(), (tmp_path / "train.idx").read_text()
    path.write_bytes(b"\0" + whole[1:])
    says = "record 4 lists the pictures of an identity, so record 0 must be the index, and "
    with pytest.raises(HeadError, match=f"{says}it is damaged: no record begins at byte 0; copy the file and its .idx"):
        RecordFile(path)
    path.write_bytes(whole)
    (tmp_path / "train.idx").write_text("\n".join(index.splitlines()[1:]))
    with pytest.raises(HeadError, match=rf"{says}it is not in train\.idx; copy the file"):
        RecordFile(path)
    # Without what lies behind the pictures they are what a file without an index has.
    (tmp_path / "train.idx").write_text("\n".join(index.splitlines()[:4]))
    path.write_bytes(b"\0" + whole[1:])
    assert RecordFile(path).labels.tolist() == [0, 0, 1]
    with pytest.raises(
        HeadError, match="record 1 lists the pictures of an identity, so record 0 must be the index, and it"
    ):
        RecordFile(write(tmp_path, {0: entry(2.0, b"picture"), 1: entry([1, 2], b"")}))


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"with train\.idx beside it"):
        RecordFile(tmp_path / "train.rec")
    path = indexed(tmp_path, [0, 1])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HeadError, match=r"record 4 says whose the pictures are, and it would begin at byte .* copy"):
        RecordFile(path)
    (tmp_path / "train.idx").write_text("1\t0\none two\n")
    with pytest.raises(HeadError, match=r"line 2 of .*train\.idx must be a record's number, tab, and its place"):
        RecordFile(path)
    path.write_bytes(b"")
    with pytest.raises(HeadError, match="must be a RecordIO file, got an empty one"):
        RecordFile(path)
    (tmp_path / "train.idx").write_text("1\t0\n")
    file = RecordFile(write(tmp_path, {1: entry(0.0, b"abc")}))
    file.labels[0] = 3
    with pytest.raises(ImageError, match="its label is 0, the file's index says 3"):
        file.read(0)
