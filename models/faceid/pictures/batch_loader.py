"""Batches of a training: which samples a step sees, read and augmented by threads ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..base.errors import HeadError
from .augmentation import FaceAugmentation
from .sample_order import SampleOrder, share_of
from .source import FaceSource, Whole


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples that go through the embedder together."""

    images: Tensor
    """(n, height, width, 3) of 0 ... 255."""
    labels: Tensor
    """(n,); -1 where the picture cannot be used, which the head leaves out."""
    failed: list[tuple[str, str]]
    """(name, reason) of those."""
    grey: int = 0
    """Pictures without colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLoader:
    """Batches of all steps, a pure function of (source, seed, step): ranks share a step's micro-batches, in order."""

    source: FaceSource
    augmentation: FaceAugmentation
    batch: int
    """Samples of a step, of all ranks."""
    micro_batch: int
    """At most; the last of a step may have fewer."""
    seed: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1:
            raise HeadError(f"batch and micro-batch must be >= 1, got {self.batch} and {self.micro_batch}")
        if self.ranks > self.micro_batches:
            raise HeadError(
                f"{self.ranks} ranks need a micro-batch each, a batch of {self.batch} has {self.micro_batches} of "
                f"{self.micro_batch}; give a larger batch, smaller micro-batches or fewer ranks"
            )

    @property
    def micro_batches(self) -> int:
        """Of a step, all ranks'."""
        return -(-self.batch // self.micro_batch)

    def positions(self, step: int, number: int) -> Whole:
        """Of the samples of a micro-batch, in the order of the training; `step` counts from 0."""
        first = step * self.batch + number * self.micro_batch
        return np.arange(first, min(first + self.micro_batch, (step + 1) * self.batch), dtype=np.int64)

    def load(self, step: int, number: int) -> MicroBatch:
        """Read one micro-batch."""
        epochs, samples = SampleOrder(samples=len(self.source), seed=self.seed).at(self.positions(step, number))
        pictures, failed, grey = self.source.read(samples, epochs)
        labels = self.source.labels_of(samples, epochs).copy()
        images = np.zeros((len(samples), *self.source.size, 3), np.uint8)
        for place, pixels in enumerate(pictures):
            if pixels is None:
                labels[place] = -1
            else:
                images[place] = self.augmentation.apply(pixels, self.seed, int(epochs[place]), int(samples[place]))
        return MicroBatch(images=torch.from_numpy(images), labels=torch.from_numpy(labels), failed=failed, grey=grey)

    def run(self, first: int, end: int, threads: int, ahead: int = 2) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step first ... end - 1; `ahead` steps are read while one is computed."""
        mine = share_of(self.rank, self.ranks, self.micro_batches)
        with ThreadPoolExecutor(threads, thread_name_prefix="read faces") as pool:
            coming: deque[list[Future[MicroBatch]]] = deque()
            try:
                for step in range(first, end + ahead):
                    if step < end:
                        coming.append([pool.submit(self.load, step, number) for number in mine])
                    if step - first >= ahead and coming:
                        yield [future.result() for future in coming.popleft()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
