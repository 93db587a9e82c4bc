"""Names of bands: what a model's and a file's names mean to each other, and what is not guessed."""

from __future__ import annotations

import pytest
from outsize.tiler.rasters.band_names import find_named, match_names

RGBN = ("red", "green", "blue", "nir")
S2 = ("B02", "B03", "B04", "B08")


def order(wanted: tuple[str, ...], found: tuple[str, ...]) -> list[int]:
    match = match_names(wanted, found)
    assert (match.fault, match.by_name) == ("", True)
    return [place + 1 for place in match.places]


@pytest.mark.parametrize(
    ("wanted", "found", "places"),
    [
        (S2, ("B08", "B04", "B03", "B02"), [4, 3, 2, 1]),
        (S2, ("b8", "b4", "b3", "b2"), [4, 3, 2, 1]),
        (S2, ("nir", "red", "green", "blue"), [4, 3, 2, 1]),
        (RGBN, S2, [3, 2, 1, 4]),
        (RGBN, ("Blue", "Green", "Red", "NIR"), [3, 2, 1, 4]),
        (RGBN, ("N", "B", "G", "R"), [4, 3, 2, 1]),
        (RGBN, ("Near Infrared", "Red (665 nm)", "Green", "Blue"), [2, 3, 4, 1]),
        (RGBN, ("B4, central wavelength 665 nm", "B3, 560 nm", "B2, 490 nm", "B8, 842 nm"), [1, 2, 3, 4]),
        (RGBN, tuple(f"SR_B{i}" for i in range(1, 8)), [4, 3, 2, 5]),
        (RGBN, tuple(f"LE07_20020415_B{i}" for i in (1, 2, 3, 4, 5, 7)), [3, 2, 1, 4]),
        (RGBN, ("B01", *S2[:3], "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"), [4, 3, 2, 8]),
        (("B8A", "B04"), ("B04 (red)", "B08 (nir)", "B8A (nir08)"), [3, 1]),
        (("nir", "red"), ("rededge1", "red", "nir08"), [3, 2]),
        (("vv", "vh"), ("VH", "VV"), [2, 1]),
        (("Höhe", "Neigung"), ("neigung", "HÖHE"), [2, 1]),
        # Colours that GDAL gives three or four bytes by itself.
        (("B02", "B03", "B04"), ("band 1 (red)", "band 2 (green)", "band 3 (blue)"), [3, 2, 1]),
        (RGBN, ("band 1 (red)", "band 2 (green)", "band 3 (blue)", "band 4"), [1, 2, 3, 4]),
        # Bands without a name stay in their places.
        (RGBN, ("blue", "green", "red", "band 4"), [3, 2, 1, 4]),
        (RGBN, ("red", "green", "blue", ""), [1, 2, 3, 4]),
    ],
)
def test_bands_of_a_model_are_found_by_their_names(
    wanted: tuple[str, ...], found: tuple[str, ...], places: list[int]
) -> None:
    assert order(wanted, found) == places


@pytest.mark.parametrize(
    ("wanted", "found", "reason"),
    [
        (S2, ("blue", "green", "red", "swir16"), "swir16 in the place of B08"),
        (S2, ("B05", "B06", "B07", "B08"), "B05 in the place of B02"),
        (RGBN, ("vv", "vh", "hh", "hv"), "vv in the place of red"),
        (RGBN, ("red", "green", "blue", "rededge"), "rededge in the place of nir"),
        (("elevation", "age"), ("age", "wetness"), "wetness in the place of age"),
        (("blue", "green"), ("sur_refl_b01", "sur_refl_b02"), "sur_refl_b01 in the place of blue"),
        # Landsat 5's, or the first four bands of a file.
        (RGBN, ("B1", "B2", "B3", "B4"), "may be numbers, or Landsat 4 to 7's, then 3,2,1,4"),
        (RGBN, tuple(f"B{i}" for i in range(1, 8)), "4,3,2,5 as Landsat 8 and 9 has them or 3,2,1,4 as Landsat 4 to 7"),
        (("red", "nir"), ("red", "red", "nir"), "has 3 bands (red, red, nir), of which none is surely red"),
        (RGBN, ("red", "green", "blue"), "has 3 bands"),
    ],
)
def test_names_that_disagree_or_may_mean_several_things_are_refused(
    wanted: tuple[str, ...], found: tuple[str, ...], reason: str
) -> None:
    assert reason in match_names(wanted, found).fault


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (RGBN, ("band 1", "band 2", "band 3", "band 4")),
        (RGBN, ("1", "2", "3", "4")),
        (("band 1", "band 2"), ("nir", "red")),
        (RGBN, ("a", "b", "c", "d")),
        (("scene_2018", "dem_2018"), ("scene_2019", "layers")),
        # Numbers that no known sensor has.
        (RGBN, ("B00", "B01", "B02", "B03")),
        # Colours of a writer's own speak against nothing.
        (("nir", "red", "green"), ("band 1 (red)", "band 2 (green)", "band 3 (blue)")),
        (("band 1 (red)", "band 2 (green)", "band 3 (blue)"), ("red", "green", "nir")),
        # Of two dates: each name twice.
        (RGBN * 2, RGBN * 2),
        # What is made of a band is not that band.
        (("red", "nir"), ("nir stddev", "red stddev")),
    ],
)
def test_where_names_say_nothing_the_order_counts(wanted: tuple[str, ...], found: tuple[str, ...]) -> None:
    match = match_names(wanted, found)
    assert (match.fault, match.by_name, match.places) == ("", False, tuple(range(len(wanted))))


def test_bands_that_a_user_names_are_found_in_any_order_and_never_guessed() -> None:
    assert find_named(("B03", "b2"), S2) == [1, 0]
    assert find_named(("red",), S2) == [2]
    assert find_named(("red",), ("B2", "B3", "B4")) == [None]  # B4 or, of Landsat 5, B3
    assert find_named(("swir",), S2) == [None]
    assert find_named(("red",), ("red 2018", "red 2019")) == [None]
