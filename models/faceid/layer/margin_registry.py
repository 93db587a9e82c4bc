"""Margins by name: those of this package, and those that others add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ....tiler.base.registry import Registry
from ..base.errors import HeadError

if TYPE_CHECKING:
    from torch import Tensor


class MarginLike(Protocol):
    """What the cosine between a sample and its own class becomes."""

    def apply(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """(phi, phi') of target cosines, of the same shape and dtype.

        phi is made by torch's differentiable operations of each cosine alone, is finite and at most 1. phi' is its
        derivative.
        """
        ...


class NamedMargin(Protocol):
    """A class of margins, or a function that makes one: called with the margin's value, or None for its own."""

    def __call__(self, value: float | None) -> MarginLike: ...

    def apply(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """As of `MarginLike`."""
        ...


MARGINS: Registry[Any] = Registry(
    "margin",
    "outsize.margins",
    {
        "arcface": "outsize.models.faceid.layer.margins:make_arcface",
        "cosface": "outsize.models.faceid.layer.margins:make_cosface",
        "softmax": "outsize.models.faceid.layer.margins:make_softmax",
    },
    protocol=NamedMargin,
    kind=HeadError,
)
"""`NamedMargin` by the names of `margin=` and `--margin`."""
