"""What strangers may leave in folders of faces: names that forge lines, pipes for pictures, names in two forms."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from outsize.models.faceid.gallery.files import HEADER_BYTES
from outsize.sample_data.faces import write_faces

from ...support import commands
from ...support.embedders import make_embedder

pytestmark = pytest.mark.system

NFC, NFD = unicodedata.normalize("NFC", "René"), unicodedata.normalize("NFD", "René")
FORGED = "x\nAda: 0.9999\n.png"


def outsize(*words: str | Path, code: int = 0, as_json: bool = True) -> tuple[dict[str, Any], str]:
    """(values, both outputs) of a command."""
    done = commands.outsize_here(*(["--json"] if as_json else []), "face", *words)
    assert done.returncode == code, done.stderr
    values = json.loads(done.stdout.splitlines()[-1]) if as_json and done.stdout.strip() else {}
    return values, done.stdout + done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_faces(root / "people", identities=6, images=2)
    make_embedder(root / "faces", 0)
    return root


@pytest.fixture
def people(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "people", tmp_path / "people")
    return tmp_path / "people"


def test_a_name_with_a_line_in_it_begins_no_line(world: Path, people: Path, tmp_path: Path) -> None:
    folders = sorted(path for path in people.iterdir() if path.is_dir())
    shutil.copy(next(folders[0].iterdir()), folders[0] / FORGED)
    (folders[1] / f"bad {FORGED}").write_text("no picture")
    (people / "Eve\nAda: enrolled").mkdir()
    shutil.copy(next(folders[2].iterdir()), people / "Eve\nAda: enrolled" / "1.png")
    (people / "stray\nAda: enrolled.txt").touch()
    embedder = ("--embedder", world / "faces")
    values, said = outsize("enroll", tmp_path / "g", people, *embedder, code=3)
    assert values["people"] == 6
    _, answer = outsize("identify", tmp_path / "g", folders[0] / FORGED, *embedder, as_json=False)
    _, trained = outsize(
        "train",
        tmp_path / "run",
        "--faces",
        people,
        "--batch",
        "4",
        "--dim",
        "8",
        "--steps",
        "1",
        "--held-out",
        "0",
        code=3,
    )
    for text in (said, answer, trained):
        assert "Ada" in text or "identity" in text
        assert not [line for line in text.splitlines() if line.lstrip().startswith("Ada")]
    _, said = outsize("remove", tmp_path / "g", "Eve\nAda: removed", code=2)
    assert said.splitlines()[-1].startswith("outsize: error:") or json.loads(said.splitlines()[0])["error"]
    assert not [line for line in said.splitlines() if line.startswith("Ada")]


def test_a_pipe_in_a_picture_s_place_is_named_and_not_waited_for(world: Path, people: Path, tmp_path: Path) -> None:
    folders = sorted(path for path in people.iterdir() if path.is_dir())
    os.mkfifo(folders[0] / "pipe.png")
    os.mkfifo(tmp_path / "pipe.png")
    (folders[1] / "zero.png").symlink_to("/dev/zero")
    embedder = ("--embedder", world / "faces")
    values, _ = outsize("enroll", tmp_path / "g", people, *embedder, code=3)
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in values["failed"]}
    assert reasons == {
        "pipe.png": "it cannot be read: it is a pipe, not a file",
        "zero.png": "it cannot be read: it is a device, not a file",
    }
    _, said = outsize("identify", tmp_path / "g", tmp_path / "pipe.png", *embedder, code=1)
    assert "it is a pipe, not a file" in said
    words = ("--batch", "4", "--dim", "8", "--steps", "4", "--held-out", "0", "--threads", "1")
    values, said = outsize("train", tmp_path / "run", "--faces", people, *words, code=3)
    assert values["unusable"] == 2
    for name in ("list.csv", "train.rec", "train.idx"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "more.rec").write_bytes(bytes(64))
    os.mkfifo(tmp_path / "more.idx")
    for name in ("list.csv", "train.rec", "more.rec"):
        _, said = outsize("train", tmp_path / "other", "--faces", tmp_path / name, *words, code=2)
        assert "it is a pipe, not a file" in said
    _, said = outsize("evaluate", people, *embedder, "--pairs", tmp_path / "list.csv", code=2)
    assert "it is a pipe, not a file" in said


def test_one_person_in_two_forms_of_unicode_is_enrolled_trained_and_removed_as_one(
    world: Path, people: Path, tmp_path: Path
) -> None:
    folders = sorted(path for path in people.iterdir() if path.is_dir())
    folders[0].rename(people / NFC)
    folders[1].rename(people / NFD)
    embedder = ("--embedder", world / "faces")
    values, _ = outsize("enroll", tmp_path / "g", people, *embedder, "--templates", "each")
    assert (values["people"], values["templates"]) == (5, 12)
    _, said = outsize("enroll", tmp_path / "g", people, *embedder, code=2)
    assert f"{NFC} and 0" not in said
    values, _ = outsize("remove", tmp_path / "g", NFD)
    assert (values["removed_people"], values["removed_templates"], values["people"]) == (1, 4, 4)
    assert NFC not in outsize("gallery", tmp_path / "g", "--names")[0]["names"]
    pictures = [str(path) for path in sorted(people.glob("*/*.png"))]
    lines = [
        f"{path},{NFC if place % 2 else NFD}" if place < 4 else f"{path},Zoe" for place, path in enumerate(pictures)
    ]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    words = ("--batch", "4", "--dim", "8", "--steps", "1", "--held-out", "0", "--threads", "1")
    outsize("train", tmp_path / "run", "--faces", tmp_path / "list.csv", *words)
    assert json.loads((tmp_path / "run" / "identities.json").read_text())["classes"] == [NFC, "Zoe"]


@pytest.mark.parametrize("place", ["row", "owner"])
def test_a_gallery_with_a_flipped_byte_names_nobody(world: Path, people: Path, tmp_path: Path, place: str) -> None:
    embedder = ("--embedder", world / "faces")
    outsize("enroll", tmp_path / "g", people, *embedder)
    path = next((tmp_path / "g").glob("rows-*"))
    value = bytearray(path.read_bytes())
    value[HEADER_BYTES + 3 if place == "row" else len(value) - 8] ^= 1
    path.write_bytes(value)
    picture = next(people.glob("*/*.png"))
    values, said = outsize("identify", tmp_path / "g", picture, *embedder, code=1)
    assert f"{path.name} is damaged: its checksum is not the manifest's" in values["error"]
    assert "identity-0" not in said
