"""The tables and pictures of docs/benchmarks.md, from what `segment --json` wrote.

    python -m outsize.tests.benchmarks.figures RUNS.json... --folder docs

Writes benchmarks.json (every run) and benchmarks-size.png (time and memory over the raster's pixels), and prints the
tables as Markdown. matplotlib comes with .[bench].
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLOURS = {
    "bare": "#9aa0a6",
    "bare rewritten": "#5f6368",
    "outsize": "#1a73e8",
    "outsize int8": "#12805c",
    "window loop": "#e8710a",
    "window loop openvino": "#8d4e00",
    "map_overlap": "#9334e6",
    "monai 0.25": "#d93025",
    "monai 0.5": "#f29900",
}
Series = tuple[str, int, str, str]
"""(network, side of the raster, budget, contestant)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All runs of one contestant at one size, network and budget."""

    seconds: float
    """Median, first read to last chunk."""
    mpx_per_s: float
    """Median."""
    ratio: float | None
    """Median over the rounds of its rate over the bare network's in the same round."""
    peak_bytes: int
    """The highest."""
    flipped: int | None
    rounds: int


def collect(files: Iterable[dict[str, Any]]) -> dict[Series, Measured]:
    """The medians of everything that was measured; runs that failed are left out."""
    runs: dict[Series, list[dict[str, Any]]] = {}
    ratios: dict[Series, list[float]] = {}
    for file in files:
        bare = {run["round"]: run["mpx_per_s"] for run in file["runs"] if run["name"] == "bare" and "error" not in run}
        for run in file["runs"]:
            if "error" not in run:
                series = (file["network"], file["size"], file["memory"], run["name"])
                runs.setdefault(series, []).append(run)
                if run["round"] in bare:
                    ratios.setdefault(series, []).append(run["mpx_per_s"] / bare[run["round"]])
    found: dict[Series, Measured] = {}
    for series, mine in runs.items():
        flipped = [run["flipped"] for run in mine if "flipped" in run]
        found[series] = Measured(
            seconds=statistics.median(run["seconds"] for run in mine),
            mpx_per_s=statistics.median(run["mpx_per_s"] for run in mine),
            ratio=statistics.median(ratios[series]) if series in ratios else None,
            peak_bytes=max(run["peak_bytes"] for run in mine),
            flipped=max(flipped) if flipped else None,
            rounds=len(mine),
        )
    return found


def format_markdown(measured: dict[Series, Measured]) -> str:
    """A table for each network, size and budget, contestants in the order in which they ran."""
    lines: list[str] = []
    for group in dict.fromkeys(series[:3] for series in measured):
        network, size, memory = group
        lines += [f"\n{network} network, {size} x {size} x 4, budget {memory}:\n"]
        lines += [
            "| | Mpx/s | ratio to bare | seconds | peak GB | flipped px | rounds |",
            "|---|---|---|---|---|---|---|",
        ]
        for series, row in measured.items():
            if series[:3] == group:
                ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
                flipped = "" if row.flipped is None else f"{row.flipped:,}"
                lines.append(
                    f"| {series[3]} | {row.mpx_per_s:.2f} | {ratio} | {row.seconds:.1f} | {row.peak_bytes / 1e9:.2f} | "
                    f"{flipped} | {row.rounds} |"
                )
    return "\n".join(lines)


def draw(path: Path, measured: dict[Series, Measured]) -> None:
    """Two panels over the pixels of the raster: seconds, and the peak of all processes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        mine = sorted(
            (series[1] ** 2 / 1e6, row.seconds, row.peak_bytes) for series, row in measured.items() if series[3] == name
        )
        if mine:
            pixels, seconds, peaks = zip(*mine, strict=True)
            style = {"color": colour, "marker": "o", "markersize": 4, "label": name}
            panels[0].plot(pixels, seconds, **style)
            panels[1].plot(pixels, [peak / 1e9 for peak in peaks], **style)
    panels[0].set_ylabel("seconds, first read to last chunk")
    panels[1].set_ylabel("peak of all processes, GB")
    for panel in panels:
        panel.set_xlabel("Mpx of the raster")
        panel.grid(visible=True, color="#dadce0", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xscale("log")
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Write the files, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="what segment --json or this has written")
    parser.add_argument("--folder", type=Path, default=Path("docs"))
    options = parser.parse_args()
    read = [json.loads(path.read_text()) for path in options.runs]
    files = [run for found in read for run in (found if isinstance(found, list) else [found])]
    measured = collect(files)
    (options.folder / "benchmarks.json").write_text(json.dumps(files, indent=1) + "\n")
    usual = {series: row for series, row in measured.items() if series[0] == "small" and series[2] == "2GB"}
    draw(options.folder / "benchmarks-size.png", usual)
    print(format_markdown(measured))


if __name__ == "__main__":
    main()
