"""Errors of the giant layer."""

from __future__ import annotations

from ...tiler.errors import BudgetError, UsageError


class HeadError(UsageError):
    """A rule of the head was broken; carries rule, value and remedy."""


class HeadMemoryError(BudgetError):
    """The layer does not fit; carries what it needs and what there is."""
