"""`outsize face identify`: who is on pictures, looked up by one process, or by ranks that share the gallery's rows."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...models.faceid.base.collectives import Ranks
from ...models.faceid.embedder.file import load_embedder
from ...models.faceid.gallery.gallery import Gallery
from ...models.faceid.gallery.lookup import Answer
from ...models.faceid.layer.head_plan import PROCESS_BYTES
from ...models.faceid.pictures.images import FORMATS, ImageError, is_picture
from ...tiler.base.errors import TilerError, UsageError
from ...tiler.base.text import one_line, parse_bytes
from ...tiler.system.machine import cpu_count, torch_threads
from ...tiler.system.meter import MemoryMeter
from ...tiler.system.process_end import end_with
from ..base.console import Console, count_of
from .benchmark import require_cores
from .gallery import open_gallery, require_memory, searching
from .pictures import BATCH, Pictures, embed_files
from .ranks import joined_torchrun, leave_ranks, run_as_rank, run_ranks
from .torchrun import is_started_by_torchrun, require_torchrun_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifyOptions:
    """What `face identify` is told."""

    gallery: Path
    images: tuple[Path, ...]
    embedder: Path
    k: int
    threshold: float | None
    fpir: float | None
    resize: bool
    memory: str
    """Of all ranks on this machine."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IdentifyOptions:
        paths = {"gallery": Path(values["gallery"]), "embedder": Path(values["embedder"])}
        return cls(**{**values, **paths, "images": tuple(map(Path, values["images"]))})


def run_identify(console: Console, options: IdentifyOptions, *, ranks: int) -> bool:
    """Say who is on each picture; False where some pictures could not be read.

    Started by torchrun, this process is one of its ranks, of which the first speaks.

    Raises:
        GalleryError: the gallery is another embedder's, or damaged.
        UsageError: no pictures; a threshold and a rate at once; another number of ranks than torchrun's.
        ImageError: not one picture could be used.
        RankError: a rank refused any of these, or ended early.
    """
    if is_started_by_torchrun():
        require_torchrun_ranks(ranks)
        with joined_torchrun() as local:
            found = identify_as_rank(console, options, local)
    elif ranks == 1:
        found = identify_as_rank(console, options, 1)
    else:
        require_cores(ranks)
        with tempfile.TemporaryDirectory() as folder:
            spec = {"options": asdict(options), "ranks": ranks}
            (Path(folder) / "spec.json").write_text(json.dumps(spec, default=str))
            found = run_ranks("outsize.pipelines.faces.identify", ranks, max(1, cpu_count() // ranks), Path(folder))
    if found is None:
        return True
    console.result(found["text"], found["values"])
    return not found["values"]["failed"]


def identify_as_rank(console: Console, options: IdentifyOptions, local: int) -> dict[str, Any] | None:
    """One rank: the first embeds and sends the embeddings to the others, each searches its tablets, the first returns
    text and values of the result. What the first refuses ends the others without a word.

    Args:
        local: ranks on this machine, which share its cores and the budget.
    """
    ranks = Ranks.of(None)
    with MemoryMeter() as meter:
        if ranks.rank == 0:
            try:
                first = _Prepared(console, options, local, ranks)
            except TilerError:
                ranks.share_first(None)
                leave_ranks()
                raise
            ranks.share_first(torch.from_numpy(first.pictures.embeddings))
            with searching(console) as tell:
                answers = first.gallery.identify(first.pictures.embeddings, options.k, first.threshold, tell=tell)
            peak = int(ranks.add(torch.tensor([meter.peak_bytes])))
            return first.describe(answers, peak)
        embeddings = ranks.share_first(None)
        if embeddings is not None:
            budget, threads = _share(options, local)
            Gallery.open(options.gallery, memory=budget, threads=threads).identify(embeddings.numpy(), options.k)
            ranks.add(torch.tensor([meter.peak_bytes]))
    return None


def _share(options: IdentifyOptions, local: int) -> tuple[int, int]:
    """(bytes, threads) of a rank."""
    return parse_bytes(options.memory) // local, max(1, cpu_count() // local)


class _Prepared:
    """What the first rank knows before the search."""

    def __init__(self, console: Console, options: IdentifyOptions, local: int, ranks: Ranks) -> None:
        if options.threshold is not None and options.fpir is not None:
            raise UsageError("give either --threshold or --fpir, not both")
        paths = _pictures_of(options.images)
        embedder = load_embedder(options.embedder)
        require_memory(embedder, options.memory, local)
        budget, threads = _share(options, local)
        self.options = options
        self.gallery = open_gallery(options.gallery, embedder, budget, threads=threads)
        self.threshold = options.threshold if options.fpir is None else self.gallery.threshold_for(options.fpir)
        if self.threshold is None:
            console.remark("no threshold: the nearest are named, whoever is on the picture; --fpir rejects strangers")
        plan = self.gallery.plan_identify(len(paths), options.k)
        console.remark_lines(plan.explain().split("\n"))
        # The others wait meanwhile; as many threads whatever the ranks, since other ones may give other last bits.
        with torch_threads(cpu_count()):
            self.pictures = embed_files(console, embedder, paths, resize=options.resize)
        if not self.pictures.paths:
            raise ImageError("none of the pictures can be used; what is wrong stands above")
        embedding = PROCESS_BYTES + embedder.plan_bytes(BATCH)
        self.predicted = max(plan.total_bytes, embedding) + (ranks.size - 1) * plan.total_bytes

    def describe(self, answers: list[Answer], peak: int) -> dict[str, Any]:
        """Text and values of the result."""
        pictures: Pictures = self.pictures
        pairs = list(zip(pictures.paths, answers, strict=True))
        return {
            "text": "\n".join(_answer_sentence(self.gallery, path, answer) for path, answer in pairs),
            "values": {
                "faces": [_describe_answer(self.gallery, path, answer) for path, answer in pairs],
                "threshold": self.threshold,
                "fpir": self.options.fpir,
                **pictures.counts(),
                "peak_bytes": peak,
                "predicted_peak_bytes": self.predicted,
            },
        }


def _describe_answer(gallery: Gallery, path: Path, answer: Answer) -> dict[str, Any]:
    matches = [
        {"name": match.name, "score": match.score, "stranger_rate": gallery.rate_of(match.score)}
        for match in answer.matches
    ]
    nearest = answer.nearest if gallery.people else None
    return {"image": str(path), "known": bool(matches), "matches": matches, "nearest": nearest}


def _answer_sentence(gallery: Gallery, path: Path, answer: Answer) -> str:
    if not answer.matches:
        nearest = f" (nearest {answer.nearest:.4f})" if gallery.people else " (the gallery is empty)"
        return f"{one_line(path)}: unknown{nearest}"
    parts = []
    for match in answer.matches:
        parts.append(f"{match.name} {match.score:.4f}{_rate_sentence(gallery, match.score)}")
    return f"{one_line(path)}: {', '.join(parts)}"


def _rate_sentence(gallery: Gallery, score: float) -> str:
    rate, calibration = gallery.rate_of(score), gallery.calibration
    if rate is None or calibration is None:
        return ""
    strangers = f"{len(calibration.scores):,} strangers"
    return f" ({100 * rate:.3g} % of strangers)" if 0 < rate < 1 else f" ({'all' if rate else 'none'} of {strangers})"


def _pictures_of(places: tuple[Path, ...]) -> list[Path]:
    """Files as they are named; of folders the pictures that lie in them."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.iterdir() if is_picture(path) and not path.is_dir())
            if not inside:
                folders = sum(path.is_dir() for path in place.iterdir())
                hint = f" but {count_of(folders, 'folder')}; name those" if folders else ""
                raise UsageError(f"{place} must hold pictures ({', '.join(FORMATS)}), got none{hint}")
            found += inside
        elif not place.exists():
            raise UsageError(f"{place} is not there")
        else:
            found.append(place)
    return found


def _work(spec: dict[str, Any]) -> dict[str, Any] | None:
    """What a rank does that `outsize face identify` started."""
    return identify_as_rank(Console(), IdentifyOptions.from_json(spec["options"]), spec["ranks"])


if __name__ == "__main__":
    end_with(lambda: run_as_rank(sys.argv[1:], _work))
