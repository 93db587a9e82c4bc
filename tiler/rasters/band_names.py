"""Names of bands: what they mean, and which bands of a file a list of names means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

_COMMON = (
    "pan coastal blue green green05 yellow red rededge rededge071 rededge075 rededge078 nir nir08 nir09 cirrus swir "
    "swir16 swir22 lwir lwir11 lwir12"
)
"""STAC's common names (https://github.com/stac-extensions/eo, "Common Band Names"), and swir for either of its two."""
_OTHER = "vv vh hh hv slope aspect ndvi ndwi ndmi evi savi"
"""Words that are known to be no spectral band, and to differ from each other."""
_KNOWN: dict[str, str] = {
    **{word: word for word in (*_COMMON.split(), *_OTHER.split())},
    "rededge1": "rededge071",
    "rededge2": "rededge075",
    "rededge3": "rededge078",
    "nir1": "nir",
    "swir1": "swir16",
    "swir2": "swir22",
    "tir": "lwir",
    "tir1": "lwir11",
    "tir2": "lwir12",
    "lwir1": "lwir11",
    "lwir2": "lwir12",
    "thermal": "lwir",
    "dem": "elevation",
    "dsm": "elevation",
    "dtm": "elevation",
    "elevation": "elevation",
}
_LETTERS = {"r": "red", "g": "green", "b": "blue", "n": "nir"}
"""Names of one letter, as of NAIP's R, G, B, N."""
_SENSORS: dict[str, Mapping[str, str]] = {
    # https://sentiwiki.copernicus.eu/web/s2-mission, common names as in Element 84's and USGS's STAC catalogues
    "Sentinel-2": {
        "1": "coastal",
        "2": "blue",
        "3": "green",
        "4": "red",
        "5": "rededge071",
        "6": "rededge075",
        "7": "rededge078",
        "8": "nir",
        "8a": "nir08",
        "9": "nir09",
        "10": "cirrus",
        "11": "swir16",
        "12": "swir22",
    },
    # https://www.usgs.gov/faqs/what-are-band-designations-landsat-satellites
    "Landsat 8 and 9": {
        "1": "coastal",
        "2": "blue",
        "3": "green",
        "4": "red",
        "5": "nir08",
        "6": "swir16",
        "7": "swir22",
        "8": "pan",
        "9": "cirrus",
        "10": "lwir11",
        "11": "lwir12",
    },
    "Landsat 4 to 7": {
        "1": "blue",
        "2": "green",
        "3": "red",
        "4": "nir08",
        "5": "swir16",
        "6": "lwir",
        "7": "swir22",
        "8": "pan",
    },
}
_MODIS = {"1": "red", "2": "nir08", "3": "blue", "4": "green", "6": "swir16", "7": "swir22"}
"""Of the surface reflectance of MODIS, whose names say so: sur_refl_b01."""
_PLATFORMS = {
    "Sentinel-2": re.compile(r"s2[abc]?|sentinel2[abc]?"),
    "Landsat 8 and 9": re.compile(r"l[co]0?[89]"),
    "Landsat 4 to 7": re.compile(r"l[tem]0?[4567]"),
}
"""Words in files' names that say which satellite it was."""
_WIDER = {
    "nir": ("nir08",),
    "rededge": ("rededge071", "rededge075", "rededge078"),
    "swir": ("swir16", "swir22"),
    "lwir": ("lwir11", "lwir12"),
}
"""Common names whose range holds those of others: either may stand for the other where there is no better one."""
_DERIVED = frozenset(
    [
        "std",
        "stddev",
        "stdev",
        "variance",
        "var",
        "ratio",
        "diff",
        "difference",
        "delta",
        "index",
        "mask",
        "quality",
        "qa",
        "qc",
        "count",
        "probability",
        "prob",
        "cloud",
        "clouds",
        "shadow",
        "error",
        "uncertainty",
        "anomaly",
        "trend",
        "gradient",
        "texture",
    ]
)
"""Words that make of a band's name that of something else."""
_PHRASES = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"red[\W_]*edge[\W_]*(\d{0,3})(?!\d)", r" rededge\1 "),
        (r"short[\W_]*wave[\W_]*infra[\W_]*red", " swir "),
        (r"(thermal|long[\W_]*wave)[\W_]*infra[\W_]*red", " lwir "),
        (r"near[\W_]*infra[\W_]*red", " nir "),
        (r"infra[\W_]*red", " infrared "),
        (r"(ultra|deep)[\W_]*blue|coastal([\W_]*(aerosol|blue))?", " coastal "),
        (r"water[\W_]*vapou?r", " nir09 "),
        (r"panchromatic", " pan "),
        (r"\b([nst]w?ir|lwir)[\W_]+(\d)\b", r" \1\2 "),
    )
)
_GENERIC = re.compile(r"((band|channel|layer)[\W_]*)?\d*")
_ASSUMED = re.compile(r"band \d+ \((red|green|blue)\)")
_PADDED = re.compile(r"b0\da?")
_ID = re.compile(r"b0*(\d{1,2}a?)")


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What one name says."""

    text: str
    """Letters and digits alone, in lower case; empty: it says no more than a number does."""
    number: str = ""
    """Of a sensor's band: of B08A, 8a."""
    common: str = ""
    is_number_alone: bool = False
    """B4, and nothing else: it may be a sensor's band, or the fourth."""
    words: tuple[str, ...] = ()
    is_assumed: bool = False
    """A writer's default, which speaks for a band, but against none."""

    @property
    def is_understood(self) -> bool:
        return bool(self.number or self.common)

    def common_of(self, sensor: str | None) -> str:
        """Its common name, of a number as that sensor has it."""
        return self.common or (_SENSORS[sensor].get(self.number, "") if sensor else "")


def assumed_name(number: int, common: str) -> str:
    """Of a band of which nothing is known but a colour that a writer may have given it unasked."""
    return f"band {number} ({common})"


@lru_cache(maxsize=4096)
def _understand(name: str) -> _Meaning:
    said = name.strip().casefold()
    if _GENERIC.fullmatch(said):
        return _Meaning("")
    if assumed := _ASSUMED.fullmatch(said):
        return _Meaning(assumed[1], common=assumed[1], is_assumed=True)
    text = re.sub(r"[\W_]+", "", said)
    if len(text) == 1:
        return _Meaning(text)
    for pattern, words in _PHRASES:
        said = pattern.sub(words, said)
    words = tuple(re.findall(r"[^\W_]+", said))
    if not _DERIVED.isdisjoint(words):
        return _Meaning(text)
    commons = {_KNOWN[word] for word in words if word in _KNOWN}
    numbers = {found[1] for word in words if (found := _ID.fullmatch(word))}
    if text.startswith("surrefl") and len(numbers) == 1:
        return _Meaning(text, common=_MODIS.get(next(iter(numbers)), ""))
    if len(commons) > 1 or len(numbers) > 1:
        return _Meaning(text)
    number = next(iter(numbers), "")
    return _Meaning(text, number, next(iter(commons), ""), bool(number) and len(words) == 1, words)


def _understand_all(names: Sequence[str]) -> list[_Meaning]:
    meanings = [_understand(name) for name in names]
    letters = [entry.text for entry in meanings if len(entry.text) == 1]
    # a, b, c, d are no colours.
    if not set(letters) <= set(_LETTERS):
        return meanings
    return [replace(entry, common=_LETTERS[entry.text]) if entry.text in _LETTERS else entry for entry in meanings]


def _is_near(common: str, other: str) -> bool:
    return other in _WIDER.get(common, ()) or common in _WIDER.get(other, ())


def _rank(wanted: _Meaning, found: _Meaning, sensor: str | None) -> int:
    """How well a band of a file is what is wanted: 4 the same words, 3 the same number, 2 the same common name, 1 a
    wider or narrower one; 0 not at all."""
    if wanted.text and wanted.text == found.text:
        return 4
    a, b = wanted.common_of(sensor), found.common_of(sensor)
    agrees = not (a and b) or a == b or _is_near(a, b)
    if wanted.number and wanted.number == found.number and agrees:
        return 3
    if wanted.number and found.number and not (wanted.common and found.common):
        return 0
    if a and a == b:
        return 2
    return 1 if a and b and agrees else 0


def _assign(wanted: Sequence[_Meaning], found: Sequence[_Meaning], sensor: str | None) -> list[int | None]:
    """The place of each that is wanted, the best fits first; None where there is none, or more than one."""
    places: list[int | None] = [None] * len(wanted)
    settled = [not entry.text for entry in wanted]
    for rank in (4, 3, 2, 1):
        free = [place for place in range(len(found)) if place not in places]
        fits = {
            index: [place for place in free if _rank(entry, found[place], sensor) == rank]
            for index, entry in enumerate(wanted)
            if not settled[index]
        }
        for index, candidates in fits.items():
            if not candidates:
                continue
            # What several fit, or several want, nobody gets.
            settled[index] = True
            if len(candidates) == 1 and sum(candidates[0] in others for others in fits.values()) == 1:
                places[index] = candidates[0]
    return places


def _sensors_of(meanings: Sequence[_Meaning]) -> list[str]:
    """Sensors whose bands all these may be."""
    numbers = {entry.number for entry in meanings if entry.number}
    if not numbers:
        return list(_SENSORS)
    words = {word for entry in meanings for word in entry.words}
    named = [sensor for sensor, pattern in _PLATFORMS.items() if any(map(pattern.fullmatch, words))]
    # Names of the older Landsats have no zero, and their surface reflectance has no sixth band.
    newer = any(
        (entry.number == "6" and "sr" in entry.words) or any(_PADDED.fullmatch(word) for word in entry.words)
        for entry in meanings
    )
    return [
        sensor
        for sensor, bands in _SENSORS.items()
        if numbers <= set(bands) and (not named or sensor in named) and not (newer and sensor == "Landsat 4 to 7")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMatch:
    """Where bands that are wanted are in a file."""

    places: tuple[int, ...] = ()
    """From 0; empty: see `fault`."""
    by_name: bool = False
    """All or some of them by their names; else in the file's order."""
    sensor: str = ""
    """Whose numbers of bands decided."""
    fault: str = ""
    """Why names do not say it, as a sentence without its subject."""


def match_names(wanted: Sequence[str], found: Sequence[str]) -> NameMatch:
    """Which bands of a file are those that a model was trained on.

    By name where all are found: the same words, the same number of a sensor's band (B2, B02, SR_B2), or the same
    common name, which a number has by the tables of the one sensor that makes all fit. What the names of both sides
    cannot tell apart is not guessed: the order of the file counts where no name speaks against it.
    """
    ours, theirs = _understand_all(wanted), _understand_all(found)
    if not any(entry.text for entry in ours) or not any(entry.text for entry in theirs):
        return _in_order(ours, theirs)
    sensors = [sensor for sensor in _sensors_of(ours) if sensor in _sensors_of(theirs)]
    complete: dict[tuple[int, ...], str] = {}
    direct = _assign(ours, theirs, None)
    for sensor in (None, *sensors):
        places = direct if sensor is None else _assign(ours, theirs, sensor)
        if None not in places:
            complete.setdefault(tuple(place for place in places if place is not None), sensor or "")
            if sensor is None:
                break
    numbered = _are_numbers(theirs)
    if len(complete) == 1:
        places, sensor = next(iter(complete.items()))
        if sensor and numbered and places != tuple(range(len(theirs))):
            return NameMatch(
                fault=f"has bands {_few(found)}, which may be numbers, or {sensor}'s, then {_listed(places)}"
            )
        return NameMatch(places=places, by_name=True, sensor=sensor)
    if complete:
        ways = " or ".join(f"{_listed(places)} as {sensor} has them" for places, sensor in complete.items())
        return NameMatch(fault=f"has bands {_few(found)}, of which {', '.join(wanted)} may be {ways}")
    if len(ours) > len(theirs):
        return _in_order(ours, theirs)
    if len(ours) < len(theirs):
        missing = [name for name, place in zip(wanted, direct, strict=True) if place is None]
        return NameMatch(fault=f"has {len(theirs)} bands ({_few(found)}), of which none is surely {', '.join(missing)}")
    # Names that say nothing stay where they are.
    open_ours = [index for index, place in enumerate(direct) if place is None]
    open_theirs = [index for index in range(len(theirs)) if index not in direct]
    silent = all(not theirs[index].is_understood for index in open_theirs)
    if open_ours == open_theirs and silent and len(open_ours) < len(ours):
        return NameMatch(
            places=tuple(index if place is None else place for index, place in enumerate(direct)), by_name=True
        )
    strangers = [] if numbered else _find_strangers(ours, theirs, direct, sensors)
    if strangers:
        pairs = ", ".join(f"{found[index]} in the place of {wanted[index]}" for index in strangers)
        return NameMatch(fault=f"has bands {_few(found)}: {pairs}")
    return _in_order(ours, theirs)


def _find_strangers(
    ours: Sequence[_Meaning], theirs: Sequence[_Meaning], direct: Sequence[int | None], sensors: Sequence[str]
) -> list[int]:
    """Places in which both names are understood and differ, whatever the sensor, or of which one is elsewhere."""
    ways = (None, *sensors)
    return [
        index
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a.text
        and not a.is_assumed
        and not b.is_assumed
        and not any(_rank(a, b, sensor) for sensor in ways)
        and (
            (a.number and b.number)
            or any(a.common_of(sensor) and b.common_of(sensor) for sensor in ways)
            or direct[index] not in (None, index)
        )
    ]


def _in_order(ours: Sequence[_Meaning], theirs: Sequence[_Meaning]) -> NameMatch:
    if len(ours) != len(theirs):
        return NameMatch(fault=f"has {len(theirs)} band{'s' * (len(theirs) != 1)}")
    return NameMatch(places=tuple(range(len(theirs))))


def _are_numbers(meanings: Sequence[_Meaning]) -> bool:
    """Whether they are B1, B2, ... in that order, which says no more than the order does."""
    return all(entry.is_number_alone and entry.number == str(i) for i, entry in enumerate(meanings, start=1))


def find_named(wanted: Sequence[str], found: Sequence[str]) -> list[int | None]:
    """Where bands that a user names are in a file, from 0, whatever their order; None: there is none, or not one alone.

    A number of a sensor's band and a common name mean each other only where one sensor alone makes all fit.
    """
    ours, theirs = _understand_all(wanted), _understand_all(found)
    places = _assign(ours, theirs, None)
    if None not in places:
        return places
    ways = [_assign(ours, theirs, s) for s in _sensors_of(ours) if s in _sensors_of(theirs)]
    ways = [way for way in ways if None not in way]
    return ways[0] if ways and all(a == b for a, b in pairwise(ways)) else places


def is_named(name: str) -> bool:
    """Whether a band's name says more than its number does, and than a writer's default."""
    meaning = _understand(name)
    return bool(meaning.text) and not meaning.is_assumed


def band_name_of(entry: Any) -> str:
    """Of a band in a list: a text, or one of STAC's objects with a name, a common name or both."""
    if not isinstance(entry, Mapping):
        return " ".join(str(entry).split())
    name, common = (
        str(next((entry[key] for key in keys if entry.get(key)), ""))
        for keys in (("name", "description"), ("common_name", "eo:common_name"))
    )
    text = f"{name} ({common})" if name and common and common.lower() not in name.lower() else name or common
    return " ".join(text.split())


def _listed(places: Sequence[int]) -> str:
    return ",".join(str(place + 1) for place in places)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
