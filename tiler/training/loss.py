"""Losses over a whole image, as sums over its pixels: what a tile contributes, and the value of all sums."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Loss(Protocol):
    """A loss whose value is a function of sums over pixels, so that tiles can be added and are never averaged.

    value(sum over tiles of sums(tile)) is the whole image's loss, whatever the tiles. For example
    sums = (sum of w_y * -log p_y, sum of w_y) and value = sums[0] / sums[1] is weighted cross-entropy.
    """

    @property
    def separable(self) -> bool:
        """Whether only sums[0] depends on the logits, and value is linear in it. Then one forward and one backward a
        tile are enough; else a first pass takes the sums, and a second one their gradients."""
        ...

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        """(height, width), True for the pixels that count, of those that are `valid` in image and labels.

        Tiles without such a pixel are skipped.

        Args:
            labels: (bands, height, width) of a tile's core, as stored.
        """
        ...

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """(k,) in float64: sums over the counted pixels, differentiable in the logits; zero where no pixel counts.

        Args:
            logits: (channels, height, width), float32 or float64.
            labels: (bands, height, width), as stored.
            counted: (height, width), what `select` gave.

        Raises:
            LabelError: labels that do not fit.
        """
        ...

    def value(self, sums: Tensor) -> Tensor:
        """The loss of the whole image: a scalar, differentiable in the sums.

        Raises:
            LabelError: no pixel counts.
        """
        ...
