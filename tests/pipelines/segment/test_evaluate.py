"""Maps that are scored together: of the same classes, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from outsize.pipelines.base.console import Console
from outsize.pipelines.segment import evaluate
from outsize.pipelines.segment.evaluate import Comparison, run_evaluate
from outsize.pipelines.segment.quicklook import find_classes
from outsize.tiler.base.errors import UsageError
from outsize.tiler.labels.labels import LabelOptions, Labels


class _NoLabels:
    note = ""


def comparison(name: str, count: int, names: tuple[str, ...] = ()) -> Comparison:
    return Comparison(out=Path(name), labels=cast("Labels", _NoLabels()), names=names, count=count, shape=(2, 2))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (comparison("b", 4096), "b numbers below 4096 without names"),
        (comparison("b", 2, ("x", "y")), "b x, y"),
    ],
)
def test_maps_of_other_classes_are_not_scored_together(
    other: Comparison, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: dict[Path, Comparison] = {Path("a"): comparison("a", 255), Path("b"): other}
    monkeypatch.setattr(evaluate, "_open_pair", lambda out, *_: pairs[out])
    with pytest.raises(UsageError, match=rf"a has numbers below 255 without names; {words}; score them one by one"):
        run_evaluate(Console(), [(Path("a"), "l"), (Path("b"), "l")], LabelOptions())


def test_yes_and_no_without_a_threshold_are_parted_at_one_half() -> None:
    header: dict[str, Any] = {"task": "binary", "threshold": None, "classes": []}
    for kind, values in (
        ("probability", np.array([[[126, 128, 255]]], np.uint8)),
        ("logits", np.array([[[-0.1, 0.1, np.nan]]], np.float32)),
    ):
        found = find_classes(values, kind, header)
        assert found is not None
        assert found.tolist() == [[0, 1, -1]]
