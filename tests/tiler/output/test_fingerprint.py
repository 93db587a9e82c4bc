"""Fingerprints change with what a result depends on, and with nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from outsize.models import UNet
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.analysis.network_hash import hash_network
from outsize.tiler.output.fingerprint import find_differences

from ...support.zoo import ZOO, alive

pytestmark = pytest.mark.system

CODE = """
from outsize.tests.tiler.output.test_fingerprint import hash_small_network
print(hash_small_network())
"""


def hash_small_network() -> str:
    torch.manual_seed(0)
    return hash_network(analyze_network(UNet(2, 3, (4, 6)).eval(), 2))


def test_the_same_network_has_the_same_hash_in_every_process() -> None:
    other = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == hash_small_network()


def test_one_weight_or_one_constant_changes_the_hash() -> None:
    module = alive(ZOO["convolution"]())
    before = hash_network(analyze_network(module, bands=3))
    assert hash_network(analyze_network(module, bands=3)) == before
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-9
    assert hash_network(analyze_network(module, bands=3)) != before
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.LeakyReLU(0.1)).eval()
    before = hash_network(analyze_network(module, bands=3))
    module[1] = torch.nn.LeakyReLU(0.2)
    assert hash_network(analyze_network(module, bands=3)) != before


def test_differences_are_named() -> None:
    stored = {"kind": "class", "network": "a" * 64, "fill": [0]}
    now = {"kind": "logits", "network": "b" * 64, "fill": [0]}
    assert find_differences(stored, now) == [
        "kind class there, logits now",
        "network aaaaaaaaaaaa... there, bbbbbbbbbbbb... now",
    ]
    assert find_differences(stored, dict(stored)) == []


def test_an_output_begun_before_there_was_a_choice_of_precision_is_in_float32() -> None:
    stored = {"kind": "class"}
    assert find_differences(stored, {"kind": "class", "precision": "float32"}) == []
    assert find_differences(stored, {"kind": "class", "precision": "int8"}) == ["precision float32 there, int8 now"]


def test_a_copied_input_is_named_by_its_path() -> None:
    there, now = {"input": "a"}, {"input": "b"}
    same = "the input's size or time of change is another"
    assert find_differences(there, now) == [same]
    assert find_differences(there, now, (["/in/m.tif"], ["/in/./m.tif"])) == [same]
    assert find_differences(there, now, (["/in/m.tif"], ["/other/m.tif"])) == [
        "the input is another file: /in/m.tif there, /other/m.tif now"
    ]
