"""Row rules: how a block of rows follows its gradient, in float32, while the block is at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..base.errors import HeadError


class RowRule(Protocol):
    """An optimiser of rows."""

    lr: float

    def state_width(self, dim: int) -> int:
        """Numbers of state that each row of `dim` numbers keeps."""
        ...

    def state_dtype(self, storage: torch.dtype) -> torch.dtype:
        """What they are kept in."""
        ...

    def rates(self, mean_square: Callable[[], Tensor], state: Tensor) -> float | Tensor | None:
        """What each row moves against its gradient by, (n, 1) or one number, where that is all a rule does: then the
        gradient need not be made. None: `update` does it.

        Args:
            mean_square: gives the mean of g^2 of each row, (n, 1).
            state: (n, width), moved in place.
        """
        ...

    def update(self, rows: Tensor, gradient: Tensor, state: Tensor) -> None:
        """Move float32 rows (n, dim) against their gradient, in place; state (n, width) is float32 and in place too."""
        ...


def _check(lr: float, weight_decay: float) -> None:
    if not (0 <= lr < math.inf and 0 <= weight_decay < math.inf):
        raise HeadError(f"lr and weight_decay must be >= 0, got {lr} and {weight_decay}")


@dataclass(kw_only=True)
class SGD:
    """w <- w - lr (g + weight_decay w)."""

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)

    def state_width(self, dim: int) -> int:
        del dim
        return 0

    def state_dtype(self, storage: torch.dtype) -> torch.dtype:
        return storage

    def rates(self, mean_square: Callable[[], Tensor], state: Tensor) -> float | None:
        del mean_square, state
        return None if self.weight_decay else self.lr

    def update(self, rows: Tensor, gradient: Tensor, state: Tensor) -> None:
        del state
        if self.weight_decay:
            rows.mul_(1 - self.lr * self.weight_decay)
        rows.add_(gradient, alpha=-self.lr)


@dataclass(kw_only=True)
class Momentum:
    """v <- momentum v + g + weight_decay w;  w <- w - lr v. As torch.optim.SGD with momentum; v in the rows' type."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise HeadError(f"momentum must be in [0, 1), got {self.momentum}")

    def state_width(self, dim: int) -> int:
        return dim

    def state_dtype(self, storage: torch.dtype) -> torch.dtype:
        return storage

    def rates(self, mean_square: Callable[[], Tensor], state: Tensor) -> None:
        del mean_square, state

    def update(self, rows: Tensor, gradient: Tensor, state: Tensor) -> None:
        state.mul_(self.momentum).add_(gradient)
        if self.weight_decay:
            state.add_(rows, alpha=self.weight_decay)
        rows.add_(state, alpha=-self.lr)


@dataclass(kw_only=True)
class RowRMS:
    """v <- decay v + (1 - decay) mean(g^2) of the row, v <- mean(g^2) at first;  w <- w - lr g / (sqrt(v) + eps).

    RMSprop with one number a row, kept in float32.
    """

    lr: float
    decay: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay)
        if not (0 <= self.decay < 1 and self.eps > 0):
            raise HeadError(f"decay must be in [0, 1) and eps > 0, got {self.decay} and {self.eps}")

    def state_width(self, dim: int) -> int:
        del dim
        return 1

    def state_dtype(self, storage: torch.dtype) -> torch.dtype:
        return torch.float64 if storage == torch.float64 else torch.float32

    def rates(self, mean_square: Callable[[], Tensor], state: Tensor) -> Tensor | None:
        if self.weight_decay:
            return None
        return self._remember(mean_square(), state)

    def update(self, rows: Tensor, gradient: Tensor, state: Tensor) -> None:
        if self.weight_decay:
            gradient = gradient.add(rows, alpha=self.weight_decay)
        rows.addcmul_(gradient, self._remember(gradient.square().mean(dim=1, keepdim=True), state), value=-1)

    def _remember(self, mean: Tensor, state: Tensor) -> Tensor:
        """lr / (sqrt(v) + eps), (n, 1), with the new v."""
        state.copy_(torch.where(state == 0, mean, self.decay * state + (1 - self.decay) * mean))
        return self.lr / (state.sqrt() + self.eps)


RULES: dict[str, type[SGD] | type[Momentum] | type[RowRMS]] = {"sgd": SGD, "momentum": Momentum, "rms": RowRMS}
"""By the names of the command line."""
