"""Bands of a raster, chosen by number or name, and those that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from ..base.errors import UsageError
from .band_names import is_named, match_names
from .parts import open_reference, reference_to
from .raster import Raster, find_bands

_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BandMatch:
    """Which bands of a raster go into which of a model's."""

    raster: Raster
    """With the model's bands in the model's order."""
    names: tuple[str, ...]
    """The model's."""
    how: Literal["by name", "in order", "as chosen"]
    sensor: str = ""
    """Whose numbers of bands decided."""

    def __str__(self) -> str:
        pairs = list(zip(self.names, self.raster.chosen_bands, self.raster.band_names, strict=True))
        shown = [
            f"{name} = {number}{f' ({found})' if is_named(found) else ''}" if is_named(name) else f"{number} {found}"
            for name, number, found in pairs[:_SHOWN]
        ]
        more = f", ... ({len(pairs)})" if len(pairs) > _SHOWN else ""
        how = self.how
        if how == "by name" and self.sensor:
            how = f"by name, {self.sensor}"
        elif how == "in order":
            ours, theirs = any(map(is_named, self.names)), any(map(is_named, self.raster.band_names))
            how += (
                ", as their names do not say it"
                if ours and theirs
                else ", as the model names none"
                if theirs
                else (", as the raster names none" if ours else "")
            )
        return f"{how}: {', '.join(shown)}{more}"


def match_network(raster: Raster, network: object) -> Raster:
    """The raster with the bands that the model of a network, or of a module, names, as `match_bands` finds them; of one
    that names none, as it is."""
    names = getattr(getattr(network, "module", network), "band_names", ())
    return match_bands(raster, tuple(names)).raster if names else raster


def select_bands(raster: Raster, bands: Sequence[int | str]) -> Raster:
    """The raster with only those of its bands, in that order: numbers from 1 of those that it has now, or names.

    Raises:
        UsageError: no such band, or a name that several may have.
    """
    numbers = find_bands(raster.path, raster.band_names, tuple(bands))
    if not numbers:
        raise UsageError("a raster needs a band, got none; name one")
    chosen = tuple(raster.chosen_bands[number - 1] for number in numbers)
    selected = replace(raster, options=replace(raster.options, bands=chosen))
    if numbers == tuple(range(1, raster.bands + 1)):
        return selected
    # Opened anew: what its bands are among the stored ones, with masks between them, is decided in one place.
    return replace(open_reference(reference_to(selected), trust=raster.options.trust), kept=raster.kept)


def match_bands(raster: Raster, names: tuple[str, ...], model: str = "the model") -> BandMatch:
    """The raster with the bands that a model names, in the model's order, as far as both sides have names.

    Rule: bands that were chosen when the raster was opened stay as they are. Else, where every band of the model is
    found by name, those are taken, whatever their order. Else the raster's order counts, if it has as many bands and no
    name speaks against it; so it does where one side has no names.

    Args:
        names: of the model's bands.
        model: what to call it in a refusal.

    Raises:
        UsageError: names that disagree, or of which it is not certain what they mean; another number of bands.
    """
    # An array of this process would be kept as long as the answer.
    return (_match if raster.kept is None else _match.__wrapped__)(raster, names, model)


@lru_cache(maxsize=64)
def _match(raster: Raster, names: tuple[str, ...], model: str) -> BandMatch:
    takes = f"{model} takes {len(names)} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
    such = ",".join(str(number) for number in range(1, len(names) + 1))
    remedy = f"choose them with --bands, in that order, such as --bands {such}, or give a fitting --model"
    if raster.options.bands:
        if raster.bands != len(names):
            raise UsageError(f"{raster.path} has {raster.bands} bands as --bands chooses them, {takes}; {remedy}")
        return BandMatch(raster=raster, names=names, how="as chosen")
    match = match_names(names, raster.band_names)
    if match.fault:
        raise UsageError(f"{raster.path} {match.fault}, {takes}; {remedy}")
    places = [place + 1 for place in match.places]
    return BandMatch(
        raster=raster if places == list(range(1, raster.bands + 1)) else select_bands(raster, places),
        names=names,
        how="by name" if match.by_name else "in order",
        sensor=match.sensor,
    )
