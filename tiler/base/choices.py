"""Names of what computes a tile, and of what it is written into: engine, method, precision, format."""

from __future__ import annotations

from typing import Literal, TypeAlias

EngineName: TypeAlias = str
"""Of a registered engine: openvino, torch, or one that was added."""


Method = Literal["window", "program"]
"""How a tile is computed: the module on a window of the image, or a program for its core."""


Precision = Literal["float32", "int8", "bfloat16", "float16", "tf32"]
"""What an engine computes in: the network's own numbers, or fewer bits for each."""


ZarrFormat = Literal[2, 3]
"""Of the output store."""
