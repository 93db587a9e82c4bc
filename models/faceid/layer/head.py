"""The sharded margin classifier: millions of classes as rows, on any number of ranks, without batch x classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.errors import HeadError
from .class_rows import ClassRows
from .margin_softmax import compute_full_loss, compute_loss

LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


class ShardedMarginHead(ClassRows):
    """Margin softmax over `classes` unit rows: forward(features, labels) -> the global mean loss over valid labels.

    With `sample` below 1 (Partial FC) a step sees the rows of the batch's own classes and a share of the others, costs
    as much as these, and touches no others: their rows and state keep their bits. `full_loss` is over all classes.

    Guarantee: loss, feature gradients and rows equal those of the dense layer of the classes that a step sees
    (`compute_dense_loss`) up to rounding, and are bitwise equal for any number of ranks and threads with the same
    global batch in the order of ranks, on one machine type. While it computes, torch's operations go on one thread
    each, in as many threads as torch had.

    Args:
        classes: of all ranks together.
        dim: numbers of a feature.
        margin: "arcface", "cosface", "softmax", or (m1, m2, m3).
        margin_value: of the named margin; None: 0.5 for arcface, 0.35 for cosface.
        scale: s, by which cosines are multiplied.
        exact_margin_gradient: False: as InsightFace, whose gradient leaves out the margin's own slope.
        storage: of rows. float16 and bfloat16 are computed in float32 and rounded stochastically.
        rule: how rows follow their gradient inside backward, once a forward. None: rows are an ordinary Parameter with
            an ordinary gradient, for any optimiser of torch.
        sample: share of the rows that a step sees, in strips of `strip_rows` neighbours drawn anew for each step, of
            each tablet as many as the share comes to, at least one. Own classes come in addition.
        denominator: "corrected": each row counts 1 / its probability of being seen, so that the sum of exponentials
            is an unbiased estimate of that over all classes. "pfc": the softmax over the rows that are seen, as
            InsightFace's Partial FC.
        seed: of the first rows, of rounding and of sampling.
        group: the ranks; None: torch.distributed's default group, or one rank without it.
        ddp_scale: multiply the features' gradient by the number of ranks, since DDP averages over them.
        keep_cosines: hold batch x own rows numbers between the passes, for a quarter less work.
        tablet_rows, block_rows, strip_rows: of the layout; other blocks give other last bits, other strips other rows.

    Raises:
        HeadError: a rule is broken.
    """

    def dense_weight(self) -> Tensor:
        """(classes, dim) on every rank: for small layers. With rule=None and one rank, part of the graph."""
        parts = [
            self.rows[start : start + tablet.rows] for tablet, start in zip(self.tablets, self.starts(), strict=True)
        ]
        mine = torch.cat(parts) if parts else self.rows[:0]
        if self.ranks.size == 1:
            return mine
        counts = [sum(t.rows for t in self.layout.owned(rank)) for rank in range(self.ranks.size)]
        return self.ranks.gather_tablets(mine.detach(), counts)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the global batch's valid labels of cross-entropy over the classes that the step sees.

        All classes with sample=1; otherwise in eval mode and under no_grad too those of the next step: see `full_loss`.

        Args:
            features: (samples, dim) of this rank, of any length but 0; ranks may have different numbers, or none.
            labels: (samples,) whole numbers; -1 is padding.

        Raises:
            HeadError: wrong shapes or labels.
        """
        labels = self._check(features, labels)
        if self.rule is not None and torch.is_grad_enabled() and not features.requires_grad:
            features = features.detach().requires_grad_()  # a frozen backbone: rows still learn, inside backward
        return compute_loss(self, features, labels)

    @torch.no_grad()
    def full_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The exact loss over all classes, whatever `sample` is; nothing moves, and no step is counted.

        Called by all ranks, as forward is, at the cost of a first pass over all rows.

        Raises:
            HeadError: wrong shapes or labels.
        """
        return compute_full_loss(self, features, self._check(features, labels))

    def _check(self, features: Tensor, labels: Tensor) -> Tensor:
        """The labels in 64 bits; what is refused ends the call of the other ranks too."""
        try:
            return self._read_labels(features, labels)
        except HeadError:
            self.ranks.refuse_batch(self.rows.device)
            raise

    def _read_labels(self, features: Tensor, labels: Tensor) -> Tensor:
        self.require_whole()
        if not isinstance(features, Tensor) or not isinstance(labels, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError(
                f"features and labels must be tensors, got {type(features).__name__} and {type(labels).__name__}"
            )
        if features.ndim != 2 or features.shape[1] != self.dim or labels.shape != features.shape[:1]:
            raise HeadError(
                f"features must be (samples, {self.dim}) and labels (samples,), got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if not features.is_floating_point():
            raise HeadError(f"features must be real numbers in floating point, got {features.dtype}")
        if labels.dtype not in LABELS:
            raise HeadError(f"labels must be whole numbers, -1 for padding, got {labels.dtype}")
        if not features.device == labels.device == self.rows.device:
            raise HeadError(
                f"features, labels and rows must be on one device, got {features.device}, {labels.device} and "
                f"{self.rows.device}"
            )
        state = self.rule.state_dtype(self.storage) if self.rule is not None else self.storage
        if (self.rows.dtype, self.state.dtype) != (self.storage, state):
            raise HeadError(
                f"rows and state must stay {self.storage} and {state} as they were made, got {self.rows.dtype} and "
                f"{self.state.dtype}; leave the layer out of half(), double() and to(dtype), and give storage="
            )
        labels = labels.long()
        if len(labels) and (int(labels.max()) >= self.classes or int(labels.min()) < -1):
            raise HeadError(
                f"labels must be -1 or in 0 ... {self.classes - 1}, got {int(labels.min())} ... {int(labels.max())}"
            )
        return labels
