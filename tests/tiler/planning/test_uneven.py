"""Windows that end off the network's stride take more memory, and the plan says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from outsize.tiler.base.memory import EngineMemory
from outsize.tiler.planning.check_margins import CHECK_FACTOR, check_margins
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.planning.spans import compute_spans, is_uneven
from outsize.tiler.planning.work import count_uneven_bytes
from outsize.tiler.runs.memory_probe import MARGIN, ProbedCore, fit_memory

from ...support.runs import class_network

pytestmark = pytest.mark.unit

EVEN = EngineMemory(worker_bytes=0, factor=1.0, constant_bytes=0)
UNEVEN = replace(EVEN, uneven_factor=3.0)


def program_bytes(shape: tuple[int, int], engine: EngineMemory, method: str = "window") -> int:
    plan = plan_tiles((3, *shape), class_network(), core=128, method=method, memory_of=lambda *_: engine)
    return plan.memory.program_bytes


@pytest.mark.parametrize("method", ["window", "program"])
@pytest.mark.parametrize(("shape", "ends_off"), [((384, 384), False), ((383, 384), True), ((384, 381), True)])
def test_only_rasters_that_end_off_the_stride_take_more(shape: tuple[int, int], ends_off: bool, method: str) -> None:
    assert max(class_network().stride) == 4
    more = program_bytes(shape, UNEVEN, method) / program_bytes(shape, EVEN, method)
    assert more > 1.3 if ends_off else more == 1


def test_the_largest_uneven_window_counts() -> None:
    network, shape = class_network(), (384 + 63, 384 + 1)
    rows, columns = (compute_spans(network, axis, shape, 128) for axis in (0, 1))
    uneven = [
        network.count_live_bytes((row.window[1] - row.window[0], column.window[1] - column.window[0]))
        for row in rows
        for column in columns
        if is_uneven(row, shape[0], 4) or is_uneven(column, shape[1], 4)
    ]
    assert 0 < len(uneven) < len(rows) * len(columns)
    assert count_uneven_bytes(network, shape, rows, columns, {}, {}) == max(uneven)


def test_a_probe_of_an_uneven_tile_gives_its_factor() -> None:
    points = [ProbedCore(live_bytes=size, host_bytes=10**6 + size) for size in (10**7, 2 * 10**7)]
    alone = fit_memory(points, EVEN, on_device=False)
    assert alone.uneven_factor == alone.factor
    uneven = ProbedCore(live_bytes=2 * 10**7, host_bytes=10**6 + 5 * 10**7)
    found = fit_memory(points, EVEN, on_device=False, uneven=uneven)
    assert found.factor == alone.factor
    assert found.uneven_factor == pytest.approx(MARGIN * 2.5, rel=0.01)
    # Where cropped tensors cost nothing, none is saved either.
    less = fit_memory(points, EVEN, on_device=False, uneven=ProbedCore(live_bytes=2 * 10**7, host_bytes=10**6))
    assert less.uneven_factor == less.factor


def test_logits_are_counted_where_a_run_gives_them() -> None:
    few = plan_tiles((3, 384, 384), class_network(), core=128, memory="4GB")
    many = plan_tiles((3, 384 * 3, 384 * 3), class_network(), core=128, memory="4GB")
    assert few.with_logits
    assert not many.with_logits
    assert few.largest_window == many.largest_window
    pixels = few.largest_window[0] * few.largest_window[1]
    # Four channels of float32, and the same in blocks of sixteen.
    assert few.memory.program_bytes - many.memory.program_bytes == pytest.approx(pixels * 4 * (4 + 16), rel=0.02)
    # The start check's longer look gives way first, then they do.
    near, far = check_margins(class_network(), "window", (384, 384))
    longer = CHECK_FACTOR * (far.live_bytes - near.live_bytes)
    tight, tighter = (
        plan_tiles((3, 384, 384), class_network(), core=128, memory=few.memory.total_bytes - longer - less)
        for less in (0, 1)
    )
    assert tight.with_logits
    assert not tighter.with_logits
