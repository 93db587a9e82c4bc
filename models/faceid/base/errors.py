"""Errors of the giant layer and of galleries."""

from __future__ import annotations

from ....tiler.base.errors import BudgetError, TilerError, UsageError


class HeadError(UsageError):
    """A rule of the head was broken; carries rule, value and remedy."""


class HeadMemoryError(BudgetError):
    """The layer does not fit; carries what it needs and what there is."""


class GalleryError(TilerError):
    """A gallery that is none, is damaged, is being changed, or was made by another embedder."""
