"""Scaling: its equations, and its way into descriptions and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from outsize.models.segmentation.files.mlm import scaling_from_objects, scaling_objects
from outsize.models.segmentation.networks.model import TileNetwork
from outsize.models.segmentation.networks.palette import default_colour
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.models.segmentation.networks.trust import ModelFileError
from outsize.tiler.base.errors import UsageError
from stac_model.input import ModelInput

MIXED: list[Any] = [
    {"type": "z-score", "mean": 4, "stddev": 2},
    {"type": "min-max", "minimum": -10, "maximum": 30},
    {"type": "offset", "value": 7},
    {"type": "scale", "value": -4},
    None,
]


def apply(scaling: Scaling, pixels: np.ndarray) -> np.ndarray:
    network = TileNetwork(torch.nn.Identity(), scaling, "logits")
    return network(torch.from_numpy(pixels)[None])[0].numpy()


def is_valid_mlm(objects: list[dict[str, Any]] | None, bands: int) -> bool:
    ModelInput.model_validate(
        {
            "name": "image",
            "bands": [f"B{number}" for number in range(bands)],
            "input": {"shape": [1, bands, -1, -1], "dim_order": ["b", "c", "h", "w"], "data_type": "float32"},
            "value_scaling": objects,
        }
    )
    return True


def test_each_band_gets_the_equation_of_its_kind() -> None:
    pixels = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3)
    x = pixels.astype(np.float64)
    expected = np.stack([(x[0] - 4) / 2, (x[1] + 10) / 40, x[2] - 7, x[3] / -4, x[4]])
    scaling = scaling_from_objects(MIXED, 5)
    assert scaling.kinds == ("z-score", "min-max", "offset", "scale", "none")
    np.testing.assert_allclose(apply(scaling, pixels), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "scaling",
    [
        Scaling.z_score(mean=(1.5, 2), stddev=(3, 4)),
        Scaling.min_max(minimum=(0, -5), maximum=(255, 5)),
        Scaling.offset_scale(offset=(3, 0), scale=(1, 10_000)),
        Scaling.offset_scale(offset=(3, 0), scale=(2, 1)),
        Scaling.none(2),
        scaling_from_objects(MIXED, 5),
    ],
    ids=lambda scaling: str(scaling.kind),
)
def test_a_scaling_survives_its_description(scaling: Scaling) -> None:
    objects = scaling_objects(scaling)
    bands = len(scaling.subtract)
    assert is_valid_mlm(objects, bands)
    assert scaling_from_objects(objects, bands) == scaling


def test_offset_and_scale_are_subtracted_and_divided_by() -> None:
    scaling = Scaling.offset_scale(offset=(1000, 0, 1000, 0), scale=(1, 10_000, 10_000, 1))
    assert scaling.kinds == ("offset", "scale", "z-score", "none")
    pixels = np.full((4, 1, 1), 3000, np.uint16)
    np.testing.assert_allclose(apply(scaling, pixels).ravel(), [2000, 0.3, 0.2, 3000], rtol=1e-6)


def test_one_object_is_for_all_bands_and_none_is_identity() -> None:
    one = scaling_from_objects([{"type": "min-max", "minimum": 0, "maximum": 255}], 3)
    assert one == Scaling.min_max(minimum=(0,) * 3, maximum=(255,) * 3)
    for absent in (None, [], [None], [{"type": None}], [{"type": None}] * 3):
        assert scaling_from_objects(absent, 3) == Scaling.none(3)
    with pytest.raises(ModelFileError, match="one for each of 3 bands, got 2"):
        scaling_from_objects(MIXED[:2], 3)


@pytest.mark.parametrize("kind", ["clip", "clip-min", "clip-max", "processing"])
def test_what_is_no_affine_map_is_refused_by_name(kind: str) -> None:
    entry = {"type": kind, "minimum": 0, "maximum": 1, "format": "python", "expression": "x"}
    with pytest.raises(ModelFileError, match=f'"{kind}" is not supported.*do it in the network\'s forward'):
        scaling_from_objects([entry], 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "z-score", "subtract": (0,), "divide": (0,)}, "divide by numbers > 0, got 0"),
        ({"kind": "min-max", "subtract": (9,), "divide": (-1,)}, "divide by numbers > 0, got -1"),
        ({"kind": "scale", "subtract": (0,), "divide": (0,)}, "other than 0"),
        ({"kind": "scale", "subtract": (1,), "divide": (2,)}, 'kind "scale" cannot subtract 1'),
        ({"kind": "offset", "subtract": (1,), "divide": (2,)}, 'kind "offset" cannot'),
        ({"kind": "none", "subtract": (1,), "divide": (1,)}, 'kind "none" cannot'),
        ({"kind": "z-score", "subtract": (float("nan"),), "divide": (1,)}, "finite"),
        ({"kind": "z-score", "subtract": (), "divide": ()}, "one pair of constants a band"),
        ({"kind": ("z-score",), "subtract": (1, 2), "divide": (1, 2)}, "one kind a band, got 1 for 2"),
        ({"kind": "log", "subtract": (1,), "divide": (2,)}, "kind must be one of z-score"),
    ],
)
def test_constants_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Scaling(**settings)


def test_default_colours_differ_and_keep_away_from_nodata() -> None:
    colours = np.array([default_colour(index) for index in range(255)])
    assert len({tuple(colour) for colour in colours}) == 255
    # In plain RGB, not the space in which they were chosen.
    first = colours[:20].astype(float)
    distances = np.linalg.norm(first[:, None] - first[None], axis=-1) + np.eye(20) * 999
    assert distances.min() > 60
    assert colours.sum(1).min() > 30
    assert (colours.sum(1) < 255 * 3 - 30).all()
