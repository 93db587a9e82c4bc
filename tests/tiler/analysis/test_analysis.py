"""Analysis is quick, says what it does, ends, and answers for every network that it accepts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from outsize.tiler.analysis import agreement, foresight, graph
from outsize.tiler.analysis.graph import trace
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.program import make_program
from outsize.tiler.base.errors import UntileableError, UntraceableError
from outsize.tiler.base.geometry import Interval, Window
from outsize.tiler.system.time_limit import time_limit
from torch import Tensor, nn
from torch.nn import functional as F

from ...support.analysed import NETWORKS, analysed
from ...support.zoo import alive

pytestmark = pytest.mark.system


@pytest.mark.parametrize("name", NETWORKS)
def test_every_public_property_answers_or_says_why_not(name: str) -> None:
    network = analysed(name)
    for attribute in dir(type(network)):
        if isinstance(getattr(type(network), attribute), property):
            assert getattr(network, attribute) is not None
    window = Window(y=0, x=0, height=1, width=1)
    asked: dict[str, Callable[[], object]] = {
        "needed_interval": lambda: network.needed_interval(0, Interval(start=0, stop=1)),
        "input_window": lambda: network.input_window(window, (80, 80)),
    }
    for ask in asked.values():
        if network.window_refusal:
            with pytest.raises(UntileableError, match="cannot be tiled"):
                ask()
        else:
            assert ask() is not None


@pytest.mark.parametrize("name", NETWORKS)
def test_the_halo_of_what_only_programs_run_is_what_programs_read(name: str) -> None:
    network = analysed(name)
    if not network.window_refusal:
        pytest.skip("windows can run it")
    halo = network.halo
    sides = [(halo.top, halo.bottom), (halo.left, halo.right)]
    image = network.padded_shape((1009, 1013))
    reached = [[0, 0], [0, 0]]
    for place in (390, 401, 414):
        starts = [int(place * scale) for scale in network.scale]
        core = Window(y=starts[0], x=starts[1], height=32, width=32)
        read = make_program(network, image, core).window
        for axis, (wanted, window) in enumerate(((core.rows, read.rows), (core.columns, read.columns))):
            before = int(wanted.start / network.scale[axis]) - window.start
            after = window.stop - int(wanted.stop / network.scale[axis])
            reached[axis] = [max(reached[axis][0], before), max(reached[axis][1], after)]
    for axis in (0, 1):
        for side in (0, 1):
            # On this image and of these cores alone: no more than what is said, and hardly less.
            assert reached[axis][side] <= sides[axis][side] + 1
            assert reached[axis][side] >= sides[axis][side] - 2 * network.stride[axis]


class DemandingUNet(nn.Module):
    """Five levels without crops: takes only sizes divisible by 32."""

    def __init__(self, pool: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first(x))
        deep = self.pool(F.avg_pool2d(first, 32))
        return self.last(torch.cat([first, F.interpolate(deep, scale_factor=32)], 1))


def test_large_multiples_cost_no_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels: list[int] = []
    right = agreement._random_image

    def counted(bands: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        pixels.append(size[0] * size[1])
        return right(bands, size, dtype)

    monkeypatch.setattr(agreement, "_random_image", counted)
    network = analyze_network(alive(DemandingUNet()), bands=3)
    assert network.size_multiple == 32
    assert sum(pixels) < 100_000


class Grown(nn.Module):
    """Pools with ceil_mode and padding, whose true sizes torch.export has wrong at odd multiples of 32."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        return F.interpolate(F.max_pool2d(x, 2, 2, 1, ceil_mode=True), size=size)


def test_wrong_sizes_of_a_trace_are_found_without_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = trace(alive(DemandingUNet(Grown())), 3, torch.float64)
    assert traced.size_multiple == 32

    def no_pixels(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(agreement, "_run_graph", no_pixels)
    with pytest.raises(UntileableError, match=r"max_pool2d .* torch\.export says"):
        agreement._require_true_sizes(traced, 3, torch.float64)


def test_networks_of_large_images_alone_are_compared_too() -> None:
    class Other(nn.Module):
        """Fails below 201 pixels; does not what its trace does."""

        def forward(self, x: Tensor) -> Tensor:
            y = x.amax(1, keepdim=True)
            y = y + F.pad(y[:, :, 200:, 200:], (200, 0, 200, 0))
            return y if torch.compiler.is_compiling() else y + 1

    with pytest.raises(UntileableError, match="takes another path on an image of 201 x 201"):
        analyze_network(Other().eval(), bands=3, dtype="float32")


class Slow(nn.Module):
    """Looks at the whole image, and then takes long."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
        self.function, self.rounds = function, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.inner(x))
        for _ in range(40):
            if torch.compiler.is_compiling():
                self.rounds.append(1)
            x = x + 1
        return x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x * x.mean((2, 3), keepdim=True), r"aten\.mean .*whole-image statistics; reduce over channels only"),
        (lambda x: x - x.amax(dim=3, keepdim=True), r"aten\.amax .*whole-image statistics"),
        (lambda x: x * F.adaptive_avg_pool2d(x, 1), r"aten\.adaptive_avg_pool2d .*pool over fixed windows"),
        (lambda x: F.group_norm(x, 2), r"aten\.group_norm .*whole-image statistics"),
    ],
)
def test_a_long_trace_ends_in_the_refusal_of_what_it_has_met(
    function: Callable[[Tensor], Tensor], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foresight, "PATIENCE_S", 0.0)
    module = Slow(function).eval()
    with pytest.raises(UntileableError, match=words) as refusal:
        analyze_network(module, bands=3)
    assert "test_analysis.py:" in str(refusal.value)
    assert "cannot be tiled" in str(refusal.value)
    assert len(module.rounds) < 3


def test_what_is_no_whole_image_is_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "PATIENCE_S", 0.0)
    for function in (
        lambda x: x * x.mean(1, keepdim=True),
        lambda x: x * torch.ones(1, 4, 5, 5).mean((2, 3), keepdim=True),
        lambda x: x * F.adaptive_avg_pool2d(torch.ones(1, 4, 5, 5), 1),
    ):
        assert analyze_network(Slow(function).eval(), bands=3).size_multiple == 1


def test_a_trace_without_end_is_ended_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while isinstance(x.shape[-1], torch.SymInt):
                try:
                    x = x.abs()
                except Exception:  # noqa: BLE001 - as code does that tries this and that
                    continue
            return x

    monkeypatch.setattr(graph, "TRACE_LIMIT_S", 0.3)
    with pytest.raises(UntraceableError, match=r"within 0\.3 s of computing; state its --halo"):
        analyze_network(Endless().eval(), bands=3, dtype="float32")
    # The next trace is none the worse.
    monkeypatch.undo()
    assert analyze_network(nn.Conv2d(3, 2, 3, padding=1).eval(), bands=3).halo.top == 1


def test_a_limit_that_is_kept_leaves_nothing_behind() -> None:
    before = threading.active_count()
    with time_limit(60):
        assert threading.active_count() == before + 1
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    with pytest.raises(ZeroDivisionError), time_limit(60):
        raise ZeroDivisionError


def test_analysis_tells_its_stages() -> None:
    told: list[str] = []
    analyze_network(nn.Conv2d(3, 2, 1).eval(), bands=3, tell=told.append)
    assert [any(word in stage for stage in told) for word in ("traced", "rules", "compared")] == [True, True, True]


def test_a_profiler_ends_after_an_analysis() -> None:
    """CPython never leaves a loop under cProfile where an exception for a thread was taken back before."""
    code = (
        "import cProfile\n"
        "from outsize.tiler.system.time_limit import time_limit\n"
        "with time_limit(60):\n    pass\n"
        "def count():\n    return sum(number for number in range(1000))\n"
        "profile = cProfile.Profile()\n"
        "print(profile.runcall(count))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "499500"
