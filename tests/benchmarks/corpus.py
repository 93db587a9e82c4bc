"""A table of odd and broken rasters through `outsize ingest`: outcome, line, seconds, peak memory.

python -m outsize.tests.benchmarks.corpus [SHARED_DIR] > table.md
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ...tiler.base.text import format_bytes


def _row(source: Path, name: str, folder: Path) -> str:
    out = folder / "copy.zarr"
    command = [sys.executable, "-m", "outsize", "--json", "ingest", str(source), str(out), "--overwrite"]
    began = time.perf_counter()
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    seconds = time.perf_counter() - began
    lines = completed.stderr.strip().splitlines()
    if completed.returncode in (0, 3):
        values = json.loads(completed.stdout.splitlines()[-1])
        bands, height, width = values["shape"]
        told = f"{bands} x {height} x {width} {values['dtype']}"
        if values["unreadable"]:
            told = next(line for line in lines if line.startswith("unreadable"))
        peak = format_bytes(values["peak_bytes"])
    else:
        told, peak = lines[-1], ""
    outcome = {0: "copied", 1: "refused", 2: "refused", 3: "partly copied"}.get(completed.returncode, "CRASHED")
    told = told.replace(str(source.parent) + "/", "").replace("|", "\\|").removeprefix("outsize: error: ")
    return f"| {name} | {outcome} ({completed.returncode}) | {told} | {seconds:.1f} | {peak} |"


def main() -> None:
    """Print the table."""
    shared = Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SHARED_DIR", "../shared")).resolve()
    with (shared / "corpus/MANIFEST.tsv").open() as file:
        names = [row["file"] for row in csv.DictReader(file, delimiter="\t") if row["odd"] != "(sidecar)"]
    print("| file | outcome (exit code) | line | seconds | peak memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(_row(shared / "corpus" / name, name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
