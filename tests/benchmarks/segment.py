"""Disk to disk against the bare engine and against other ways of tiling: one network, one scene, alternating runs.

    python -m outsize.tests.benchmarks.segment --size 8192 --rounds 3
    python -m outsize.tests.benchmarks.segment --size 2048 --peers --json peers.json

"bare" is OpenVINO on 1024 x 1024 windows that lie in memory, without overlap, scheduling or disk; "bare rewritten" the
same on the graph as outsize runs it; the others go from disk to disk. Each run is a process of its own. Prints a table,
and with --json writes every run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr

from ...sample_data.scene import Scene
from ...sample_data.write import write_scene
from ...tiler.system.machine import cpu_count, find_versions
from ...tiler.system.meter import process_bytes
from .contestant import NAMES
from .figures import collect, format_markdown

PEERS = ("monai 0.25", "monai 0.5", "map_overlap", "window loop", "window loop openvino")
LARGEST_WHOLE = 2048
"""Side up to which the whole image is run at once."""


def run(name: str, scene: Path, out: Path, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """One run: seconds, Mpx/s, peak bytes of all its processes.

    Args:
        more: further words for the contestant.
    """
    command = [sys.executable, "-W", "ignore", "-m", "outsize.tests.benchmarks.contestant", name, str(scene), str(out)]
    command += ["--network", options.network, "--memory", options.memory, *more]
    peak = 0
    with (
        tempfile.TemporaryFile("w+") as errors,  # nobody empties a pipe while the memory is watched
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        me = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                peak = max(peak, sum(map(process_bytes, [me, *me.children(recursive=True)])))
            except psutil.NoSuchProcess:
                break
            time.sleep(1)
        answer, _ = process.communicate()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode:
        return {"name": name, "error": (said or ["killed"])[-1]}
    found = json.loads(answer.splitlines()[-1])
    return {"name": name, "mpx_per_s": options.size**2 / found["seconds"] / 1e6, "peak_bytes": peak, **found}


def count_flipped(out: Path, expected: Path) -> int:
    """Pixels whose class differs, nodata apart."""
    ours, theirs = (
        zarr.open_array(path / "class" if (path / "class").exists() else path, mode="r") for path in (out, expected)
    )
    flipped = 0
    for y in range(0, ours.shape[0], 1024):
        a, b = np.asarray(ours[y : y + 1024]), np.asarray(theirs[y : y + 1024])
        flipped += int(((a != b) & (a != 255) & (b != 255)).sum())
    return flipped


def write_geotiff(scene: Path) -> None:
    """The scene beside itself as a tiled GeoTIFF, for rasterio."""
    import rasterio

    image = zarr.open_array(scene, path="image", mode="r")
    bands, height, width = image.shape
    options = {"count": bands, "height": height, "width": width, "dtype": "uint8", "tiled": True}
    with rasterio.open(
        scene.parent / "image.tif", "w", driver="GTiff", compress="zstd", blockxsize=512, blockysize=512, **options
    ) as dataset:
        for y in range(0, height, 512):
            window = rasterio.windows.Window(0, y, width, min(512, height - y))
            dataset.write(np.asarray(image[:, y : y + 512]), window=window)


def main() -> None:
    """Print a row for each contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--network", default="small", choices=["small", "medium", "large"])
    parser.add_argument("--memory", default="2GB")
    parser.add_argument("--peers", action="store_true", help="other ways of tiling too; MONAI comes with .[bench]")
    parser.add_argument("--only", action="append", choices=NAMES, help="these alone, in this order")
    parser.add_argument("--scene", type=Path, help="a folder where the scene is made, or is; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write every run here")
    options = parser.parse_args()
    names = options.only or ["bare", "bare rewritten", "outsize", *(PEERS if options.peers else ())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.scene or Path(temporary)
        scene = folder / "scene.zarr"
        if not scene.exists():
            write_scene(folder, Scene(height=options.size, width=options.size, seed=1))
        if any("loop" in name for name in names) and not (folder / "image.tif").exists():
            write_geotiff(scene)
        reference = Path(temporary, "outsize.zarr")
        if options.size <= LARGEST_WHOLE:
            reference = Path(temporary, "whole.zarr")
            run("whole", scene, reference, options)
        runs: list[dict[str, Any]] = []
        for number in range(options.rounds):
            for name in names:
                out = Path(temporary, f"{name}.zarr")
                found = run(name, scene, out, options)
                if out.exists() and reference.exists() and out != reference:
                    found["flipped"] = count_flipped(out, reference)
                runs.append({"round": number + 1, **found})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    measured = {
        "command": shlex.join(["python", "-m", "outsize.tests.benchmarks.segment", *_without_paths(sys.argv[1:])]),
        "machine": describe_machine(),
        "size": options.size,
        "network": options.network,
        "memory": options.memory,
        "runs": runs,
    }
    print(format_markdown(collect([measured])))
    for error in dict.fromkeys(f"{found['name']}: {found['error']}" for found in runs if "error" in found):
        print(error)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


def _without_paths(words: list[str]) -> list[str]:
    """Where things lie on this machine is no part of what was measured."""
    paths = ("--json", "--scene")
    return [
        word for before, word in zip(["", *words], words, strict=False) if word not in paths and before not in paths
    ]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = names[0] if names else model
    memory = psutil.virtual_memory().total
    return {"processor": model, "cpus": cpu_count(), "memory_bytes": memory, "versions": find_versions()}


if __name__ == "__main__":
    main()
