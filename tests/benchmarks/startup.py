"""Where the seconds before the first tile go: one process for each run, with an empty cache and with a filled one.

    python -m outsize.tests.benchmarks.startup --size 4096 --rounds 3

Prints, for each step, the median of the seconds that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ...pipelines.base.console import format_table
from ...sample_data.scene import Scene
from ...sample_data.write import write_scene

STEPS = (
    "interpreter and imports",
    "weights and scene opened",
    "network traced",
    "memory measured, plan made",
    "workers started, programs converted",
    "start check",
    "first tile",
)


def run_child(scene: Path, out: Path, began: float) -> None:
    """One run; prints when each step ended, in seconds since `began`."""
    ends: list[float] = []

    def mark(_: object = None) -> None:
        ends.append(time.time() - began)

    import outsize
    from outsize.tiler.analysis.network import analyze_network  # the import of torch
    from outsize.tiler.runs.events import ClusterReady, Event, RunPlanned, StartChecked, TileFinished

    mark()
    raster, model = outsize.open_raster(scene), outsize.load_model()
    module = outsize.as_tile_network(model, output="class")
    mark()
    network = analyze_network(module, bands=raster.bands, dtype=raster.dtype)
    mark()
    waited: list[type] = [RunPlanned, ClusterReady, StartChecked, TileFinished]

    def listen(event: Event) -> None:
        if waited and isinstance(event, waited[0]):
            waited.pop(0)
            mark()

    outsize.predict(raster, network, out, overwrite=True, listener=listen)
    print(json.dumps(ends))


def measure(scene: Path, folder: Path, cache: Path) -> list[float]:
    """Seconds of each step."""
    code = "import sys; from pathlib import Path; from outsize.tests.benchmarks.startup import run_child; "
    code += "run_child(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))"
    words = [sys.executable, "-W", "ignore", "-c", code, str(scene), str(folder / "out.zarr"), repr(time.time())]
    environment = {**os.environ, "OUTSIZE_CACHE_DIR": str(cache)}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    ends = json.loads(done.stdout.splitlines()[-1])
    return [end - before for before, end in zip([0.0, *ends], ends, strict=False)]


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cold: list[list[float]] = []
    warm: list[list[float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scene(folder, Scene(height=options.size, width=options.size, seed=1))
        for number in range(options.rounds):
            for found in (cold, warm):
                found.append(measure(folder / "scene.zarr", folder, folder / f"cache-{number}"))
    rows = [
        [step, *(f"{statistics.median(seconds[index] for seconds in found):.2f}" for found in (cold, warm))]
        for index, step in enumerate(STEPS)
    ]
    rows.append(["all", *(f"{statistics.median(sum(seconds) for seconds in found):.2f}" for found in (cold, warm))])
    print(format_table(["seconds", "empty cache", "filled cache"], rows))


if __name__ == "__main__":
    main()
