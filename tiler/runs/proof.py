"""Proof: whether tiles of a user's own module equal the whole image, tried on a small image in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..analysis.network import Network, analyze_network
from ..analysis.program import make_program
from ..base.errors import UntileableError
from ..base.geometry import Grid, Window, align_up
from ..planning.method import choose_method
from ..system.process_locks import TRACING

TOLERANCE = 1e-10
"""Of the largest logit: float64 rounding is some 1e-14 of it, a missing pixel far more."""
LARGEST_SIDE = 2048
"""Of the image that is tried; networks that look further cannot be proved here."""
SIDES = ("top", "bottom", "left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofStep:
    """One thing that was tried."""

    name: str
    passed: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was tried, and on what."""

    method: str
    shape: tuple[int, int]
    core: int
    steps: tuple[ProofStep, ...]

    @property
    def passed(self) -> bool:
        return all(step.passed for step in self.steps)


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Without oneDNN, whose Winograd convolution spreads NaN over whole blocks."""
    with TRACING, warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        yield


class _Logits(nn.Module):
    """The logits of a module that shows them, as a module: class numbers have no distance, bytes no NaN."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module.logits(x)  # pyright: ignore[reportCallIssue]


def prove_network(network: Network, method: str | None = None) -> Proof:
    """Try on a small image, in float64 and at the logits, what the analysis claims.

    Equality of every tile with the whole image; NaN and huge values everywhere outside a tile's window, which must not
    reach its core; NaN in the outermost row and column of windows, which must reach it, or the proof would be blind.

    Args:
        method: "window" or "program"; None: as `plan_tiles` chooses.

    Raises:
        UntileableError: the network looks further than the image that can be tried.
    """
    if not network.is_known:
        raise UntileableError(
            "a halo that is only stated cannot be proved; the start check of each run compares sampled tiles with "
            "larger windows"
        )
    module = copy.deepcopy(network.module).double()
    exact = analyze_network(_Logits(module) if network.has_logits else module, network.bands, torch.float64)
    if not exact.output_dtype.is_floating_point:
        raise UntileableError(
            "whole numbers show no NaN, and of class numbers an argmax hides most; prove the network without it"
        )
    multiple = exact.size_multiple
    reach = exact.program_halo
    widest = max(reach.top, reach.bottom, reach.left, reach.right)
    stride = max(exact.stride)
    core = align_up(max(16, min(64, stride)), stride)
    side = align_up(2 * widest + 3 * core + 5, multiple)
    if side > LARGEST_SIDE:
        raise UntileableError(
            f"the network looks {widest} pixels far, which takes an image of {side} x {side} to prove, more than "
            f"{LARGEST_SIDE}; prove a narrower version of it"
        )
    shape = (side, side + multiple * 7)
    # A raster of any size goes by the method that the largest would.
    chosen = choose_method(network, method, (1 << 20, 1 << 20))
    trial = _Trial(exact, chosen, shape, max(1, int(core * min(exact.scale))))
    return Proof(method=chosen, shape=shape, core=trial.core, steps=tuple(trial.steps()))


class _Trial:
    """One image, cut into cores."""

    def __init__(self, network: Network, method: str, shape: tuple[int, int], core: int) -> None:
        self.network, self.method, self.shape, self.core = network, method, shape, core
        generator = torch.Generator().manual_seed(0)
        self.image = 100 * torch.rand((1, network.bands, *shape), generator=generator, dtype=torch.float64)
        self.grid = Grid(shape=network.output_shape(shape), cell=(core, core))
        rows, columns = self.grid.counts
        self.middle = self.grid.window(rows // 2, columns // 2)

    def steps(self) -> Iterator[ProofStep]:
        with _plain_arithmetic():
            self.whole = self.network.module(self.image)[0]
            self.largest = max(1e-30, float(self.whole.abs().max()))
            yield self._equality()
            yield self._poison("NaN outside", float("nan"))
            yield self._poison("1e30 outside", 1e30)
            yield self._tightness()

    def _window(self, core: Window) -> Window:
        """What the analysis says that a core needs."""
        if self.method == "program":
            return make_program(self.network, self.shape, core).window
        sides = zip(self.network.axes, (core.rows, core.columns), self.network.padded_shape(self.shape), strict=True)
        rows, columns = (axis.input_interval(interval).clamp(extent) for axis, interval, extent in sides)
        return Window.from_intervals(rows, columns)

    def _tile(self, core: Window) -> Tensor:
        """A core as a run computes it."""
        if self.method == "program":
            program = make_program(self.network, self.shape, core)
            return program(self.image[(..., *program.window.slices())])[0][0]
        window = self.network.input_window(core, self.shape)
        result = self.network.module(self.image[(..., *window.slices())])[0]
        top, left = (int(v * s) for v, s in zip((window.y, window.x), self.network.scale, strict=True))
        return result[:, core.y - top : core.y - top + core.height, core.x - left : core.x - left + core.width]

    def _equality(self) -> ProofStep:
        rows, columns = self.grid.counts
        picked = {(r, c) for r in {0, 1, rows // 2, rows - 1} for c in {0, 1, columns // 2, columns - 1}}
        cores = [self.grid.window(*at) for at in sorted(picked) if at[0] < rows and at[1] < columns]
        worst = 0.0
        for core in cores:
            tile, expected = self._tile(core), self.whole[(slice(None), *core.slices())]
            if tile.shape != expected.shape:
                return ProofStep(name="equality", passed=False, text=f"core {core} has shape {tuple(tile.shape)}")
            worst = max(worst, float((tile - expected).abs().max()) / self.largest)
        text = f"{len(cores)} cores, edges and corners among them: largest difference {worst:.1e} of the largest logit"
        return ProofStep(name="equality", passed=worst <= TOLERANCE, text=text)

    def _poison(self, name: str, value: float) -> ProofStep:
        window = self._window(self.middle)
        image = torch.full_like(self.image, value)
        if value == value:
            image[..., ::2] *= -1
        inside = (..., *window.slices())
        image[inside] = self.image[inside]
        cut = (slice(None), *self.middle.slices())
        got = self.network.module(image)[0][cut]
        worst = float((got - self.whole[cut]).abs().max()) / self.largest
        passed = worst <= TOLERANCE  # NaN is not
        text = f"core {self.middle} keeps its values" if passed else f"it reaches core {self.middle}"
        return ProofStep(name=name, passed=passed, text=text)

    def _tightness(self) -> ProofStep:
        """One pixel less on a side must be noticed, for some core near the middle."""
        rows, columns = self.grid.counts
        caught: set[str] = set()
        for row in (rows // 2, rows // 2 - 1):
            for column in (columns // 2, columns // 2 - 1):
                core = self.grid.window(max(0, row), max(0, column))
                window, cut = self._window(core), (slice(None), *core.slices())
                for side, place in zip(
                    SIDES,
                    (
                        (window.y, slice(None)),
                        (window.rows.stop - 1, slice(None)),
                        (slice(None), window.x),
                        (slice(None), window.columns.stop - 1),
                    ),
                    strict=True,
                ):
                    image = self.image.clone()
                    image[(..., *place)] = float("nan")
                    if bool(torch.isnan(self.network.module(image)[0][cut]).any()):
                        caught.add(side)
        missed = [side for side in SIDES if side not in caught]
        if len(missed) == len(SIDES):
            # Weights that let nothing through would make the other steps blind too.
            return ProofStep(
                name="one pixel less", passed=False, text="not noticed on any side: the proof sees nothing"
            )
        text = "noticed on every side"
        if missed:
            text = f"noticed; at {', '.join(missed)} windows are wider than they must be, which is safe"
        return ProofStep(name="one pixel less", passed=True, text=text)
