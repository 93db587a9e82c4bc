"""Galleries whose files are not what was written: damage is found before it names anybody; names that look the same
are one person's."""

from __future__ import annotations

import json
import os
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from outsize.models.faceid.base.errors import GalleryError, HeadError
from outsize.models.faceid.base.name_list import NameList, compose
from outsize.models.faceid.gallery import files as gallery_file
from outsize.models.faceid.gallery.files import HEADER_BYTES, Manifest, find_damage, read_newest, write_manifest
from outsize.models.faceid.gallery.gallery import Gallery
from outsize.models.faceid.gallery.top_k import unit_rows
from outsize.models.faceid.pictures.images import ImageError, find_people, read_picture

DIM = 19
NFC, NFD = unicodedata.normalize("NFC", "René"), unicodedata.normalize("NFD", "René")


def vectors(count: int, seed: int) -> npt.NDArray[np.float32]:
    return unit_rows(np.random.default_rng(seed).normal(size=(count, DIM)))


def make(folder: Path, people: int = 20, tablet_rows: int = 8) -> Gallery:
    gallery = Gallery.create(folder, dim=DIM, embedder="e" * 64, tablet_rows=tablet_rows, threads=1)
    gallery.enroll([f"person {number}" for number in range(people)], vectors(people, 0))
    return gallery


def on_disk(folder: Path) -> Gallery:
    """A gallery whose rows do not fit its budget."""
    gallery = Gallery.open(folder, threads=1)
    plan = gallery.plan_identify(5)
    gallery = Gallery.open(folder, threads=1, memory=plan.total_bytes - plan.rows_bytes // 2)
    assert gallery.plan_identify(5).reads_disk
    return gallery


def change(path: Path, place: int, by: Callable[[int], int] = lambda byte: byte ^ 1) -> None:
    value = bytearray(path.read_bytes())
    value[place] = by(value[place])
    path.write_bytes(value)


def make_older(folder: Path) -> None:
    """As the first format was: without a checksum of owners."""
    path = next(folder.glob("generation-*.json"))
    value = json.loads(path.read_text())
    for entry in value["gallery"]["tablets"] + value["gallery"]["names"]:
        del entry["owners_sha256"]
    value |= {"format": 1, "sha256": gallery_file._digest(value["gallery"])}
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("opening", [lambda folder: Gallery.open(folder, threads=1), on_disk], ids=["memory", "disk"])
@pytest.mark.parametrize("tablet", [0, 1, 2])
def test_a_flipped_byte_of_a_row_names_nobody(tmp_path: Path, opening: Callable[[Path], Gallery], tablet: int) -> None:
    """Of any tablet, in the first search and in every later one."""
    make(tmp_path / "g")
    path = sorted((tmp_path / "g").glob("rows-*"))[tablet]
    change(path, HEADER_BYTES + 3 * DIM * 4 + 2)
    gallery = opening(tmp_path / "g")
    for _ in range(2):
        with pytest.raises(GalleryError, match=f"{path.name} is damaged: its checksum is not the manifest's"):
            gallery.identify(vectors(5, 1))
    for use in (lambda: gallery.calibrate(), lambda: gallery.enroll(["new"], vectors(1, 2), calibrate=True)):
        with pytest.raises(GalleryError, match="is damaged"):
            use()
    assert "new" not in Gallery.open(tmp_path / "g")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("damage", ["swapped", "flipped", "header"])
def test_owners_that_are_not_those_that_were_written_are_found_when_the_gallery_is_opened(
    tmp_path: Path, damage: str, older: bool
) -> None:
    gallery = make(tmp_path / "g")
    if older:
        make_older(tmp_path / "g")
        assert [a.matches[0].name for a in Gallery.open(tmp_path / "g").identify(vectors(20, 0), 1)][3] == "person 3"
    path = sorted((tmp_path / "g").glob("rows-*"))[1]
    value = bytearray(path.read_bytes())
    at = HEADER_BYTES + 8 * DIM * 4
    if damage == "swapped":
        value[at : at + 8], value[at + 8 : at + 16] = value[at + 8 : at + 16], value[at : at + 8]
    else:
        value[{"flipped": at + 24, "header": 30}[damage]] ^= 1
    path.write_bytes(value)
    with pytest.raises(GalleryError, match=f"{path.name} is damaged"):
        Gallery.open(tmp_path / "g")
    assert gallery.find_damage() == [f"{path.name}: its checksum is not the manifest's"]


def test_a_gallery_of_the_first_format_is_opened_changed_and_becomes_one_of_this(tmp_path: Path) -> None:
    make(tmp_path / "g")
    make_older(tmp_path / "g")
    gallery = Gallery.open(tmp_path / "g", threads=1)
    gallery.enroll(["new"], vectors(1, 9))
    gallery.remove(["person 0"])
    manifest = read_newest(tmp_path / "g")
    assert [entry.owners_sha256 is None for entry in manifest.tablets] == [False, True, False]
    gallery = Gallery.open(tmp_path / "g", threads=1)
    assert gallery.identify(vectors(1, 9), 1)[0].matches[0].name == "new"
    assert not gallery.find_damage()


def test_a_file_that_is_changed_after_it_was_checked_is_checked_again(tmp_path: Path) -> None:
    make(tmp_path / "g")
    gallery = on_disk(tmp_path / "g")
    assert gallery.identify(vectors(20, 0), 1)[7].matches[0].name == "person 7"
    path = sorted((tmp_path / "g").glob("rows-*"))[0]
    times = path.stat()
    change(path, HEADER_BYTES + 7 * DIM * 4 + 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(GalleryError, match=f"{path.name} is damaged"):
        gallery.identify(vectors(20, 0), 1)


@pytest.mark.parametrize("which", ["rows-*", "names-*", "generation-*"])
def test_a_pipe_in_a_file_s_place_is_not_waited_for(tmp_path: Path, which: str) -> None:
    make(tmp_path / "g")
    path = next((tmp_path / "g").glob(which))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(GalleryError, match="it is a pipe, not a file"):
        Gallery.open(tmp_path / "g")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 10**9),
        ("rows", -1),
        ("dim", 0),
        ("tablet_rows", 0),
        ("dim", 19.0),
        ("storage", "float8"),
        ("names", [{"name": "../secret.txt", "sha256": "", "size": 1}]),
        ("tablets", []),
    ],
)
def test_a_manifest_whose_numbers_do_not_fit_is_damaged(tmp_path: Path, key: str, value: Any) -> None:
    make(tmp_path / "g")
    path = next((tmp_path / "g").glob("generation-*.json"))
    read = json.loads(path.read_text())
    read["gallery"][key] = value
    read["sha256"] = gallery_file._digest(read["gallery"])
    path.write_text(json.dumps(read))
    with pytest.raises(GalleryError, match=r"generation-.*json is damaged \("):
        Gallery.open(tmp_path / "g")


def test_a_search_beside_changes_of_other_threads_answers_for_one_generation(tmp_path: Path) -> None:
    """Each answer is that of a gallery with or without a person, never a name of one with the row of another."""
    gallery = make(tmp_path / "g")
    queries, wrong, refusals = vectors(20, 0), list[str](), list[str]()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                answers = gallery.identify(queries, 1)
            except GalleryError as error:
                refusals.append(str(error))
                continue
            for number, answer in enumerate(answers):
                name, score = answer.matches[0].name, answer.matches[0].score
                if name != f"person {number}" and (number > 4 or score > 0.99999):
                    wrong.append(f"{number}: {name} {score}")

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(6):
        gallery.remove([f"person {number}" for number in range(5)])
        gallery.enroll([f"person {number}" for number in range(5)], queries[:5])
        assert gallery.people == 20, turn
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert all("open it again" in refusal for refusal in refusals)  # files of the generation before may go meanwhile


def test_a_name_is_one_person_s_however_its_accents_are_written(tmp_path: Path) -> None:
    assert NFC != NFD
    rows = vectors(5, 0)
    gallery = Gallery.create(tmp_path / "g", dim=DIM, embedder="e", threads=1)
    assert gallery.enroll([NFD, NFC, "Zoë"], rows[:3]) == 2
    assert (gallery.people, list(gallery.names())) == (2, [NFC, "Zoë"])
    assert gallery.enroll([NFD], rows[3:4], add=True) == 0
    assert NFD in gallery
    assert NFC in gallery
    assert gallery.find([NFD, "nobody", "\udcff"]) == {NFC}
    gallery.replace([NFD], rows[4:])
    assert gallery.identify(rows[4:], 1)[0].matches[0].name == NFC
    assert gallery.remove([NFD, NFC]) == 1
    everything = b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    assert not any(name.encode() in everything for name in (NFC, NFD))
    assert gallery.identify(rows[4:], 1)[0].matches[0].name == "Zoë"


def write_uncomposed(folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gallery as it was made before names were composed."""
    with monkeypatch.context() as patched:
        patched.setattr("unicodedata.normalize", lambda _, name: name)
        gallery = Gallery.create(folder, dim=DIM, embedder="e", tablet_rows=2, threads=1)
        gallery.enroll(names, vectors(len(names), 0), calibrate=True)
        assert list(gallery.names()) == names


def test_an_older_gallery_with_one_person_under_two_names_becomes_one_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_uncomposed(tmp_path / "g", ["Ada", NFC, "Eve", NFD, "Zoë", "Bob"], monkeypatch)
    rows = vectors(6, 0)
    gallery = Gallery.open(tmp_path / "g", threads=1)
    assert list(gallery.names()) == ["Ada", NFC, "Eve", "Zoë", "Bob"]
    assert (gallery.people, gallery.templates) == (5, 6)
    assert [a.matches[0].name for a in gallery.identify(rows, 1)] == ["Ada", NFC, "Eve", NFC, "Zoë", "Bob"]
    assert gallery.calibration is not None
    assert len(gallery.calibration.scores) == 5
    assert not gallery.find_damage()
    assert gallery.remove([NFD]) == 2
    assert NFC not in Gallery.open(tmp_path / "g")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    assert not any(name.encode() in everything for name in (NFC, NFD))


def test_a_gallery_whose_names_cannot_be_composed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_uncomposed(tmp_path / "g", [NFD, "Bob"], monkeypatch)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("outsize.models.faceid.gallery.editing.write_rows", refuse)
    with pytest.raises(GalleryError, match="to be composed, and cannot be written: Permission denied; open it once"):
        Gallery.open(tmp_path / "g")


def test_folders_whose_names_look_the_same_are_one_person_s(tmp_path: Path) -> None:
    for folder, picture in ((NFC, "1.png"), (NFD, "2.png"), ("Zoe", "3.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / picture).touch()
    (tmp_path / unicodedata.normalize("NFD", "Zoë")).mkdir()
    found = find_people(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in found.people.items()} == {
        NFC: ["2.png", "1.png"],
        "Zoe": ["3.png"],
    }
    assert found.empty == ["Zoë"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link to a pipe"])
def test_what_is_no_file_is_no_picture(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(ImageError, match=r"^it cannot be read: it is a (pipe|socket or a device|device), not a file$"):
        read_picture(path, 16, 16)


def test_names_with_what_moves_a_cursor_are_refused(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g", 2)
    for name in ("a\nb", "a\rb", "a\u2028b", "a\x85b", "a\x1b[2Jb", "a\tb", "a\u200bb", "\u202eabc"):
        with pytest.raises(Exception, match="printable") as refusal:
            gallery.enroll([name], vectors(1, 3))
        assert str(refusal.value).isprintable()


def test_composed_names_are_told_from_others() -> None:
    names = NameList()
    names.change([], [NFD, "x"])
    assert names.is_composed
    assert list(names) == [NFC, "x"]
    assert names.find([NFD]) == {NFC: 0}
    assert not NameList([f"{NFD}\n".encode()]).is_composed
    assert NameList([f"{NFC}\n".encode()]).is_composed
    assert compose(NFD) == NFC


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    make(tmp_path / "g")
    manifest = read_newest(tmp_path / "g")
    assert isinstance(manifest, Manifest)
    write_manifest(tmp_path / "g", manifest)
    assert read_newest(tmp_path / "g") == manifest
    assert not find_damage(tmp_path / "g", manifest)


def test_embeddings_of_any_type_of_number_are_looked_up_and_of_others_refused(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g")
    query = vectors(20, 0)[7:8]
    expected = gallery.identify(query, 3)
    for same in (
        query.astype(np.float64),
        query.tolist(),
        torch.from_numpy(query).requires_grad_(),
        query[:, ::-1][:, ::-1],
    ):
        assert gallery.identify(same, 3) == expected
    for close in (query.astype(np.float16), torch.from_numpy(query).bfloat16(), (1e4 * query).astype(np.int32)):
        answer = gallery.identify(close, 1)[0].matches[0]
        assert (answer.name, answer.score) == ("person 7", pytest.approx(1, abs=1e-4))
    for bad in (
        query + 1j,
        torch.from_numpy(query).to(torch.complex64),
        query.astype(str),
        query > 0,
        query.astype(object),
    ):
        with pytest.raises(HeadError, match="embeddings must be real numbers, got"):
            gallery.identify(bad)
    with pytest.raises(HeadError, match="a threshold must be a number, got nan"):
        gallery.identify(query, threshold=float("nan"))


def test_one_text_is_no_list_of_names(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g", 2)
    for call in (
        lambda: gallery.enroll("Ada", vectors(3, 1)),
        lambda: gallery.replace("Ada", vectors(3, 1)),
        lambda: gallery.remove("Ada"),
        lambda: gallery.find("Ada"),
    ):
        with pytest.raises(HeadError, match="names must be a list of names, got the text 'Ada' alone"):
            call()
    with pytest.raises(HeadError, match="names must be texts, got 3"):
        gallery.enroll([3], vectors(1, 1))  # pyright: ignore[reportArgumentType]
    gallery.enroll(np.array(["Ada", "Eve"]), vectors(2, 1))  # pyright: ignore[reportArgumentType]
    assert gallery.people == 4
