"""`outsize sample`: a scene with labels, of any size."""

from __future__ import annotations

from pathlib import Path

from ..sample_data.scene import Scene
from ..sample_data.write import write_scene
from .console import Console


def run_sample(console: Console, folder: Path, *, height: int, width: int, seed: int, overwrite: bool) -> None:
    scene = Scene(height=height, width=width, seed=seed)
    with console.step("sample", scene.height * scene.width) as step:
        write_scene(folder, scene, overwrite=overwrite, advance=step.advance)
    console.result(
        f"{folder / 'scene.zarr'} and {folder / 'labels.zarr'}: {height} x {width} px, seed {seed}",
        {
            "scene": str(folder / "scene.zarr"),
            "labels": str(folder / "labels.zarr"),
            "height": height,
            "width": width,
            "seed": seed,
        },
    )
