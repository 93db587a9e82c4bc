"""The loss of fewer bits, against a count by hand."""

from __future__ import annotations

import json

import numpy as np
from outsize.tiler.engines.precision_loss import PrecisionLoss, compare_with_float32


def test_flipped_pixels_and_differences_are_those_of_valid_pixels() -> None:
    expected = np.zeros((3, 5, 7), np.float32)
    expected[1] = 10
    logits = expected + 0.25
    logits[2, 0, 0] = 12.5  # another class
    logits[0, 4, 6] = 99  # another class, but no valid pixel
    valid = np.ones((5, 7), bool)
    valid[4, 6] = False
    finished, wanted = (array.argmax(0, keepdims=True).astype(np.uint8) for array in (logits, expected))
    loss = compare_with_float32(
        [(finished, logits, wanted, expected, valid)], precision="int8", has_logits=True, held_out=1
    )
    assert (loss.pixels, loss.flipped, loss.max_abs, loss.largest) == (34, 1, 12.5, 10)
    assert abs(loss.mean_abs - (101 * 0.25 + 12.5) / 102) < 1e-9
    assert PrecisionLoss.from_json(json.loads(json.dumps(loss.to_json()))) == loss
    assert "2.94 % of pixels flipped" in loss.sentence()


def test_one_channel_flips_where_the_finished_value_does_and_floats_never_do() -> None:
    expected = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 2, 3)
    logits, valid = expected - 0.3, np.ones((2, 3), bool)
    finished, wanted = ((array > 0).astype(np.uint8) for array in (logits, expected))
    loss = compare_with_float32(
        [(finished, logits, wanted, expected, valid)], precision="int8", has_logits=True, held_out=0
    )
    assert loss.flipped == 1
    same = compare_with_float32(
        [(logits, logits, expected, expected, valid)], precision="int8", has_logits=False, held_out=0
    )
    assert (same.flipped, same.compared) == (0, "output")
    assert same.sentence().startswith("int8 against float32 by torch, 6 px of the check's patches: 0 %")
