"""`outsize sample`: a scene with labels, of any size."""

from __future__ import annotations

import time
from pathlib import Path

from ...sample_data.scene import Scene
from ...sample_data.write import write_scene
from ...tiler.base.text import format_bytes, format_seconds
from ...tiler.system.meter import MemoryMeter
from ..base.console import Console, describe_memory


def run_sample(
    console: Console, folder: Path, *, height: int, width: int, seed: int, axes: str, overwrite: bool
) -> None:
    """Make the scene and its labels, and say how fast and in how much memory."""
    scene = Scene(height=height, width=width, seed=seed)
    began = time.perf_counter()
    with MemoryMeter() as meter, console.step("sample", scene.height * scene.width) as step:

        def advance(pixels: int) -> None:
            step.advance(pixels, describe_memory(meter.current_bytes))

        write_scene(folder, scene, axes=axes, overwrite=overwrite, advance=advance)
    seconds = time.perf_counter() - began
    console.result(
        f"{folder / 'scene.zarr'} and {folder / 'labels.zarr'}: {height} x {width} px, seed {seed}; "
        f"{format_seconds(seconds)}, peak memory {format_bytes(meter.peak_bytes)}",
        {
            "scene": str(folder / "scene.zarr"),
            "labels": str(folder / "labels.zarr"),
            "height": height,
            "width": width,
            "seed": seed,
            "seconds": round(seconds, 3),
            "peak_bytes": meter.peak_bytes,
        },
    )
