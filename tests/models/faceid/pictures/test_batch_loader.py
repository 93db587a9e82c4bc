"""Batches: the same samples for any number of ranks and after a resume; unusable pictures; lists."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.pictures.augmentation import FaceAugmentation
from outsize.models.faceid.pictures.batch_loader import BatchLoader
from outsize.models.faceid.pictures.image_list import read_image_list
from outsize.models.faceid.pictures.source import PictureFiles, SourcePart, hold_out
from outsize.tiler.base.errors import UsageError
from PIL import Image
from pyarrow import parquet

SIZE = (9, 7)
LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PictureFiles:
    """Eleven pictures of five identities: each of one colour, its number; the fourth is damaged."""
    folder, paths = tmp_path_factory.mktemp("pictures"), list[str]()
    for number in range(len(LABELS)):
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(np.full((*SIZE, 3), 10 * number, np.uint8)).save(paths[-1])
    Path(paths[3]).write_bytes(b"no picture")
    return PictureFiles(paths, LABELS, [f"name {number}" for number in range(5)], SIZE)


def loader(source: Any, **values: Any) -> BatchLoader:
    return BatchLoader(
        **{"source": source, "augmentation": FaceAugmentation(), "batch": 8, "micro_batch": 3, "seed": 1, **values}
    )


def collect(
    source: Any, ranks: int, first: int = 0, end: int = 6, **values: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of each step, of all ranks in their order."""
    runs = [list(loader(source, rank=rank, ranks=ranks, **values).run(first, end, threads=2)) for rank in range(ranks)]
    return [
        (
            np.concatenate([batch.images.numpy() for batches in step for batch in batches]),
            np.concatenate([batch.labels.numpy() for batches in step for batch in batches]),
        )
        for step in zip(*runs, strict=True)
    ]


@pytest.mark.parametrize("augment", ["none", "flip,colour=0.3,crop=0.2,erase=0.5", "grey,blur=0.1,resolution,jpeg"])
def test_steps_are_the_same_for_any_ranks_and_after_a_resume(source: PictureFiles, augment: str) -> None:
    varied = {"augmentation": FaceAugmentation.parse(augment)}
    alone = collect(source, 1, **varied)
    for ranks in (2, 3):
        for one, other in zip(alone, collect(source, ranks, **varied), strict=True):
            assert (one[0] == other[0]).all()
            assert (one[1] == other[1]).all()
    # Step 4 begins in the middle of the third epoch: 32 samples of 11 an epoch are gone.
    for one, other in zip(alone[4:], collect(source, 2, first=4, **varied), strict=True):
        assert (one[0] == other[0]).all()
        assert (one[1] == other[1]).all()


def test_each_epoch_shows_each_picture_with_its_label(source: PictureFiles) -> None:
    steps = collect(source, 1, end=11)  # 88 samples: 8 epochs
    images, labels = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    for epoch in range(8):
        part = slice(11 * epoch, 11 * (epoch + 1))
        numbers, found = images[part, 0, 0, 0] // 10, labels[part]
        assert sorted(numbers[found >= 0].tolist()) == [0, 1, 2, *range(4, 11)]
        assert (found[found >= 0] == LABELS[numbers[found >= 0]]).all()
        assert (found < 0).sum() == 1


def test_unusable_pictures_are_named_with_their_reason(source: PictureFiles) -> None:
    failed = [entry for step in loader(source).run(0, 6, threads=1) for batch in step for entry in batch.failed]
    assert len(failed) in (4, 5)  # 48 samples are four epochs and a part
    assert {Path(path).name for path, _ in failed} == {"3.png"}
    assert {reason for _, reason in failed} == {"it cannot be read: cannot identify image file '3.png'"}


def test_identities_that_are_held_out_are_in_no_batch(source: PictureFiles) -> None:
    training, kept = hold_out(source, 2, seed=0)
    assert kept is not None
    assert (training.identities, kept.identities) == (3, 2)
    colours: list[set[int]] = []
    for part in (training, kept):
        steps = collect(part, 1, end=4)
        images, labels = (np.concatenate(parts) for parts in zip(*steps, strict=True))
        assert set(labels[labels >= 0].tolist()) == set(range(part.identities))
        colours.append(set((images[labels >= 0, 0, 0, 0] // 10).tolist()))
    assert not colours[0] & colours[1]
    assert set(LABELS[list(colours[0])]) | set(LABELS[list(colours[1])]) == set(range(5))
    assert 7 in colours[0]  # an identity with one picture cannot be measured
    assert training.describe() != hold_out(source, 2, seed=1)[0].describe()
    with pytest.raises(HeadError, match="5 identities cannot be held out of 5, of which 4 have two"):
        hold_out(source, 5, seed=0)
    with pytest.raises(HeadError, match="must have pictures"):
        SourcePart(source, np.zeros(0, np.int64))


def test_more_ranks_than_micro_batches_are_refused(source: PictureFiles) -> None:
    with pytest.raises(HeadError, match="4 ranks need a micro-batch each, a batch of 8 has 3 of 3"):
        loader(source, ranks=4)
    with pytest.raises(HeadError, match="must be >= 1"):
        loader(source, batch=0)


def test_a_list_is_read_with_its_labels(tmp_path: Path) -> None:
    place = tmp_path / "list.csv"
    place.write_text(
        'path,label,note\na/1.png,Zoe,\n"b,1.png",Ada,x\na/1.png,Zoe,\n/c.png,Zoe,\n', encoding="utf-8-sig"
    )
    found = read_image_list(place)
    assert found.paths == [str(tmp_path / "a/1.png"), str(tmp_path / "b,1.png"), "/c.png"]
    assert [found.names[label] for label in found.labels] == ["Zoe", "Ada", "Zoe"]
    assert found.repeated == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,1\n", "must begin with the line path,label, got 'a.png,1'"),
        ("path,label\n", "must list pictures, got none"),
        ("path,label\na.png,\n", "line 2 of .* must have a path and a label, got 'a.png', ''"),
        ("path,label\na.png\n", "line 2 of .* must have a path and a label, got 'a.png', None"),
        ("path,label\na.png,1\na.png,2\n", "line 3 of .* gives a.png the label 2, line 2 1"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_image_list(tmp_path / "list.csv")


@pytest.mark.parametrize("numbers", [False, True])
def test_a_parquet_list_is_the_csv_list_of_the_same_rows(tmp_path: Path, numbers: bool) -> None:
    """Several row groups, a column more, texts also as a dictionary, whole numbers as labels."""
    rows = [(f"{n % 4}/{n % 9}.png", str(n % 9 % 4)) for n in range(43)]
    (tmp_path / "list.csv").write_text("".join(f"{path},{label}\n" for path, label in [("path", "label"), *rows]))
    paths, labels = zip(*rows, strict=True)
    given = pa.array([int(label) for label in labels], pa.int32()) if numbers else pa.array(labels).dictionary_encode()
    table = pa.table({"note": pa.nulls(len(rows)), "label": given, "path": pa.array(paths, pa.large_string())})
    parquet.write_table(table, tmp_path / "list.parquet", row_group_size=5)
    found, expected = read_image_list(tmp_path / "list.parquet"), read_image_list(tmp_path / "list.csv")
    assert (found.paths, found.names, found.repeated) == (expected.paths, expected.names, expected.repeated)
    assert found.repeated > 0
    assert np.array_equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.png"], "person": ["x"]}, "must have the columns path and label, got path, person"),
        ({"path": ["a.png"], "label": [1.5]}, "labels must be texts or whole numbers, the column label .* has double"),
        ({"path": [b"a.png"], "label": [1]}, "paths must be texts, the column path of .* has binary"),
        ({"path": ["a.png", "b.png"], "label": [0, None]}, "row 2 of .* must have a path and a label, got 'b.png', No"),
        ({"path": ["", "b.png"], "label": [0, 1]}, "row 1 of .* must have a path and a label, got '', '0'"),
        ({"path": ["a.png", "a.png"], "label": [1, 2]}, "row 2 of .* gives a.png the label 2, row 1 1"),
        ({"path": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "must list pictures, got none"),
    ],
)
def test_parquet_lists_that_cannot_be_used_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match=message):
        read_image_list(tmp_path / "list.parquet")


def test_other_lists_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"a list of pictures must be NAME.csv or NAME.parquet .*, got list.txt"):
        read_image_list(tmp_path / "list.txt")
    for name in ("list.csv", "list.parquet"):
        with pytest.raises(UsageError, match="must be a list of pictures that can be read"):
            read_image_list(tmp_path / name)
    (tmp_path / "list.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"list\.parquet must be a list of pictures that can be read"):
        read_image_list(tmp_path / "list.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"list.parquet: lists in Parquet need .*pip install 'outsize\[parquet\]'"):
        read_image_list(tmp_path / "list.parquet")
