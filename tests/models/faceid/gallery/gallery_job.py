"""What the ranks of a gallery's test run: python gallery_job.py GALLERY RANKS:FOLDER ..., one after the other."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from outsize.models.faceid.gallery.gallery import Gallery
from torch import distributed as dist


def main(rank: int, ranks: int, folder: Path, place: str) -> None:
    """Look up the queries of FOLDER; the answer into a file of each rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    answers = Gallery.open(place).identify(np.load(folder / "queries.npy"), 6)
    lines = [f"{match.name} {match.score.hex()}" for answer in answers for match in answer.matches]
    (folder / f"{rank}.txt").write_text("\n".join(lines))
    dist.destroy_process_group()


def run_ranks(ranks: int, folder: Path, place: str) -> None:
    """All ranks, until they have ended."""
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            main(rank, ranks, folder, place)
            sys.exit()
        pids.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in pids):
        sys.exit(f"a rank of {ranks} ended badly")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for job in sys.argv[2:]:
        count, _, where = job.partition(":")
        run_ranks(int(count), Path(where), sys.argv[1])
