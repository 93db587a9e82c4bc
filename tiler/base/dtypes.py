"""Types of numbers: their names, those of results, and their nodata values."""

from __future__ import annotations

from typing import Any

import numpy as np

_STORED = {"bool": "uint8", "int16": "uint8", "int32": "uint16", "int64": "uint16"}
"""Whole numbers that a network gives, and what they are stored as once none of them was found outside."""


def dtype_name(dtype: object) -> str:
    """A type of torch or numpy as numpy calls it, such as "float32"; types that torch alone has, by its name."""
    return str(dtype).removeprefix("torch.")


def output_nodata(dtype: np.dtype[Any]) -> float:
    """The value of nodata pixels in an output of that dtype."""
    return float("nan") if dtype.kind == "f" else int(np.iinfo(dtype).max)


def stored_dtype(dtype: Any) -> np.dtype[Any]:
    """What results of a network's dtype, torch's or numpy's, are stored as: bytes for class numbers that fit, else
    uint16, and floats as they are."""
    name = dtype_name(dtype)
    return np.dtype(_STORED.get(name, name))
