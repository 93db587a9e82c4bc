"""The sharded margin classifier: millions of classes as rows, on any number of ranks, without batch x classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..base.collectives import Ranks
from ..base.errors import HeadError
from .margin_softmax import compute_full_loss, compute_loss
from .margins import margin_from
from .row_rules import RowRule
from .sampling import STRIP_ROWS, Sampling
from .tablets import BLOCK_ROWS, ROWS, Tablet, TabletLayout

STORAGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)


class ShardedMarginHead(nn.Module):
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

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        margin: str | tuple[float, float, float] = "arcface",
        margin_value: float | None = None,
        scale: float = 64.0,
        exact_margin_gradient: bool = True,
        storage: torch.dtype = torch.float16,
        rule: RowRule | None = None,
        sample: float = 1.0,
        denominator: str = "corrected",
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        ddp_scale: bool = False,
        keep_cosines: bool = False,
        tablet_rows: int = ROWS,
        block_rows: int = BLOCK_ROWS,
        strip_rows: int = STRIP_ROWS,
    ) -> None:
        super().__init__()
        if dim < 1 or not 0 < scale < math.inf:
            raise HeadError(f"dim must be >= 1 and scale > 0, got {dim} and {scale}")
        if storage not in STORAGE:
            raise HeadError(f"storage must be one of {', '.join(map(str, STORAGE))}, got {storage}")
        if rule is None and storage not in (torch.float32, torch.float64):
            raise HeadError(
                f"rows in {storage} need a rule, since gradients of 1e-8 vanish in it; give rule=, or storage float32"
            )
        self.dim, self.scale, self.seed, self.storage = dim, float(scale), seed, storage
        self.margin = margin_from(margin, margin_value, exact_gradient=exact_margin_gradient)
        self.rule, self.ddp_scale, self.keep_cosines = rule, ddp_scale, keep_cosines
        self.sampling = Sampling(share=sample, denominator=denominator, strip_rows=strip_rows)
        self.ranks = Ranks.of(group)
        self.layout = TabletLayout(
            classes=classes, ranks=self.ranks.size, tablet_rows=tablet_rows, block_rows=block_rows
        )
        self.tablets = self.layout.owned(self.ranks.rank)
        self.compute_dtype = torch.float64 if storage == torch.float64 else torch.float32
        padded = sum(self.layout.padded_rows(tablet) for tablet in self.tablets)
        rows = torch.zeros((padded, dim), dtype=storage)
        if rule is None:
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)
        width = rule.state_width(dim) if rule is not None else 0
        state = torch.zeros((padded, width), dtype=rule.state_dtype(storage) if rule is not None else storage)
        self.register_buffer("state", state)
        self.step = 0
        """Backward passes so far: a part of the seeds of rounding and sampling."""
        self.skipped = False
        """The last backward met something that is not finite, and moved nothing, on any rank."""
        self.is_torn = False
        """A backward or a load ended early, by an error or Ctrl-C: some rows have become others, and some not."""
        self._moves = 0
        self.seconds: dict[str, float] = {}
        """Of the last step: "exchange" of batch and sums, "first" and "second" pass, updates included."""
        self._initialise()

    rows: Tensor
    """(own padded rows, dim), tablet after tablet."""
    state: Tensor

    @property
    def classes(self) -> int:
        return self.layout.classes

    def extra_repr(self) -> str:
        sampled = f", {self.sampling}" if self.sampling.share < 1 else ""
        place = f"rank {self.ranks.rank} of {self.ranks.size}"
        return f"{self.classes} x {self.dim}, {self.storage}, {self.margin}{sampled}, {place}"

    @torch.no_grad()
    def _initialise(self) -> None:
        """Random rows of length about 1: each tablet from a stream of its own, whoever owns it."""
        for tablet, rows in self.own_rows():
            generator = torch.Generator().manual_seed((self.seed << 32) + tablet.index)
            for start in range(0, tablet.rows, self.layout.block_rows):
                part = rows[start : min(start + self.layout.block_rows, tablet.rows)]
                numbers = torch.randn(part.shape, generator=generator, dtype=torch.float32)
                part.copy_(numbers / self.dim**0.5)

    def _starts(self) -> list[int]:
        starts, at = [], 0
        for tablet in self.tablets:
            starts.append(at)
            at += self.layout.padded_rows(tablet)
        return starts

    def own_rows(self) -> list[tuple[Tablet, Tensor]]:
        """This rank's tablets with their (padded rows, dim), which are memory of the layer."""
        return [
            (tablet, self.rows.data[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self._starts(), strict=True)
        ]

    def own_state(self) -> list[tuple[Tablet, Tensor]]:
        """The same of the rule's state."""
        return [
            (tablet, self.state[start : start + self.layout.padded_rows(tablet)])
            for tablet, start in zip(self.tablets, self._starts(), strict=True)
        ]

    def count_move(self) -> None:
        """Say that rows have become others: the forwards before have no backward any more."""
        self._moves += 1

    def rows_version(self) -> tuple[int, int, int]:
        """Another one after each change of the rows, whoever makes it."""
        version = 0 if self.rows.is_inference() else self.rows._version
        return self._moves, version, self.rows.data_ptr()

    def require_whole(self) -> None:
        """Refuse rows some of which are of another step.

        Raises:
            HeadError: a backward or a load ended early.
        """
        if self.is_torn:
            raise HeadError(
                f"a backward or a load ended early after step {self.step}, and has changed some rows and not others; "
                "load a checkpoint, or set is_torn = False to go on with them as they are"
            )

    def dense_weight(self) -> Tensor:
        """(classes, dim) on every rank: for small layers. With rule=None and one rank, part of the graph."""
        parts = [
            self.rows[start : start + tablet.rows] for tablet, start in zip(self.tablets, self._starts(), strict=True)
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
