"""RecordIO against a writer of its own, which follows the format's description alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.pictures.images import ImageError
from outsize.models.faceid.pictures.record_io import RecordFile
from outsize.models.faceid.pictures.source import RecordPictures

from ....support.record_files import MAGIC, entry, indexed, picture, write


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
    path = indexed(tmp_path, [0, 0, 1, 1])
    body = bytearray(path.read_bytes())
    at = int((tmp_path / "train.idx").read_text().splitlines()[3].split("\t")[1])
    body[at] ^= 1
    path.write_bytes(body)
    file = RecordFile(path)
    assert file.keys.tolist() == [1, 2, 4]
    assert file.damaged == [(f"{path}, record 3", f"it is damaged: no record begins at byte {at:,}")]
    pixels, failed, _ = RecordPictures(file, (10, 12)).read(np.arange(3), np.zeros(3, np.int64))
    assert not failed
    assert (pixels[2] == picture(4)[0]).all()
    file = RecordFile(write(tmp_path, {1: entry(0.0, b"no picture"), 2: entry(1.0, b"")}))
    assert RecordPictures(file, (10, 12)).read(np.arange(2), np.arange(2))[1][0][1].startswith("it cannot be read")


def grouped(folder: Path, groups: list[tuple[int, int]], start: int = 1, rounded: bool = False) -> Path:
    """Pictures from record `start` on, and an identity's record for each group of (label, pictures), in their order;
    `rounded`: its numbers as float32 has them far out."""
    entries, ranges, key = {}, [], start
    for label, count in groups:
        ranges.append((key, key + count))
        for _ in range(count):
            entries[key] = entry([float(label), 0.0], picture(key)[1], key)
            key += 1
    end = key + (key % 2 if rounded else 0)
    for number, (first, stop) in enumerate(ranges):
        entries[end + number] = entry([first, stop], b"")
    return write(folder, {0: entry([end, end + len(ranges)], b""), **entries})


@pytest.mark.parametrize(
    ("labels", "mixed"),
    [
        ([3, 1, 2, 0], 0),
        ([0, 1, 4, 7], 0),
        ([5, 2, 5, 2], 0),
    ],
    ids=["another order", "some taken out", "twice"],
)
def test_a_picture_s_own_label_counts_whatever_the_order_of_identities(
    tmp_path: Path, labels: list[int], mixed: int
) -> None:
    file = RecordFile(grouped(tmp_path, [(label, 3) for label in labels]))
    assert file.labels.tolist() == np.repeat(labels, 3).tolist()
    source = RecordPictures(file, (10, 12))
    assert source.identities == len(set(labels))
    everything = np.arange(12)
    pixels, failed, _ = source.read(everything, everything * 0)
    assert (failed, file.damaged, file.mixed, file.identity_records) == ([], [], mixed, 4)
    for number, found in enumerate(pixels):
        assert (found == picture(number + 1)[0]).all()


def test_identities_with_several_labels_are_counted_and_their_pictures_used(tmp_path: Path) -> None:
    file = RecordFile(indexed(tmp_path, [0, 0, 1, 1, 2], wrong={2: 7.0}))
    assert file.labels.tolist() == [0, 7, 1, 1, 2]
    assert (file.mixed, file.identity_records, file.damaged) == (1, 3, [])


@pytest.mark.parametrize("start", [2**24 - 9, 2**24 + 100, 2**25 + 77, 3 * 2**24 + 5])
def test_every_picture_is_used_where_float32_rounds_the_numbers_of_records(tmp_path: Path, start: int) -> None:
    """Numbers of records from 2^24 on are rounded to even ones, from 2^25 on to multiples of four."""
    groups = list(enumerate([3, 5, 4, 7, 3, 5, 6, 3, 9, 5]))
    for rounded in (True, False):
        file = RecordFile(grouped(tmp_path, groups, start, rounded))
        assert file.keys.tolist() == list(range(start, start + 50))
        assert file.labels.tolist() == [label for label, count in groups for _ in range(count)]
        assert (file.mixed, file.damaged) == (0, [])
        assert file.read(49) == picture(start + 49)[1]


def test_pictures_that_an_identity_lists_and_nobody_has_are_named(tmp_path: Path) -> None:
    path = indexed(tmp_path, [0, 0, 0, 1, 1])
    index = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join(index[:2] + index[3:]))
    file = RecordFile(path)
    assert file.keys.tolist() == [1, 3, 4, 5]
    assert file.damaged == [(f"{path}, record 2", "it is not in train.idx")]
    far = {0: entry([10**6, 10**6 + 1], b""), 1: entry(0.0, b"x"), 10**6: entry([1, 10**6], b"")}
    file = RecordFile(write(tmp_path, far))
    assert file.damaged == [(str(path), "999,998 pictures that its identities list are not there")]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({1: entry(-1.0, b"x")}, "labels must be whole numbers from 0, record 1"),
        ({1: entry(0.5, b"x"), 2: entry(1.0, b"")}, "labels must be whole numbers from 0, record 1"),
        ({1: entry(float("nan"), b"x")}, "labels must be whole numbers from 0, record 1"),
        ({1: b"short"}, "5 bytes are no header"),
        ({1: (9).to_bytes(4, "little") + bytes(20)}, "claims 9 labels"),
        ({1: entry(2.0**24, b"x")}, r"labels must be below 2\^24, .* record 1 of .* has 16777216"),
        ({1: entry(float("inf"), b"x")}, "labels must be whole numbers from 0, record 1"),
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


def test_an_index_that_is_lost_is_not_missed(tmp_path: Path) -> None:
    """Its identities are not taken for pictures."""
    path = indexed(tmp_path, [0, 0, 1])
    whole, index = path.read_bytes(), (tmp_path / "train.idx").read_text()
    path.write_bytes(b"\0" + whole[1:])
    file = RecordFile(path)
    assert file.labels.tolist() == [0, 0, 1]
    assert file.damaged == [(f"{path}, record 0", "it is damaged: no record begins at byte 0")]
    path.write_bytes(whole)
    for kept in (slice(1, None), slice(0, 4)):  # without record 0; without identities
        (tmp_path / "train.idx").write_text("\n".join(index.splitlines()[kept]))
        file = RecordFile(path)
        assert (file.labels.tolist(), file.damaged) == ([0, 0, 1], [])


def test_an_identity_that_lists_what_is_not_there_is_named(tmp_path: Path) -> None:
    wrong = {0: entry([2, 4], b""), 1: entry(0.0, b"x"), 2: entry([0, 9], b""), 3: entry([1, 7], b"")}
    file = RecordFile(write(tmp_path, wrong))
    assert file.labels.tolist() == [0]
    assert file.damaged == [
        (f"{file.path}, record 2", "its identity has the pictures 0 ... 8, there are 1 ... 1"),
        (f"{file.path}, record 3", "its identity has the pictures 1 ... 6, there are 1 ... 1"),
    ]


def test_missing_and_cut_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match=r"with train\.idx beside it"):
        RecordFile(tmp_path / "train.rec")
    path = indexed(tmp_path, [0, 1])
    path.write_bytes(path.read_bytes()[:-40])  # identities alone
    assert (RecordFile(path).labels.tolist(), RecordFile(path).damaged) == ([0, 1], [])
    (tmp_path / "train.idx").write_text(f"1\t0\n{'9' * 30}\t0\n")
    with pytest.raises(HeadError, match=r"line 2 of .*train\.idx must be a record's number"):
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
    with pytest.raises(ImageError, match="its label is 0, and was 3 when the file was opened"):
        file.read(0)
