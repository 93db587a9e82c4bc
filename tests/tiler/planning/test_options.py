"""Options as values: their keywords are their fields, wrong ones are refused at once, and bounds are a region."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from outsize.tiler.base.errors import UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.planning.options import PlanKeywords, PlanOptions
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.opening import open_raster

from ...support.runs import class_network, scene

pytestmark = pytest.mark.unit


def test_keywords_are_the_fields() -> None:
    assert get_type_hints(PlanKeywords) == get_type_hints(PlanOptions)
    assert not PlanKeywords.__required_keys__
    assert {field.default for field in fields(PlanOptions)} == {None, False}


def test_a_keyword_goes_before_the_value() -> None:
    options = PlanOptions(core=128, threads=3)
    plan = plan_tiles((3, 700, 700), class_network(), options, core=64)
    assert (plan.core, plan.threads) == ((64, 64), 3)
    assert plan == plan_tiles((3, 700, 700), class_network(), replace(options, core=64))


def test_an_unknown_option_is_no_option() -> None:
    with pytest.raises(TypeError, match="tile_size"):
        plan_tiles((3, 70, 70), class_network(), tile_size=256)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ["workers", "threads", "core", "batch"])
def test_numbers_are_at_least_one(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(UsageError, match=f"{name} must be >= 1, got 0"):
        PlanOptions(**wrong)


def test_bounds_are_the_pixels_that_they_touch(tmp_path: Path) -> None:
    source = open_raster(scene(tmp_path, 300, 400))
    west, _, east, north = source.bounds
    step = (east - west) / 400
    bounds = (west + 10.5 * step, north - 31 * step, west + 20 * step, north - 7.5 * step)
    plan = plan_tiles(source, class_network(), bounds=bounds)
    assert plan.region == (7, 10, 24, 10)
    with pytest.raises(UsageError, match="choose one"):
        plan_tiles(source, class_network(), bounds=bounds, region=Window(y=0, x=0, height=5, width=5))
    with pytest.raises(UsageError, match="got only a shape"):
        plan_tiles(source.shape, class_network(), bounds=bounds)
