"""What the ranks of a gallery's test run: python gallery_job.py RANK RANKS FOLDER GALLERY."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from outsize.models.faceid.gallery import Gallery
from torch import distributed as dist


def main(rank: int, ranks: int, folder: Path, place: str) -> None:
    """Look up the queries of FOLDER; the answer into a file of each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    gallery = Gallery.open(place)
    answers = gallery.identify(np.load(folder / "queries.npy"), 6)
    lines = [f"{match.name} {match.score.hex()}" for answer in answers for match in answer.matches]
    (folder / f"{rank}.txt").write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
