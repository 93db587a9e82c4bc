"""Weights from the files that training programs write: found under any prefix, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outsize.models.segmentation.files.state import find_network, find_states, fit_state, read_states
from outsize.models.segmentation.networks.trust import ModelFileError, Trust, read_model_file
from torch import Tensor, nn

State = dict[str, Tensor]


def make_network(seed: int = 0, width: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential()
        network.add_module("encoder", nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)))
        network.add_module("head", nn.Conv2d(width, 2, 1))
    return network.eval()


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


SAVED: dict[str, tuple[Callable[[State], Any], str]] = {
    "a state dict": (lambda s: s, ""),
    "Lightning": (
        lambda s: {"state_dict": under("model.", s) | {"criterion.weight": torch.ones(2)}, "epoch": 3},
        "crit",
    ),
    "Lightning, net.": (lambda s: {"state_dict": under("net.", s), "optimizer_states": [{"state": {0: {}}}]}, ""),
    "Lightning, deeper": (lambda s: {"state_dict": under("student.backbone.", s)}, ""),
    "model_state_dict": (
        lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        "",
    ),
    "model": (lambda s: {"model": under("module.", s)}, ""),
    "net": (lambda s: {"net": s, "acc": 0.9}, ""),
    "any key": (lambda s: {"weights": {"segmenter": s}}, ""),
    "DataParallel": (lambda s: under("module.", s), ""),
    "torch.compile": (lambda s: under("_orig_mod.", s), ""),
    "torch.compile of DataParallel": (lambda s: under("module._orig_mod.", s), ""),
    "torch.compile of a part": (lambda s: {n.replace("encoder.", "encoder._orig_mod."): v for n, v in s.items()}, ""),
    "DeepSpeed and Fabric": (lambda s: {"state_dict": under("_forward_module.model.", s)}, ""),
    "an averaged model": (lambda s: {**under("module.", s), "n_averaged": torch.tensor(7)}, "n_averaged"),
    "another part beside it": (lambda s: {**s, "criterion.weight": torch.ones(2)}, "criterion.weight"),
    "half precision": (lambda s: {name: value.half() for name, value in s.items()}, ""),
    "an old file": (lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")}, ""),
    "the same weights twice": (lambda s: {"state_dict": s, "model": {k: v.clone() for k, v in s.items()}}, ""),
}


@pytest.mark.parametrize(("save", "left"), SAVED.values(), ids=SAVED.keys())
def test_weights_are_found_under_any_prefix(tmp_path: Path, save: Callable[[State], Any], left: str) -> None:
    source, network = make_network(1), make_network(2)
    torch.save(save(dict(source.state_dict())), tmp_path / "w.ckpt")
    states = read_states(read_model_file(tmp_path / "w.ckpt"), Trust())
    remark = fit_state(network, states, tmp_path / "w.ckpt", "net")
    for name, value in source.state_dict().items():
        assert torch.allclose(network.state_dict()[name].float(), value.float(), atol=2e-3), name
    assert (left in remark) if left else (remark == "")
    assert "\n" not in remark


TWICE: dict[str, tuple[Callable[[State, State], Any], str, str]] = {
    "EMA beside": (lambda s, e: {"state_dict": s, "state_dict_ema": e}, "state_dict", "state_dict_ema"),
    "EMA in one": (lambda s, e: {"state_dict": under("model.", s) | under("ema.", e)}, "state_dict.model", "ema"),
    "two prefixes": (lambda s, e: under("model.", s) | under("ema_model.", e), "model", "ema_model"),
    "plain and prefixed": (lambda s, e: s | under("ema.", e), "the file itself", "ema"),
    "deep": (lambda s, e: {"state_dict": s, "callbacks": {"EMA": {"shadow": e}}}, "state_dict", "callbacks.EMA.shadow"),
}


@pytest.mark.parametrize(("save", "one", "other"), TWICE.values(), ids=TWICE.keys())
def test_of_two_sets_of_weights_the_user_chooses(save: Callable[[State, State], Any], one: str, other: str) -> None:
    first, second = make_network(1), make_network(2)
    value = save(dict(first.state_dict()), dict(second.state_dict()))
    states, path = find_states(value), Path("w.ckpt")
    with pytest.raises(ModelFileError, match=r"all weights of net 2 times, under .*--weights-key") as refusal:
        fit_state(make_network(3), states, path, "net")
    assert one in str(refusal.value)
    assert other.split(".")[-1] in str(refusal.value)
    for key, source in ((one, first), (other, second)):
        network = make_network(3)
        fit_state(network, states, path, "net", key=key)
        assert torch.equal(network.head.weight, source.head.weight)
    with pytest.raises(ModelFileError, match="holds no weights under 'elsewhere', but under"):
        fit_state(make_network(3), states, path, "net", key="elsewhere")


def test_nothing_is_loaded_in_part() -> None:
    state, path = dict(make_network(1).state_dict()), Path("w.pt")
    lacking = {name: value for name, value in state.items() if name != "head.bias"}
    deeper = {**state, "encoder.2.weight": torch.ones(4, 4, 3, 3)}
    wide = dict(make_network(1, width=8).state_dict())
    for value, words in (
        (lacking, "it lacks 1 tensor such as head.bias"),
        ({"state_dict": under("model.", lacking)}, "it lacks 1 tensor such as head.bias"),
        # A part of the network that has more layers there than here: another network.
        (deeper, "the network lacks 1 tensor such as encoder.2.weight"),
        (under("model.", deeper), "the network lacks 1 tensor such as encoder.2.weight"),
        (wide, "encoder.0.weight is 8 x 1 x 3 x 3 there and 4 x 1 x 3 x 3 in the network; .*encoder.0.bias is 8"),
        ({"a.b": torch.ones(2)}, "it lacks 8 tensors"),
    ):
        network = make_network(2)
        before = {name: entry.clone() for name, entry in network.state_dict().items()}
        with pytest.raises(ModelFileError, match=words):
            fit_state(network, find_states(value), path, "net")
        assert all(torch.equal(entry, before[name]) for name, entry in network.state_dict().items())
    # Numbered parts are one stack: a longer one is another network.
    stack = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    with pytest.raises(ModelFileError, match="the network lacks 2 tensors such as 1"):
        fit_state(nn.Sequential(nn.Conv2d(1, 1, 1)), {"": stack.state_dict()}, path, "net")
    with pytest.raises(ModelFileError, match="the network has no weights"):
        fit_state(nn.ReLU(), {"": state}, path, "net")
    with pytest.raises(ModelFileError, match=r"the network lacks 1 tensor such as criterion\.weight"):
        fit_state(make_network(), {"": {**state, "criterion.weight": torch.ones(2)}}, path, "net", exact=True)


def test_of_two_whole_networks_the_user_chooses() -> None:
    model, ema = make_network(1), make_network(2)
    path = Path("w.pt")
    assert find_network({"model": model, "criterion": nn.CrossEntropyLoss(), "epoch": 1}, path) is model
    assert find_network({"model": model, "network": model}, path) is model
    assert find_network({"state_dict": model.state_dict()}, path) is None
    with pytest.raises(ModelFileError, match="several networks, under model, ema; choose with --weights-key model"):
        find_network({"model": model, "ema": ema}, path)
    assert find_network({"model": model, "ema": ema}, path, "ema") is ema


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_numbers_of_another_kind_are_no_weights() -> None:
    network, state = make_network(2), dict(make_network(1).state_dict())
    before = network.head.weight.clone()
    eighth = torch.quantize_per_tensor(state["head.weight"], 0.1, 0, torch.qint8)
    for value, words in (
        (state["head.weight"].to(torch.int8), r"whole numbers \(int8\)"),
        (state["head.weight"] > 0, r"truth values \(bool\)"),
        (state["head.weight"].to(torch.complex64), r"complex numbers \(complex64\)"),
        (state["head.weight"].to(torch.float8_e4m3fn), r"numbers of 8 bits \(float8_e4m3fn\)"),
        (eighth, r"quantised numbers \(qint8\)"),
    ):
        with pytest.raises(ModelFileError, match=rf"head.weight holds {words} there and numbers \(float32\) in the"):
            fit_state(network, {"": {**state, "head.weight": value}}, Path("w.pt"), "net")
        assert torch.equal(network.head.weight, before)
    # What is refused the other way round too: numbers for places in a table.
    table = nn.Module()
    table.register_buffer("index", torch.arange(4))
    with pytest.raises(ModelFileError, match=r"index holds numbers \(float32\) there and whole numbers \(int64\)"):
        fit_state(table, {"": {"index": torch.ones(4)}}, Path("w.pt"), "net")
    # A count of batches is nobody's weight.
    counts = {name: value.float() for name, value in state.items()}
    assert fit_state(network, {"": counts}, Path("w.pt"), "net") == ""


def test_digits_that_are_lost_are_told() -> None:
    state = {name: value.double() for name, value in make_network(1).state_dict().items()}
    assert fit_state(make_network(2), {"": state}, Path("w.pt"), "net") == (
        "8 tensors of w.pt rounded, float64 to the network's float32"
    )
    assert fit_state(make_network(2).double(), {"": state}, Path("w.pt"), "net") == ""
