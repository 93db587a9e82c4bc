"""Memory of a step: predicted from small cores, true of larger ones; too small budgets refused."""

from __future__ import annotations

import pytest
import torch
from outsize.models.segmentation.model import TileNetwork
from outsize.models.segmentation.scaling import Scaling
from outsize.models.segmentation.step_memory import measure_kept_bytes, require_budget, tile_bytes_of
from outsize.models.segmentation.unet import UNet
from outsize.tiler.errors import BudgetError
from outsize.tiler.memory import MB
from outsize.tiler.network import analyze_network
from outsize.tiler.trainable import TrainableNetwork, prepare_training


@pytest.fixture(scope="module")
def network() -> TrainableNetwork:
    module = TileNetwork(UNet(3, 2, (6, 8), "frozen"), Scaling.none(3), "logits").eval()
    return prepare_training(analyze_network(module, 3, torch.float32), 3, torch.float32)


def test_what_a_core_keeps_follows_from_small_cores(network: TrainableNetwork) -> None:
    predict = tile_bytes_of(network)
    for side in (61, 150, 331):
        _, kept = measure_kept_bytes(network, side)
        assert predict(side) - 20 * MB == pytest.approx(2 * kept, rel=0.03)
    # At least the first stage's activations: two convolutions and norms of 6 channels, in float32.
    pixels, kept = measure_kept_bytes(network, 150)
    assert kept > 4 * 6 * 4 * pixels


def test_a_budget_that_is_too_small_names_a_core_that_fits(network: TrainableNetwork) -> None:
    base, predict = 100 * MB, tile_bytes_of(network)
    need = base + predict(300)
    assert require_budget(network, 300, base, need) == need
    with pytest.raises(BudgetError, match=r"cores of 300 px need .* or --core 256"):
        require_budget(network, 300, base, need - 1)
    with pytest.raises(BudgetError, match=r"or --core 32$"):
        require_budget(network, 300, base, base + predict(32))
    with pytest.raises(BudgetError, match=r"give as much$"):
        require_budget(network, 300, base, base)
