"""`outsize face sample, evaluate, enroll, identify, calibrate, remove, gallery` as their user calls them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from outsize.models.faceid.base.collectives import Ranks
from outsize.models.faceid.base.errors import GalleryError
from outsize.models.faceid.embedder.file import load_embedder
from outsize.models.faceid.gallery.gallery import Gallery
from outsize.models.faceid.gallery.top_k import unit_rows
from outsize.models.faceid.pictures.images import read_picture
from outsize.sample_data.identities import SIZE
from outsize.tests.support import commands
from outsize.tests.support.embedders import DIM, make_embedder
from PIL import Image

pytestmark = pytest.mark.system

PEOPLE, PICTURES = 24, 3


def outsize(*words: str | Path, code: int = 0) -> tuple[dict[str, Any], str]:
    """(values, what stands on stderr) of a command."""
    done = commands.outsize_here("--json", "face", *words)
    assert done.returncode == code, done.stderr
    return (json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}), done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """people/ and strangers/ of synthetic identities, faces/ and other/ of embedders."""
    root = tmp_path_factory.mktemp("world")
    outsize("sample", root / "people", "--identities", str(PEOPLE), "--images", str(PICTURES))
    outsize("sample", root / "strangers", "--identities", "7", "--images", "2", "--first", "5000")
    make_embedder(root / "faces", 0)
    make_embedder(root / "other", 1)
    return root


@pytest.fixture
def gallery(world: Path, tmp_path: Path) -> Path:
    outsize("enroll", tmp_path / "g", world / "people", "--embedder", world / "faces")
    return tmp_path / "g"


def name(number: int) -> str:
    return f"identity-{1_000_000 + number:06d}"


def test_the_sample_is_the_same_for_the_same_options(world: Path, tmp_path: Path) -> None:
    outsize("sample", tmp_path / "large", "--identities", "2", "--images", "2", "--size", "24x16")
    with Image.open(next((tmp_path / "large").rglob("*.png"))) as picture:
        assert (picture.height, picture.width) == (24, 16)
    outsize("sample", tmp_path / "again", "--identities", str(PEOPLE), "--images", str(PICTURES))
    files = sorted(path.relative_to(world / "people") for path in (world / "people").rglob("*.*"))
    assert len(files) == PEOPLE * PICTURES + 1
    assert all((tmp_path / "again" / file).read_bytes() == (world / "people" / file).read_bytes() for file in files)
    assert outsize("sample", tmp_path / "again", code=2)[1].startswith(f"outsize: error: {tmp_path / 'again'} must be")


def test_a_sample_too_small_for_a_face_leaves_nothing(tmp_path: Path) -> None:
    _, said = outsize("sample", tmp_path / "people", "--size", "5", code=2)
    assert said == "outsize: error: faces must be 8 x 8 or larger, got 5 x 5\n"
    assert not (tmp_path / "people").exists()


def test_persons_are_enrolled_found_and_removed(world: Path, tmp_path: Path) -> None:
    place, embedder = tmp_path / "g", ("--embedder", world / "faces")
    made, _ = outsize("enroll", place, world / "people", *embedder)
    assert (made["new_people"], made["people"], made["templates"], made["images"]) == (PEOPLE, PEOPLE, PEOPLE, 72)
    assert made["failed"] == []
    assert made["calibration"] == {"scores": PEOPLE, "of": "enrolled"}
    assert made["embedder"] == load_embedder(world / "faces").sha256
    # The template is the mean of the unit embeddings; the answer is the dense one.
    loaded = load_embedder(world / "faces")
    vectors = [
        unit_rows(loaded.embed(torch.from_numpy(read_picture(path, SIZE, SIZE).pixels)[None]))[0]
        for path in sorted((world / "people").glob("*/*.png"))
    ]
    rows = unit_rows(np.array(vectors, np.float64).reshape(PEOPLE, PICTURES, DIM).mean(axis=1))
    pictures = [world / "people" / name(n) / f"{name(n)}_0002.png" for n in (3, 9)]
    found, said = outsize("identify", place, *pictures, *embedder, "-k", "3")
    assert "no threshold" in said
    assert "kept in memory" in said
    for face, number in zip(found["faces"], (3, 9), strict=True):
        scores = rows @ vectors[number * PICTURES + 1]
        best = np.argsort(-scores)[:3]
        assert [match["name"] for match in face["matches"]] == [name(n) for n in best]
        assert [match["score"] for match in face["matches"]] == pytest.approx(scores[best].tolist(), abs=1e-5)
        assert face["nearest"] == face["matches"][0]["score"]
        assert 0 <= face["matches"][0]["stranger_rate"] <= face["matches"][2]["stranger_rate"] <= 1
    gone, _ = outsize("remove", place, name(3), name(5))
    assert (gone["removed_people"], gone["people"], gone["calibration"]["scores"]) == (2, PEOPLE - 2, PEOPLE - 2)
    shown, _ = outsize("gallery", place, "--names", "--verify")
    assert shown["names"] == [name(n) for n in range(PEOPLE) if n not in (3, 5)]
    assert shown["damaged"] == []
    assert outsize("remove", place, name(3), code=2)[1].endswith(f"error: {name(3)} is not in the gallery\n")


def test_who_is_there_already_is_refused_replaced_or_given_more(world: Path, gallery: Path, tmp_path: Path) -> None:
    embedder = ("--embedder", world / "faces")
    shutil.copytree(world / "people" / name(2), tmp_path / "two" / name(2))
    shutil.copytree(world / "strangers" / "identity-005001", tmp_path / "two" / "Ada Lovelace")
    _, said = outsize("enroll", gallery, tmp_path / "two", *embedder, code=2)
    assert f"{name(2)} is in {gallery} already; --replace puts" in said
    added, _ = outsize("enroll", gallery, tmp_path / "two", *embedder, "--add", "--templates", "each")
    assert (added["new_people"], added["changed_people"], added["templates"]) == (1, 1, PEOPLE + 5)
    replaced, _ = outsize("enroll", gallery, tmp_path / "two", *embedder, "--replace", "--no-calibrate")
    assert (replaced["new_people"], replaced["changed_people"], replaced["templates"]) == (0, 2, PEOPLE + 1)
    assert replaced["calibration"] is None
    outsize("enroll", gallery, tmp_path / "two", *embedder, "--replace", "--add", code=2)


def test_another_embedder_is_refused_by_its_hash(world: Path, gallery: Path) -> None:
    picture = world / "people" / name(0) / f"{name(0)}_0001.png"
    hashes = [load_embedder(world / kind).sha256[:16] for kind in ("faces", "other")]
    for words in (("identify", gallery, picture), ("enroll", gallery, world / "strangers")):
        _, said = outsize(*words, "--embedder", world / "other", code=1)
        assert f"was made by another embedder: {hashes[0]} there, {hashes[1]} now" in said
        assert str(world / "other") in said
    assert (
        "must be a folder that outsize face train made"
        in outsize("identify", gallery, picture, "--embedder", world / "people", code=1)[1]
    )


@pytest.fixture
def tablets(world: Path, tmp_path: Path) -> Path:
    """A gallery of six tablets, which two ranks share."""
    place, embedder = tmp_path / "tablets", load_embedder(world / "faces").sha256
    Gallery.create(place, dim=DIM, embedder=embedder, tablet_rows=PEOPLE // 6)
    outsize("enroll", place, world / "people", "--embedder", world / "faces")
    return place


def test_two_ranks_give_the_bits_of_one(world: Path, tablets: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = [*sorted((world / "people").glob("*/*_0003.png")), tmp_path / "broken.png"]
    words = ("identify", tablets, *pictures, "--embedder", world / "faces", "-k", "4", "--threshold", "-1")
    alone, _ = outsize(*words, code=3)
    assert len(alone["faces"]) == PEOPLE
    both, _ = outsize(*words, "--ranks", "2", code=3)
    same = ("faces", "threshold", "images", "failed")
    assert [both[key] for key in same] == [alone[key] for key in same]
    assert both["predicted_peak_bytes"] > 1.5 * alone["predicted_peak_bytes"]
    outsize("identify", tablets, pictures[0], "--embedder", world / "faces", "--ranks", "4096", code=2)


def wait_for(what: Callable[[], Any]) -> Any:
    """What it gives, once that is something."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come so far")


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody collects what a dead parent has left
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at_work", [True, False], ids=["at work", "starting"])
def test_ranks_end_with_their_command_in_one_line(
    world: Path, tablets: Path, tmp_path: Path, sign: signal.Signals, at_work: bool
) -> None:
    """Ctrl-C, which a terminal sends to all of them, and SIGTERM, which a user sends to one and a system to all."""
    pictures, said = tmp_path / "door", tmp_path / "said.txt"
    pictures.mkdir()
    for number in range(30_000 if at_work else 1):  # whoever reads them is at it for a minute
        (pictures / f"{number}.png").symlink_to(world / "people" / name(0) / f"{name(0)}_0001.png")

    words = ("face", "identify", tablets, pictures, "--embedder", world / "faces", "--ranks", "2")
    with said.open("w") as errors:
        command = commands.Command(*words, stderr=errors, start_new_session=True)
        ranks = wait_for(lambda: len(found := psutil.Process(command.pid).children()) == 2 and found)
        if at_work:
            wait_for(lambda: len(said.read_text().splitlines()) >= 2)
        if sign == signal.SIGTERM and at_work:
            command.send_signal(sign)
        else:
            os.killpg(command.pid, sign)
        try:
            assert command.wait(60) == 130
        finally:
            command.kill()
    *remarks, last = (line for line in said.read_text().splitlines() if line and not line.startswith("embed: "))
    assert last == "outsize: interrupted; the same command begins anew"
    assert [remark.split()[0] for remark in remarks] == (["no", str(PEOPLE)] if at_work else [])
    assert wait_for(lambda: all(has_ended(rank) for rank in ranks))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, place: str, sign: signal.Signals, call: int) -> None:
    """Send this process a signal when a function that a gallery's files call is called for the n-th time, before it
    does anything.

    Args:
        place: FILE.FUNCTION, the file that calls it.
    """
    file, _, place = place.partition(".")
    module = f"outsize.models.faceid.gallery.{file}"
    calls, function = itertools.count(1), getattr(sys.modules[module], place)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), sign)
        return function(*arguments, **named)

    monkeypatch.setattr(f"{module}.{place}", interrupted)


@pytest.mark.parametrize(
    ("place", "call", "sign"),
    [
        ("gallery.write_manifest", 1, signal.SIGINT),  # the empty gallery's
        ("editing.write_names", 1, signal.SIGTERM),
        ("lookup.search_rows", 1, signal.SIGINT),  # for the calibration
        ("gallery.write_manifest", 2, signal.SIGTERM),
    ],
)
def test_an_enrolment_that_is_stopped_leaves_no_new_gallery(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int, sign: signal.Signals
) -> None:
    words = ("enroll", tmp_path / "g", world / "people", "--embedder", world / "faces")
    with monkeypatch.context() as patched:
        interrupt_at(patched, place, sign, call)
        values, said = outsize(*words, code=130)
    assert said.splitlines()[-1] == "outsize: interrupted; the same command begins anew"
    assert values["exit_code"] == 130
    assert not (tmp_path / "g").exists()
    other = (*words[:-1], world / "other", "--storage", "float16")  # nothing binds a second attempt
    again = outsize(*(words if sign == signal.SIGINT else other))[0]
    assert (again["people"], again["storage"]) == (PEOPLE, "float32" if sign == signal.SIGINT else "float16")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_enrolment_that_is_stopped_while_it_reads_leaves_nothing(
    world: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    shutil.copytree(world / "people", tmp_path / "people")
    words = ("face", "enroll", tmp_path / "g", tmp_path / "people", "--embedder", world / "faces")
    # The last picture takes its time.
    waiting = f"""
        import pathlib, time
        from outsize.pipelines.faces import pictures
        read_picture = pictures.read_picture
        def read_slowly(path, *size, **options):
            if path.name == "{name(PEOPLE - 1)}_0003.png":
                pathlib.Path({str(tmp_path / "reading")!r}).touch()
                time.sleep(600)
            return read_picture(path, *size, **options)
        pictures.read_picture = read_slowly
    """
    with (tmp_path / "said.txt").open("w") as errors:
        command = commands.Command(*words, stderr=errors, start_new_session=True, first=textwrap.dedent(waiting))
        wait_for((tmp_path / "reading").exists)
        os.killpg(command.pid, sign)
        assert command.wait(60) == 130
    *lines, last = filter(None, (tmp_path / "said.txt").read_text().splitlines())
    assert last == "outsize: interrupted; the same command begins anew"
    assert [line for line in lines if not line.startswith("embed: ")] == [
        "1 file left alone (pairs.txt): no pictures, or in no person's folder"
    ]
    assert not (tmp_path / "g").exists()
    assert outsize(*words[1:])[0]["people"] == PEOPLE


@pytest.mark.parametrize(
    ("place", "sign"),
    [
        ("editing.write_rows", signal.SIGINT),
        ("editing.write_names", signal.SIGTERM),
        ("lookup.search_rows", signal.SIGINT),
        ("gallery.write_manifest", signal.SIGTERM),
    ],
)
def test_a_change_that_is_stopped_leaves_the_gallery_as_it_was(
    world: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch, place: str, sign: signal.Signals
) -> None:
    shutil.copytree(world / "strangers" / "identity-005001", gallery.parent / "more" / name(2))
    shutil.copytree(world / "strangers" / "identity-005002", gallery.parent / "more" / "Ada Lovelace")
    files = {path.name: path.read_bytes() for path in gallery.iterdir() if path.name != "lock"}
    removing = ("remove", gallery, name(3), name(5))
    adding = ("enroll", gallery, gallery.parent / "more", "--embedder", world / "faces", "--add")
    for words in (removing, adding):
        with monkeypatch.context() as patched:
            interrupt_at(patched, place, sign, 1)
            _, said = outsize(*words, code=130)
        assert said.splitlines()[-1] == "outsize: interrupted; the same command begins anew"
        assert {path.name: path.read_bytes() for path in gallery.iterdir() if path.name != "lock"} == files
    assert outsize(*removing)[0]["people"] == PEOPLE - 2
    assert outsize(*adding)[0]["templates"] == PEOPLE
    assert outsize("gallery", gallery, "--verify")[0]["calibration"] == {"scores": PEOPLE - 1, "of": "enrolled"}


def test_a_change_that_is_stopped_when_it_is_made_is_made(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second deletion of what is left over comes behind the manifest."""
    with monkeypatch.context() as patched:
        interrupt_at(patched, "gallery.remove_leftovers", signal.SIGTERM, 2)
        outsize("remove", gallery, name(3), code=130)
    shown, _ = outsize("gallery", gallery, "--names", "--verify")
    assert (shown["people"], shown["damaged"]) == (PEOPLE - 1, [])
    assert shown["calibration"] == {"scores": PEOPLE - 1, "of": "enrolled"}
    assert not any(name(3).encode() in path.read_bytes() for path in gallery.iterdir())


def on_two_ranks(*words: str | Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    ranks = commands.outsize_on_two_ranks("--json", "face", *words)
    return [(rank.returncode, rank.stdout, rank.stderr) for rank in ranks]


def test_under_torchrun_the_first_rank_alone_speaks(world: Path, tablets: Path) -> None:
    words = ("identify", tablets, world / "people" / name(7), "-k", "2", "--embedder")
    alone, _ = outsize(*words, world / "faces")
    (code, out, _), other = on_two_ranks(*words, world / "faces")
    assert (code, other) == (0, (0, "", ""))
    assert json.loads(out)["faces"] == alone["faces"]
    (code, _, said), other = on_two_ranks(*words, world / "other")
    assert (code, other) == (1, (0, "", ""))
    assert "was made by another embedder" in said
    assert len(said.splitlines()) == 1
    (code, _, said), other = on_two_ranks(*words, world / "faces", "--ranks", "4")
    assert (code, other) == (2, (0, "", ""))
    assert said == "outsize: error: torchrun started 2 ranks, --ranks asks for 4; leave --ranks out\n"


def test_ranks_of_different_generations_refuse_to_search(gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Gallery.open(gallery)
    monkeypatch.setattr(Ranks, "gather_tablets", lambda _, mine, __: torch.cat([mine, mine + 1]))
    here = opened.generation
    with pytest.raises(GalleryError, match=f"changed while ranks opened it: generations {here}, {here + 1}; open it"):
        opened.identify(np.ones((1, DIM)))


@pytest.mark.parametrize(("rank", "code"), [(0, 2), (1, 0)])
def test_what_is_called_once_is_no_work_for_ranks(
    world: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, code: int
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    embedder = ("--embedder", world / "faces")
    before, page = Gallery.open(gallery).generation, tmp_path / "page.html"
    for words in (
        ("enroll", gallery, world / "strangers", *embedder),
        ("remove", gallery, name(0)),
        ("calibrate", gallery),
        ("gallery", gallery),
        ("sample", tmp_path / "people", "--identities", "2"),
        ("evaluate", world / "people", *embedder, "--report", page),
        ("benchmark", "--classes", "100", "--checkpoint", tmp_path / "layer"),
    ):
        values, said = outsize(*words, code=code)
        assert said == (
            f"outsize: error: face {words[0]} must be called once, got 2 ranks of torchrun; call outsize face "
            f"{words[0]} without torchrun\n"
            if rank == 0
            else ""
        )
        assert bool(values) == (rank == 0)
    assert Gallery.open(gallery).generation == before
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_bad_pictures_are_named_and_counted_and_the_others_enrolled(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    for number in range(4):
        shutil.copytree(world / "people" / name(number), folder / name(number))
    (folder / name(0) / "cut.png").write_bytes((folder / name(0) / f"{name(0)}_0001.png").read_bytes()[:600])
    Image.new("RGB", (SIZE + 1, SIZE)).save(folder / name(0) / "large.png")
    Image.open(folder / name(1) / f"{name(1)}_0001.png").convert("L").save(folder / name(1) / "grey.png")
    shutil.copy(folder / name(1) / f"{name(1)}_0001.png", folder / name(1) / "twice.png")
    shutil.copy(folder / name(1) / f"{name(1)}_0002.png", folder / name(2) / "stolen.png")
    (folder / "nobody").mkdir()
    (folder / "only bad").mkdir()
    (folder / "only bad" / "x.jpg").write_bytes(b"x")
    (folder / "notes.txt").touch()
    made, said = outsize("enroll", tmp_path / "g", folder, "--embedder", world / "faces", code=3)
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in made["failed"]}
    assert reasons.keys() == {"cut.png", "large.png", "stolen.png", "x.jpg", "nobody", "only bad"}
    assert reasons["large.png"] == "it must be 32 x 32 pixels, got 32 x 33; crop it, or give --resize"
    assert reasons["stolen.png"].startswith("it is the same file as")
    assert "its folder has no picture" in reasons["nobody"]
    assert reasons["only bad"] == "not one of its pictures can be used"
    assert (made["people"], made["images"], made["grey_images"], made["doubled_images"]) == (4, 13, 1, 1)
    for line in (
        "1 file left alone (notes.txt): no pictures, or in no person's folder",
        "1 picture without colour",
        "the same file comes twice for one person",
    ):
        assert line in said
    found, _ = outsize("identify", tmp_path / "g", folder / name(0), "--embedder", world / "faces", code=3)
    assert (len(found["faces"]), len(found["failed"])) == (3, 2)
    bad = ("identify", tmp_path / "g", folder / "only bad" / "x.jpg", "--embedder", world / "faces")
    assert "none of the pictures can be used" in outsize(*bad, code=1)[1]
    empty = ("identify", tmp_path / "g", folder / "nobody", "--embedder", world / "faces")
    assert "must hold pictures" in outsize(*empty, code=2)[1]
    assert (
        "must hold a folder for each person"
        in outsize("enroll", tmp_path / "g", folder / "nobody", "--embedder", world / "faces", code=2)[1]
    )
    assert (
        "is not there"
        in outsize("identify", tmp_path / "g", folder / "none.png", "--embedder", world / "faces", code=2)[1]
    )
    resized, _ = outsize(
        "identify", tmp_path / "g", folder / name(0), "--embedder", world / "faces", "--resize", code=3
    )
    assert (resized["images"], resized["resized_images"]) == (3, 0)  # 32 x 33 is of another shape


def test_of_many_bad_pictures_the_first_are_shown_and_all_are_in_the_json(world: Path, tmp_path: Path) -> None:
    embedder = ("--embedder", world / "faces")
    for number in (0, 1):
        shutil.copytree(world / "people" / name(number), tmp_path / "people" / name(number))
    for number in range(23):
        (tmp_path / "people" / f"lost-{number:02d}").mkdir()
        (tmp_path / "people" / f"lost-{number:02d}" / "bad.png").write_bytes(f"{number}".encode())
    visitors = [*(tmp_path / "people" / name(0)).iterdir(), *sorted((tmp_path / "people").glob("lost-*/bad.png"))]
    bad = [str(path) for path in visitors[PICTURES:]]
    none = tmp_path / "none" / "lost"
    none.mkdir(parents=True)
    for number in range(22):
        (none / f"{number}.png").write_bytes(f"{number}".encode())
    _, said = outsize("enroll", tmp_path / "g", none.parent, *embedder, code=1)
    assert said.splitlines()[-2:] == [
        "2 more cannot be used",  # and no result that would name them
        f"outsize: error: none of the pictures in {none.parent} can be used; what is wrong stands above",
    ]
    for words, persons in (
        (("enroll", tmp_path / "g", tmp_path / "people"), 23),
        (("evaluate", tmp_path / "people"), 0),
        (("calibrate", tmp_path / "other", tmp_path / "people"), 0),
        (("identify", tmp_path / "g", *visitors), 0),
    ):
        if words[0] == "calibrate":
            outsize("enroll", tmp_path / "other", world / "strangers", *embedder)
        found, said = outsize(*words, *embedder, code=3)
        assert [entry["path"] for entry in found["failed"][:23]] == bad
        assert len(found["failed"]) == 23 + persons
        assert [line.split(": ")[0] for line in said.splitlines() if "cannot be read" in line] == bad[:20]
        assert said.count("\n3 more cannot be used; outsize --json names all\n") == 1
        assert said.count(": not one of its pictures can be used") == min(persons, 20)
        assert said.count("\n3 more without a picture that can be used\n") == (persons > 0)


def test_strangers_set_the_threshold(world: Path, gallery: Path) -> None:
    embedder = ("--embedder", world / "faces")
    picture = world / "strangers" / "identity-005000"
    _, said = outsize("identify", gallery, picture, *embedder, "--fpir", "0.1", code=2)
    assert "needs a calibration of at least 100 faces, this one has 24" in said
    shown = commands.outsize_here("face", "calibrate", gallery).stdout
    assert "24 persons of the gallery, each compared with all others; the highest score" in shown
    assert shown.splitlines()[-1] == (
        "a rate of 0.1 needs 100, this one has 24; calibrate with more strangers, or take a rate from 0.42 on"
    )
    assert Gallery.open(gallery).threshold_for(0.42) < 1
    made, _ = outsize("calibrate", gallery, world / "strangers", *embedder)
    assert made["calibration"] == {"scores": 14, "of": "strangers"}
    found, _ = outsize("identify", gallery, world / "strangers" / "identity-005000", *embedder, "--fpir", "0.8")
    assert found["threshold"] == Gallery.open(gallery).threshold_for(0.8)
    above = str(made["highest"] + 1e-6)  # in a batch of another size an embedding has other last bits
    everyone = [
        outsize("identify", gallery, folder, *embedder, "--threshold", above)[0]["faces"]
        for folder in sorted((world / "strangers").iterdir())
        if folder.is_dir()
    ]
    assert not any(face["known"] for faces in everyone for face in faces)
    assert all(face["nearest"] is not None for faces in everyone for face in faces)
    _, said = outsize("enroll", gallery, world / "strangers", *embedder)
    assert "the calibration by strangers is out of date and deleted, persons of the gallery stand in for them" in said
    assert (
        "strangers must not be in the gallery"
        in outsize("calibrate", gallery, world / "strangers", *embedder, code=2)[1]
    )
    assert "need --embedder" in outsize("calibrate", gallery, world / "strangers", code=2)[1]
    assert outsize("calibrate", gallery)[0]["calibration"] == {"scores": PEOPLE + 7, "of": "enrolled"}
    both = ("identify", gallery, picture, *embedder, "--threshold", "0.5", "--fpir", "0.5")
    assert "either --threshold or --fpir" in outsize(*both, code=2)[1]


def test_a_long_search_shows_how_far_it_is(world: Path, gallery: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("identify", gallery, next((world / "people").rglob("*.png")), "--embedder", world / "faces")
    assert "search" not in outsize(*words)[1]
    monkeypatch.setattr("outsize.pipelines.faces.gallery.SHOWN_ROWS", 1)
    assert re.search(r"^search: 100 %, took", outsize(*words)[1], re.MULTILINE)
    assert re.search(r"^search: 100 %, took", outsize("calibrate", gallery)[1], re.MULTILINE)
    _, said = outsize("evaluate", world / "people", "--embedder", world / "faces")
    assert re.search(r"^compare: 100 %, took .*\nsearch: 100 %, took", said, re.MULTILINE)


def test_damage_ends_with_code_1(gallery: Path) -> None:
    rows = next(gallery.glob("rows-*"))
    rows.write_bytes(rows.read_bytes()[:-1] + b"\7")
    shown, _ = outsize("gallery", gallery, "--verify", code=1)
    assert shown["damaged"] == [f"{rows.name}: its checksum is not the manifest's"]
    assert "is no gallery: it has no generation; outsize" in outsize("gallery", gallery.parent, code=1)[1]
    assert "is no gallery: it is not there; outsize" in outsize("gallery", gallery.parent / "x", code=1)[1]


def test_nobody_is_enrolled_into_what_is_no_gallery(world: Path, tmp_path: Path) -> None:
    words = (world / "people", "--embedder", world / "faces")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    _, said = outsize("enroll", tmp_path / "notes", *words, code=1)
    assert said.endswith("notes must be a gallery, or a new or empty folder, got a.txt there; choose another folder\n")
    assert "got a file; choose another" in outsize("enroll", tmp_path / "notes" / "a.txt", *words, code=1)[1]
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]
    # What a kill in the middle of making one leaves is no hindrance.
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / ".generation-000000000.json.partial").write_text("{")
    assert outsize("enroll", tmp_path / "g", *words)[0]["people"] == PEOPLE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", "1.5"), "Invalid value for '--threshold': 1.5 is not in the range -1<=x<=1."),
        (("--threshold", "nan"), "Invalid value for '--threshold': nan is not a finite number."),
        (("--fpir", "nan"), "Invalid value for '--fpir': nan is not a finite number."),
        (("--ranks", "0"), "Invalid value for '--ranks': 0 is not in the range x>=1."),
    ],
)
def test_numbers_out_of_range_are_refused(world: Path, words: tuple[str, ...], message: str) -> None:
    _, said = outsize("identify", world / "g", world / "people", "--embedder", world / "faces", *words, code=2)
    assert message in said


def test_bad_pictures_among_good_ones_are_named_and_folders_of_folders_refused(world: Path, gallery: Path) -> None:
    words = ("--embedder", world / "faces", "-k", "3")
    folder = gallery.parent / "visitors"
    shutil.copytree(world / "people" / name(4), folder)
    pictures = sorted(folder.iterdir())
    pictures[1].write_bytes(pictures[1].read_bytes()[:200])
    found, said = outsize("identify", gallery, folder, *words, code=3)
    assert [Path(face["image"]) for face in found["faces"]] == [pictures[0], pictures[2]]
    assert f"{pictures[1]}: it cannot be read: " in said
    shown = commands.outsize_here("face", "identify", gallery, pictures[0], *words[:2], "-k", str(PEOPLE)).stdout
    assert f"(none of {PEOPLE} strangers), " in shown or " % of strangers), " in shown
    assert f"(all of {PEOPLE} strangers)" in shown
    assert "e+" not in shown
    _, said = outsize("identify", gallery, world / "people", *words, code=2)
    assert said.endswith(f"got none but {PEOPLE} folders; name those\n")


def test_pairs_without_their_pictures_are_named_counted_and_end_with_code_3(world: Path, tmp_path: Path) -> None:
    lines = (world / "people" / "pairs.txt").read_text().splitlines()
    lost = [f"{name(0)}\t{number + 100}\t1" for number in range(25)]
    (tmp_path / "pairs.txt").write_text("\n".join([lines[0], *lost, *lines[26:]]))
    words = ("evaluate", world / "people", "--embedder", world / "faces", "--pairs", tmp_path / "pairs.txt")
    found, said = outsize(*words, "--far", "0.25,2.5e-3", code=3)
    assert (found["pairs"]["pairs"], found["pairs"]["left_out"]) == (575, 25)
    assert f"line 2 of the pairs: there is no picture 100 of {name(0)} that can be used" in said
    assert "picture 119 of" in said
    assert "picture 120 of" not in said
    assert "\n5 more of the pairs' pictures cannot be used\n" in said


def test_a_sample_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = list[str](), Image.Image.save

    def stop(image: Image.Image, path: Path) -> None:
        saved.append(path.name)
        if len(saved) == 5:
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", stop)
    outsize("sample", tmp_path / "people", code=130)
    assert list((tmp_path / "people").iterdir()) == []
    monkeypatch.undo()
    assert outsize("sample", tmp_path / "people", "--identities", "2", "--images", "2")[0]["images"] == 4


class _Page(HTMLParser):
    """Tags in their order, and that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_an_embedder_is_evaluated_with_a_page(world: Path, tmp_path: Path) -> None:
    people, page = world / "people", tmp_path / "page.html"
    words = ("evaluate", people, "--embedder", world / "faces", "--pairs", people / "pairs.txt", "--report", page)
    found, said = outsize(*words, "--far", "0.5,1e-1,1e-6")
    assert found["verification"]["genuine_pairs"] == PEOPLE * 3
    assert found["verification"]["impostor_pairs"] == 72 * 71 // 2 - PEOPLE * 3
    half, tenth, none = found["verification"]["points"]
    assert 0.2 < tenth["true_accept_rate"] < half["true_accept_rate"] <= 1
    assert (none["threshold"], none["true_accept_rate"]) == (None, None)
    assert len(found["pairs"]["folds"]) == 10
    assert found["pairs"]["pairs"] == 600
    assert 0.5 < found["pairs"]["accuracy"] < 1
    assert 0.1 < found["identification"]["match_rates"][0] <= found["identification"]["match_rates"][-1] == 1.0
    text = page.read_text()
    parser = _Page()
    parser.feed(text)
    assert parser.open == []
    lines = [attributes["points"] or "" for tag, attributes in parser.seen if tag == "polyline"]
    assert len(lines) == 5  # ROC, two of scores, CMC, DET
    for line in lines:
        points = np.array([point.split(",") for point in line.split()], float)
        assert points.min() >= -0.1
        assert (points.max(axis=0) <= (720.1, 240.1)).all()
        assert len(points) > 5
    assert not re.search(r"(src|href)=", text)
    assert "http" not in text
    assert "too few pairs to tell" in text
    assert "exists" in outsize(*words, code=1)[1]
    assert found["failed"] == []
    assert "1 file left alone" in said


def test_embeddings_give_the_same_numbers_as_pictures(world: Path, tmp_path: Path) -> None:
    people = world / "people"
    embedder = load_embedder(world / "faces")
    files = sorted(people.glob("*/*.png"))
    pixels = torch.from_numpy(np.stack([read_picture(file, SIZE, SIZE).pixels for file in files]))
    np.save(tmp_path / "e.npy", embedder.embed(pixels).numpy())
    (tmp_path / "names.txt").write_text("\n".join(file.parent.name for file in files))
    arrays = ("--embeddings", tmp_path / "e.npy", "--labels", tmp_path / "names.txt")
    found, _ = outsize("evaluate", *arrays, "--pairs", people / "pairs.txt")
    expected, _ = outsize("evaluate", people, "--embedder", world / "faces", "--pairs", people / "pairs.txt")
    assert found["pairs"]["accuracy"] == pytest.approx(expected["pairs"]["accuracy"], abs=0.01)
    for one, other in zip(found["verification"]["points"], expected["verification"]["points"], strict=True):
        assert (one["allowed"], one["is_sure"]) == (other["allowed"], other["is_sure"])
        if one["threshold"] is not None:
            assert one["threshold"] == pytest.approx(other["threshold"], abs=1e-5)
    assert found["identification"]["match_rates"] == pytest.approx(expected["identification"]["match_rates"], abs=0.03)
    np.save(tmp_path / "labels.npy", np.arange(len(files)) // PICTURES)
    words = ("evaluate", "--embeddings", tmp_path / "e.npy", "--labels", tmp_path / "labels.npy")
    numbered, _ = outsize(*words)
    assert numbered["verification"]["points"] == found["verification"]["points"]
    # Rates are shown as they are, not rounded to a digit.
    shown = commands.outsize_here("face", *words, "--far", "0.25,2.5e-3").stdout
    assert [line.split()[0] for line in shown.splitlines()[5:7]] == ["2.5e-1", "2.5e-3"]
    # What - stands for is said, if there is no ? beside it.
    shown = commands.outsize_here("face", *words, "--far", "1e-1,1e-6", "--strangers", "0").stdout
    assert "1e-6                       -" in shown
    assert " ?" not in shown
    assert shown.splitlines()[-1].endswith("- not even one: these pictures cannot tell")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give either a folder of pictures with --embedder, or --embeddings"),
        (("{people}",), "pictures need --embedder"),
        (("--embeddings", "{e}"), "--embeddings needs --labels"),
        (
            ("--embeddings", "{people}/pairs.txt", "--labels", "{people}/pairs.txt"),
            "pairs.txt must be an array of numpy.save, got another kind of file",
        ),
        (("--embeddings", "{pickled}", "--labels", "{e}"), "pickled.npy must be an array that can be read: Object arr"),
        (
            ("--embeddings", "{e}", "--labels", "nowhere.txt"),
            "nowhere.txt must be labels, one a line, that can be read",
        ),
        (("--embeddings", "{flat}", "--labels", "{e}"), "must hold real numbers as (pictures, dim), got float64 (3,)"),
        (("--embeddings", "{e}", "--labels", "{people}/pairs.txt"), "each embedding needs a label, got 3 and 601"),
        (("{people}", "--embedder", "{faces}", "--far", "2"), "a rate must be"),
        (("{people}", "--embedder", "{faces}", "--report", "x.png"), "its name ends in .html"),
        (("{people}", "--embedder", "{faces}", "--pairs", "{e}"), "must be a list of pairs as text"),
        (("{people}", "--embedder", "{faces}", "--pairs", "nowhere.txt"), "list of pairs as text: No such file"),
        (
            ("--embeddings", "nowhere.npy", "--labels", "{e}"),
            "nowhere.npy must be an array that can be read: No such f",
        ),
        (("{people}", "--embedder", "{faces}", "--memory", "300MB"), "the budget is 300 MB"),
    ],
)
def test_contradictions_are_refused_before_the_work(
    world: Path, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    np.save(tmp_path / "e.npy", np.eye(3))
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    places = {"people": world / "people", "faces": world / "faces"}
    places |= {name: tmp_path / f"{name}.npy" for name in ("e", "flat", "pickled")}
    _, said = outsize("evaluate", *(word.format(**places) for word in words), code=2)
    last = said.strip().splitlines()[-1]
    assert last.startswith("outsize: error: ")
    assert reason in last
    assert "Errno" not in last
