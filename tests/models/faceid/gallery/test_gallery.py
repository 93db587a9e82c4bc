"""Galleries: exact answers for any ranks and budget, changes that are whole or not there, and nothing left of whom
was removed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from filelock import FileLock
from outsize.models.faceid.base.errors import GalleryError, HeadError, HeadMemoryError
from outsize.models.faceid.base.name_list import NAMES, NameList
from outsize.models.faceid.gallery.files import Calibration
from outsize.models.faceid.gallery.gallery import Gallery
from outsize.models.faceid.gallery.lookup import Answer
from outsize.models.faceid.gallery.top_k import exact_scores, unit_rows

from . import gallery_job

pytestmark = pytest.mark.system

DIM = 19


def vectors(count: int, seed: int) -> npt.NDArray[np.float32]:
    return unit_rows(np.random.default_rng(seed).normal(size=(count, DIM)))


def make(folder: Path, storage: str = "float32", tablet_rows: int = 8) -> Gallery:
    return Gallery.create(folder, dim=DIM, embedder="e" * 64, storage=storage, tablet_rows=tablet_rows, threads=1)


def named(answers: list[Answer]) -> list[list[tuple[str, float]]]:
    return [[(match.name, match.score) for match in answer.matches] for answer in answers]


def expect(
    people: dict[str, npt.NDArray[np.floating]], queries: npt.NDArray[np.float32], k: int
) -> list[list[tuple[str, float]]]:
    """The same from a dictionary of templates, in plain Python."""
    found = []
    for query in queries:
        best = [
            (name, max(float(exact_scores(row[None], query[None])[0]) for row in rows)) for name, rows in people.items()
        ]
        found.append(sorted(best, key=lambda entry: -entry[1])[:k])
    return found


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_changes_and_answers_are_those_of_a_dictionary(tmp_path: Path, storage: str) -> None:
    """A hundred random changes; after each the gallery, and one opened anew, say what the dictionary says."""
    gallery = make(tmp_path / "g", storage)
    people: dict[str, npt.NDArray[np.floating]] = {}
    chance = random.Random(3)
    queries = vectors(3, 99)
    for turn in range(100):
        fresh = vectors(chance.randint(1, 7), turn)
        kept = fresh.astype(storage)
        what = chance.choice(["enroll", "enroll", "add", "replace", "remove", "remove"])
        some = chance.sample(sorted(people), min(len(people), chance.randint(1, 6)))
        if what == "enroll":
            names = [f"{turn}-{place // 2}" for place in range(len(fresh))]
            gallery.enroll(names, fresh)
            for name in names:
                people[name] = kept[[place for place, other in enumerate(names) if other == name]]
        elif what == "remove" and some:
            gallery.remove(some)
            for name in some:
                del people[name]
        elif some:
            names = [some[place % len(some)] for place in range(len(fresh))]
            gallery.enroll(names, fresh, add=True) if what == "add" else gallery.replace(names, fresh)
            for name in set(names):
                new = kept[[place for place, other in enumerate(names) if other == name]]
                people[name] = np.concatenate([people[name], new]) if what == "add" else new
        wanted = expect(people, queries, 4)
        for one in (gallery, Gallery.open(tmp_path / "g", threads=1)) if turn % 9 == 0 else (gallery,):
            assert named(one.identify(queries, 4)) == wanted
            assert list(one.names()) == list(people)
            assert (one.people, one.templates) == (len(people), sum(map(len, people.values())))
    assert not gallery.find_damage()
    assert gallery.generation > 50
    files = sorted(path.name for path in (tmp_path / "g").iterdir() if path.name != "lock")
    assert len([name for name in files if name.startswith("generation-")]) == 1
    assert sum(name.startswith("rows-") for name in files) <= 2 * -(-gallery.templates // 8) + 2


def test_the_answer_is_faiss_s_over_the_stored_rows(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    gallery = make(tmp_path / "g", "float16", 64)
    rows, queries = vectors(701, 0), vectors(11, 1)
    gallery.enroll([str(number) for number in range(701)], rows)
    index = faiss.IndexFlatIP(DIM)
    index.add(rows.astype(np.float16).astype(np.float32))
    scores, found = index.search(queries, 5)
    answers = named(gallery.identify(queries, 5))
    assert [[int(name) for name, _ in answer] for answer in answers] == found.tolist()
    assert np.array([[score for _, score in answer] for answer in answers]) == pytest.approx(scores, abs=1e-6)


def test_one_two_and_three_ranks_have_the_same_bits(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g", tablet_rows=32)
    gallery.enroll([f"p{number % 150}" for number in range(211)], vectors(211, 0))
    queries = vectors(9, 1)
    alone = [f"{m.name} {m.score.hex()}" for answer in gallery.identify(queries, 6) for m in answer.matches]
    assert len(alone) == 54
    for ranks in (2, 3):
        (tmp_path / str(ranks)).mkdir()
        np.save(tmp_path / str(ranks) / "queries.npy", queries)
    jobs = [f"{ranks}:{tmp_path / str(ranks)}" for ranks in (2, 3)]
    command = [sys.executable, "-W", "ignore", gallery_job.__file__, str(tmp_path / "g"), *jobs]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for ranks in (2, 3):
        for rank in range(ranks):
            assert (tmp_path / str(ranks) / f"{rank}.txt").read_text().split("\n") == alone


def test_rows_from_the_disk_and_from_memory_answer_the_same_within_the_plan(tmp_path: Path) -> None:
    make(tmp_path / "g", "float16", 64).enroll([str(number) for number in range(300)], vectors(300, 0))
    queries = vectors(40, 1)
    small, large = (Gallery.open(tmp_path / "g", memory=size, threads=2) for size in ("538MB", "2GB"))
    assert small.plan_identify(40).reads_disk is False  # tiny rows fit everywhere
    rows = large.plan_identify(40).rows_bytes
    tight = Gallery.open(tmp_path / "g", memory=large.plan_identify(40).total_bytes - rows // 2, threads=2)
    assert tight.plan_identify(40).reads_disk
    assert "read from the disk" in tight.plan_identify(40).explain()
    assert named(tight.identify(queries)) == named(large.identify(queries)) == named(large.identify(queries))
    with pytest.raises(HeadMemoryError, match="the budget is 300 MB"):
        Gallery.open(tmp_path / "g", memory="300MB").identify(queries)


MEASURED = """
    import sys
    import numpy as np
    from outsize.models.faceid.gallery.gallery import Gallery
    from outsize.tiler.system.meter import MemoryMeter, process_bytes
    gallery = Gallery.open(sys.argv[1], memory=sys.argv[2], threads=2)
    queries = np.random.default_rng(1).normal(size=(300, 256))
    before = process_bytes()
    with MemoryMeter() as meter:
        gallery.identify(queries, 5)
    plan = gallery.plan_identify(300, 5)
    print(plan.reads_disk, max(meter.peak_bytes, meter.current_bytes), plan.total_bytes, before)
"""


def test_memory_stays_below_the_plan_and_does_not_grow_with_rows_on_the_disk(tmp_path: Path) -> None:
    """200,000 rows of 205 MB, in a process of its own: kept where the budget allows it, else read for each pass."""
    gallery = Gallery.create(tmp_path / "g", dim=256, embedder="e", threads=1)
    rows = np.random.default_rng(0).standard_normal((200_000, 256), dtype=np.float32)
    gallery.enroll([str(number) for number in range(200_000)], rows)
    grown = {}
    for budget in ("900MB", "650MB"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEASURED), str(tmp_path / "g"), budget],
            capture_output=True,
            text=True,
            check=True,
        )
        reads_disk, peak, total, before = done.stdout.split()
        assert int(peak) < int(total) < int(budget[:-2]) * 1_000_000
        grown[reads_disk] = int(peak) - int(before)
    assert grown.keys() == {"True", "False"}
    assert grown["False"] - grown["True"] > 100_000_000


def test_nothing_is_left_of_whom_was_removed(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g")
    assert (tmp_path / "g").stat().st_mode & 0o777 == 0o700
    rows = vectors(30, 0)
    names = [f"person {number}" for number in range(30)]
    gallery.enroll(names, rows)
    gallery.calibrate()
    everything = b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    assert rows[17].tobytes() in everything
    assert b"person 17" in everything
    assert gallery.remove(["person 17"]) == 1
    everything = b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    assert b"person 17" not in everything
    for part in range(DIM - 1):
        assert rows[17, part : part + 2].tobytes() not in everything
    assert rows[18].tobytes() in everything
    assert gallery.calibration is None
    assert named(gallery.identify(rows[17:18], 1))[0][0][0] != "person 17"
    gallery.enroll(["person 17"], rows[16:17])
    assert [name for name, _ in named(gallery.identify(rows[16:17], 2))[0]] == ["person 16", "person 17"]
    gallery.replace(["person 3"], rows[17:18])
    assert rows[3].tobytes() not in b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())


def test_what_an_interrupted_change_left_is_deleted_when_the_gallery_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = make(tmp_path / "g")
    rows = vectors(20, 0)
    gallery.enroll([str(number) for number in range(20)], rows)
    monkeypatch.setattr("outsize.models.faceid.gallery.gallery.remove_leftovers", lambda *_: 0)  # as if killed before
    gallery.remove(["5"])
    everything = b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    assert rows[5].tobytes() in everything
    monkeypatch.undo()
    lock = FileLock(tmp_path / "g" / "lock")
    with lock:
        assert "5" not in Gallery.open(tmp_path / "g")  # another process changes it: let its files alone
    assert rows[5].tobytes() in b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())
    Gallery.open(tmp_path / "g")
    assert rows[5].tobytes() not in b"".join(path.read_bytes() for path in (tmp_path / "g").iterdir())


JOB = """
    import sys
    import numpy as np
    from outsize.models.faceid.gallery.gallery import Gallery
    gallery = Gallery.open(sys.argv[1], threads=1)
    rows = np.eye(64, dtype=np.float32)
    number = gallery.generation
    print("ready", flush=True)
    while True:
        number += 1
        names = [f"{number}-{place}" for place in range(64)]
        if names_now := list(gallery.names()):
            gallery.remove(names_now)
        gallery.enroll(names, np.roll(rows, number, axis=0))
        print(number, flush=True)
"""


def test_a_kill_at_any_moment_of_a_change_leaves_a_whole_gallery(tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / "g", dim=64, embedder="e", tablet_rows=16, threads=1)
    gallery.enroll([f"0-{place}" for place in range(64)], np.eye(64))
    random.seed(7)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(JOB), str(tmp_path / "g")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        promised = int(process.stdout.readline())
        time.sleep(random.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = {path.name for path in (tmp_path / "g").iterdir()}
        gallery = Gallery.open(tmp_path / "g", threads=1)
        assert not gallery.find_damage()
        assert len({path.name for path in (tmp_path / "g").iterdir()}) <= len(before)
        names = list(gallery.names())
        if names:  # else between removing and enrolling
            turns = {int(name.split("-")[0]) for name in names}
            assert len(names) == 64
            assert len(turns) == 1
            assert min(turns) >= promised
            found = named(gallery.identify(np.roll(np.eye(64), min(turns), axis=0), 1))
            assert [answer[0] for answer in found] == [(name, 1.0) for name in names]


@pytest.mark.parametrize("kind", ["rows", "names", "generation"])
def test_a_flipped_byte_is_found(tmp_path: Path, kind: str) -> None:
    gallery = make(tmp_path / "g")
    gallery.enroll([str(number) for number in range(9)], vectors(9, 0))
    path = sorted((tmp_path / "g").glob(f"{kind}-*"))[0]
    value = bytearray(path.read_bytes())
    value[len(value) // 2] ^= 1
    path.write_bytes(value)
    if kind == "rows":
        assert gallery.find_damage() == [f"{path.name}: its checksum is not the manifest's"]
        with pytest.raises(GalleryError, match=f"{path.name} is damaged"):
            gallery.remove(["0"])  # which would give damage a new checksum
    else:
        with pytest.raises(GalleryError, match="damaged"):
            Gallery.open(tmp_path / "g")


def test_wrong_calls_are_refused_in_words_and_change_nothing(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g")
    rows = vectors(4, 0)
    gallery.enroll(["a", "b", "b"], rows[:3])
    assert (gallery.people, gallery.templates) == (2, 3)
    with pytest.raises(HeadError, match="b is in the gallery already; replace them"):
        gallery.enroll(["b", "c"], rows[:2])
    with pytest.raises(HeadError, match="c, d are not in the gallery"):
        gallery.remove(["d", "a", "c"])
    with pytest.raises(HeadError, match="c is not in the gallery"):
        gallery.replace(["c"], rows[:1])
    with pytest.raises(HeadError, match=r"must be \(faces, 19\) for this gallery, got \(2, 7\)"):
        gallery.identify(rows[:2, :7])
    with pytest.raises(HeadError, match="each embedding needs a name"):
        gallery.enroll(["c"], rows[:2])
    for name in ("", " a", "a\nb", "x" * 256, "\udcff"):
        with pytest.raises(HeadError, match="a name must be"):
            gallery.enroll([name], rows[:1])
    with pytest.raises(HeadError, match="finite and not zero"):
        gallery.enroll(["c"], rows[:1] * 0)
    with pytest.raises(HeadError, match="new or empty folder"):
        make(tmp_path / "g")
    with pytest.raises(GalleryError, match="made by another embedder: eeeeeeeeeeeeeeee there, ffffffffffffffff now"):
        Gallery.open(tmp_path / "g", embedder="f" * 64)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GalleryError, match="is no gallery: it has no generation"):
        Gallery.open(tmp_path / "empty")
    lock = FileLock(tmp_path / "g" / "lock")
    with lock, pytest.raises(GalleryError, match="another process is changing"):
        gallery.remove(["a"])
    other = Gallery.open(tmp_path / "g")
    assert list(gallery.names()) == list(other.names()) == ["a", "b"]
    other.enroll(["c"], rows[3:])
    with pytest.raises(GalleryError, match="open it again"):
        gallery.identify(rows[:1])
    gallery.reload()
    assert named(gallery.identify(rows[3:], 1)) == [[("c", pytest.approx(1))]]
    gallery.remove(["a", "b", "c"])
    assert gallery.identify(rows[:1])[0] == Answer(matches=(), nearest=-np.inf)


def test_strangers_are_rejected_at_the_rate_of_the_calibration(tmp_path: Path) -> None:
    """Of strangers' best scores at most the stated share lies beyond the threshold, and one more would be too many."""
    gallery = make(tmp_path / "g", tablet_rows=64)
    gallery.enroll([str(number) for number in range(150)], vectors(150, 0))
    with pytest.raises(HeadError, match="no calibration"):
        gallery.threshold_for(0.1)
    strangers = vectors(400, 1)
    gallery.calibrate(strangers)
    gallery = Gallery.open(tmp_path / "g", threads=1)
    best = np.array([answer.nearest for answer in gallery.identify(strangers, 1)])
    for rate in (0.025, 0.1, 0.29, 0.5):
        threshold = gallery.threshold_for(rate)
        assert np.count_nonzero(best > threshold) == round(rate * 400)
        named_ = [bool(answer.matches) for answer in gallery.identify(strangers, 1, threshold)]
        assert sum(named_) == round(rate * 400)
    assert gallery.rate_of(float(np.sort(best)[-4])) == 0.01
    with pytest.raises(HeadError, match=r"at least 1,000 faces, this one has 400; .* from 0\.025 on"):
        gallery.threshold_for(0.01)
    # Persons of the gallery, each compared with all others.
    calibration = gallery.calibrate(probes=60)
    chosen = np.unique(np.linspace(0, 149, 60).astype(int))
    rows = vectors(150, 0)
    scores = rows.astype(np.float64) @ rows.astype(np.float64).T
    np.fill_diagonal(scores, -1)
    assert calibration.of == "enrolled"
    assert calibration.scores == pytest.approx(np.sort(scores[chosen].max(axis=1))[::-1], abs=1e-6)


def test_a_change_with_its_calibration_is_one_change(tmp_path: Path) -> None:
    """The same scores as of a calibration afterwards, also where so many go that rows are put together again."""
    names, rows = [str(number) for number in range(40)], vectors(40, 0)
    found: list[list[Calibration | None]] = []
    for at_once in (True, False):
        gallery = make(tmp_path / f"{at_once}")
        calibrations = list[Calibration | None]()
        for change in (
            partial(gallery.enroll, names, rows),
            partial(gallery.replace, names[:3], vectors(3, 1)),
            partial(gallery.enroll, ["0", "more"], vectors(2, 2), add=True),
            partial(gallery.remove, names[2:38]),
        ):
            before = gallery.generation
            if at_once:
                change(calibrate=True)
                assert gallery.generation == before + 1
            else:
                change()
                assert gallery.calibration is None
                gallery.calibrate()
            calibrations.append(Gallery.open(gallery.folder).calibration)
        assert not gallery.find_damage()
        found.append(calibrations)
        gallery.remove(["0", "1", "38", "39"], calibrate=True)  # nobody is left to compare her with
        assert (list(gallery.names()), gallery.calibration) == (["more"], None)
    assert found[0] == found[1]
    assert [len(calibration.scores) for calibration in found[0] if calibration] == [40, 40, 41, 5]


def test_a_change_whose_calibration_is_stopped_has_not_been(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g")
    gallery.enroll(["Ada", "Eve", "Zoe"], vectors(3, 0), calibrate=True)
    files, calibration = {path.name for path in (tmp_path / "g").iterdir()}, gallery.calibration

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    for change in (partial(gallery.remove, ["Eve"]), partial(gallery.replace, ["Ada"], vectors(1, 1))):
        with pytest.raises(KeyboardInterrupt):
            change(calibrate=True, tell=stop)
        assert {path.name for path in (tmp_path / "g").iterdir()} == files
        assert (gallery.generation, gallery.calibration, list(gallery.names())) == (
            1,
            calibration,
            ["Ada", "Eve", "Zoe"],
        )
        assert [answer[0][0] for answer in named(gallery.identify(vectors(3, 0), 1))] == ["Ada", "Eve", "Zoe"]
    assert gallery.remove(["Eve"], calibrate=True) == 1
    assert list(Gallery.open(tmp_path / "g").names()) == ["Ada", "Zoe"]


def test_only_a_gallery_that_never_had_anybody_is_discarded(tmp_path: Path) -> None:
    gallery = make(tmp_path / "g")
    gallery.enroll(["Ada"], vectors(1, 0))
    gallery.remove(["Ada"])
    files = {path.name for path in (tmp_path / "g").iterdir()}
    Gallery.discard(tmp_path / "g")
    assert {path.name for path in (tmp_path / "g").iterdir()} == files
    make(tmp_path / "new")
    (tmp_path / "new" / "notes.txt").touch()
    with FileLock(str(tmp_path / "new" / "lock")):
        Gallery.discard(tmp_path / "new")  # somebody is at work on it
    assert Gallery.open(tmp_path / "new").people == 0
    Gallery.discard(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["notes.txt"]


def test_names_are_found_by_number_and_by_name_over_chunks() -> None:
    names = NameList()
    everyone = [f"näme {number}" for number in range(NAMES + 37)]
    assert names.change([], everyone) == {0, 1}
    assert len(names) == NAMES + 37
    assert [names.name(number) for number in (0, 9, NAMES - 1, NAMES, NAMES + 36)] == [
        everyone[number] for number in (0, 9, NAMES - 1, NAMES, NAMES + 36)
    ]
    few, many = everyone[5 : NAMES + 37 : 8000], everyone[::97]
    for some in (few, many):
        assert names.find([*some, "näme", "äme 1"]) == {name: everyone.index(name) for name in some}
    assert names.change([NAMES + 3], ["last"]) == {1}
    assert names.name(NAMES + 3) == ""
    assert names.name(NAMES + 37) == "last"
    assert list(names) == [*everyone[: NAMES + 3], *everyone[NAMES + 4 :], "last"]
    again = NameList(names.chunks)
    assert (len(again), list(again)) == (len(names), list(names))
