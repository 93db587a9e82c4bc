"""The plan of a layer: the sums of the design, and a refusal with the numbers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from outsize.models.faceid.base.errors import HeadMemoryError
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.head_plan import plan_head
from outsize.models.faceid.layer.row_rules import SGD, Momentum, RowRMS

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("rule", "bytes_per_class"), [(SGD(lr=1), 1024), (RowRMS(lr=1), 1028), (Momentum(lr=1), 2048)], ids=str
)
def test_bytes_a_class_are_those_of_rows_and_state(rule: SGD | RowRMS | Momentum, bytes_per_class: int) -> None:
    plan = plan_head(10_000_000, 512, batch=64, rule=rule)
    assert abs(plan.bytes_per_class - bytes_per_class) < 0.5
    assert plan.machine_bytes < 1.06 * 10_000_000 * bytes_per_class
    assert plan.flops == 8 * 64 * 10_000_000 * 512


def test_the_plan_is_what_the_layer_holds() -> None:
    for ranks in (1, 2, 3):
        plan = plan_head(300_001, 16, batch=8, ranks=ranks, rule=RowRMS(lr=1))
        head = ShardedMarginHead(300_001, 16, rule=RowRMS(lr=1))
        assert plan.storage == "float16"
        if ranks == 1:
            assert plan.rows_bytes == head.rows.numel() * 2
            assert plan.state_bytes == head.state.numel() * 4
    assert plan_head(100, 16, batch=8, storage=torch.float32).rows_bytes == 2 * 4096 * 16 * 4  # with its gradient


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    plan = plan_head(10_000_000, 512, batch=64, rule=Momentum(lr=1))
    with pytest.raises(
        HeadMemoryError, match=r"10,000,000 classes x 512 in float16 on 1 rank need 2\d\.\d+ GB"
    ) as refusal:
        plan.require(12_000_000_000)
    fits = int(str(refusal.value).rsplit("; ", 1)[1].split(" classes")[0].replace(",", ""))
    plan_head(fits - 70_000, 512, batch=64, rule=Momentum(lr=1)).require(12_000_000_000)
    plan.require(30_000_000_000)
    assert "5.12 billion parameters" in plan.explain()


STEP = """
    import re, sys
    from pathlib import Path
    import torch
    from outsize.models.faceid.layer.head import ShardedMarginHead
    from outsize.models.faceid.layer.row_rules import SGD
    torch.set_num_threads(1)
    classes, batch, dim = (int(value) for value in sys.argv[1:])
    head = ShardedMarginHead(classes, dim, rule=SGD(lr=0.1))
    head(torch.randn(batch, dim, requires_grad=True), torch.randint(0, classes, (batch,))).backward()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_batch_times_classes() -> None:
    """The peak grows by their rows and little else, 512 samples' logits are 820 MB."""
    classes, batch, dim = 400_000, 512, 16

    def peak(classes: int) -> int:
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STEP), str(classes), str(batch), str(dim)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    plan = plan_head(classes, dim, batch=batch, rule=SGD(lr=1))
    grown = peak(classes) - peak(4096)
    assert plan.rows_bytes / 2 < grown < plan.rows_bytes + plan.buffer_bytes
    assert plan.rows_bytes + plan.buffer_bytes < batch * classes * 4 / 6
