"""The choice of engine, device and precision: a table of machines and options, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from outsize.tiler.base.errors import EngineError, TilerError, UsageError
from outsize.tiler.engines import devices
from outsize.tiler.engines.choice import choose_engine, needs_cuda_facts
from outsize.tiler.engines.devices import CudaDevice, MachineFacts, find_cuda, find_facts, read_devices
from outsize.tiler.engines.engine import choose_precision

pytestmark = pytest.mark.system

GB = 10**9
OLD = CudaDevice(name="old", free_bytes=7 * GB, total_bytes=8 * GB, capability=(7, 5))
NEW = CudaDevice(name="new", free_bytes=70 * GB, total_bytes=80 * GB, capability=(9, 0))
BARE = MachineFacts(has_openvino=False)
USUAL = MachineFacts(has_openvino=True)
ONE = MachineFacts(has_openvino=True, cuda=(NEW,))
MIXED = MachineFacts(has_openvino=True, cuda=(NEW, OLD))


@pytest.mark.parametrize(
    ("facts", "engine", "device", "expected"),
    [
        (USUAL, None, None, ("openvino", "cpu", ())),
        (USUAL, "auto", "auto", ("openvino", "cpu", ())),
        (USUAL, "auto", "cpu", ("openvino", "cpu", ())),
        (USUAL, "torch", "auto", ("torch", "cpu", ())),
        (BARE, "auto", "auto", ("torch", "cpu", ())),
        (ONE, "auto", "auto", ("torch", "cuda", (NEW,))),
        (ONE, "torch", "auto", ("torch", "cuda", (NEW,))),
        (ONE, "torch", "cpu", ("torch", "cpu", ())),
        (ONE, "auto", "cpu", ("openvino", "cpu", ())),
        (ONE, "openvino", "auto", ("openvino", "cpu", ())),
        (ONE, "auto", "cuda", ("torch", "cuda", (NEW,))),
        (MIXED, "auto", "cuda", ("torch", "cuda", (NEW, OLD))),
        (MIXED, "auto", "cuda:1", ("torch", "cuda:1", (OLD,))),
        (MIXED, "torch", "cuda:0", ("torch", "cuda:0", (NEW,))),
    ],
)
def test_engine_and_device_follow_from_facts_and_options(
    facts: MachineFacts, engine: str | None, device: str | None, expected: tuple[object, ...]
) -> None:
    choice = choose_engine(facts, engine, device)
    assert (choice.engine, choice.device, choice.cuda) == expected
    assert choice.precision == "float32"


@pytest.mark.parametrize(
    ("facts", "options", "error", "words"),
    [
        (USUAL, {"engine": "onnx"}, UsageError, "engine must be auto, openvino or torch, got 'onnx'"),
        (USUAL, {"device": "gpu"}, UsageError, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (USUAL, {"device": "cuda:"}, UsageError, "device must be auto, cpu, cuda or cuda:N"),
        (ONE, {"device": "cuda:-1"}, UsageError, "device must be auto, cpu, cuda or cuda:N"),
        (USUAL, {"device": "cuda"}, EngineError, "needs a CUDA device that torch sees, and it sees none"),
        (USUAL, {"device": "cuda:0"}, EngineError, "device cuda:0 needs a CUDA device that torch sees"),
        (ONE, {"device": "cuda:1"}, EngineError, r"N from 0 to 0 here, got cuda:1; torch sees cuda:0 \(new\)"),
        (ONE, {"engine": "openvino", "device": "cuda"}, UsageError, "openvino runs on the CPU, got --device cuda"),
        (BARE, {"engine": "openvino"}, EngineError, "openvino is not installed"),
        (USUAL, {"precision": "int4"}, UsageError, "precision must be .*, got 'int4'"),
        (USUAL, {"precision": "bfloat16", "engine": "openvino"}, EngineError, "use --engine torch, or float32"),
        (USUAL, {"precision": "tf32"}, EngineError, "tf32 is what CUDA devices compute in"),
        (MIXED, {"precision": "tf32"}, EngineError, "tf32 needs .* 8.0, old has 7.5"),
        (MIXED, {"precision": "bfloat16", "device": "cuda:1"}, EngineError, "bfloat16 needs .* 8.0, old has 7.5"),
        (USUAL, {"engine": "openvino", "compiles": True}, UsageError, "--compile is for torch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    facts: MachineFacts, options: dict[str, object], error: type[TilerError], words: str
) -> None:
    with pytest.raises(error, match=words) as refusal:
        choose_engine(facts, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(refusal.value)


def test_a_precision_that_one_engine_offers_chooses_it() -> None:
    assert choose_engine(USUAL, precision="bfloat16").engine == "torch"
    assert choose_engine(ONE, precision="tf32").device == "cuda"
    assert choose_engine(MIXED, device="cuda:1", precision="float16").precision == "float16"
    assert choose_engine(USUAL, compiles=True).engine == "torch"


def test_the_precision_is_what_is_asked_for_where_the_engine_offers_it() -> None:
    assert choose_precision(None, "torch") == choose_precision("float32", "openvino") == "float32"
    with pytest.raises(EngineError, match=r"engine torch computes in float32, .*, got int8"):
        choose_precision("int8", "torch")


def test_cuda_is_asked_for_only_where_it_counts() -> None:
    assert [needs_cuda_facts(engine, device) for engine, device in ((None, None), ("torch", "cuda:1"))] == [True, True]
    assert [needs_cuda_facts(*pair) for pair in (("openvino", "auto"), ("auto", "cpu"))] == [False, False]


def test_facts_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_facts(with_cuda=False) == MachineFacts(has_openvino=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    assert find_facts(with_cuda=False) == BARE


def test_devices_are_asked_in_another_process_and_read_from_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = subprocess.run(
        [sys.executable, "-c", "from outsize.tiler.engines.devices import main; main()"], capture_output=True, text=True
    ).stdout
    assert isinstance(json.loads(printed.splitlines()[-1]), list)
    line = '[{"name": "new", "free_bytes": 70000000000, "total_bytes": 80000000000, "capability": [9, 0]}]'
    assert read_devices(f"some remark\n{line}\n") == (NEW,)

    def answers(text: str, code: int) -> None:
        find_cuda.cache_clear()
        done = subprocess.CompletedProcess([], code, stdout=text, stderr="Traceback\nno driver")
        monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: done)

    try:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        answers(line, 0)
        assert find_facts().cuda == (NEW,)
        answers("", 1)
        with pytest.raises(EngineError, match="do not answer: no driver; use --device cpu"):
            find_facts()
        answers("Segmentation fault", 0)
        with pytest.raises(EngineError, match="do not answer"):
            find_facts()
    finally:
        find_cuda.cache_clear()
