"""Converted programs on disk: found again, never believed when damaged, shared and trimmed; and few for one raster."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.geometry import Interval
from outsize.tiler.engines import openvino as engine_openvino
from outsize.tiler.engines import programs
from outsize.tiler.engines import programs as engine_programs
from outsize.tiler.engines.loading import compile_program, load_tiles, load_windows
from outsize.tiler.engines.program_cache import ProgramCache
from outsize.tiler.engines.program_ir import ModelParts
from outsize.tiler.engines.programs import pack_programs
from outsize.tiler.planning.planner import plan_tiles

from ...support.architectures import ARCHITECTURES
from ...support.zoo import alive

pytestmark = pytest.mark.system

SHAPE = (150, 170)
ROWS = [Interval(start=0, stop=64), Interval(start=64, stop=128), Interval(start=128, stop=150)]
COLUMNS = [Interval(start=0, stop=64), Interval(start=64, stop=128), Interval(start=128, stop=170)]


def network(name: str = "reflect padded") -> Network:
    torch.manual_seed(0)
    return analyze_network(alive(ARCHITECTURES[name]()).float(), bands=3)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTSIZE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    made: list[None] = []
    convert = engine_programs._convert
    monkeypatch.setattr(engine_programs, "_convert", lambda *args: (made.append(None), convert(*args))[1])
    return made


def run_middle(packed: engine_programs.EngineProgram, net: Network) -> np.ndarray:
    plan = plan_tiles((3, *SHAPE), net, core=64, method="program")
    tile = plan.tile(1, 1)
    image = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    return load_tiles(packed).run_tile(np.ascontiguousarray(image[(slice(None), *tile.window.slices())]), tile).copy()


def test_programs_are_converted_once_and_equal_afterwards(folder: Path, conversions: list[None]) -> None:
    net = network()
    first = pack_programs(net, "openvino", 2, SHAPE, ROWS[:2], COLUMNS[1:2])
    made = len(conversions)
    assert made == 2
    again = pack_programs(network(), "openvino", 2, SHAPE, ROWS[:2], COLUMNS[1:2])
    assert len(conversions) == made
    assert again.payload[1] == first.payload[1]
    assert np.array_equal(run_middle(first, net), run_middle(again, net))
    # The weights are there once, however many programs.
    kept = sum(file.stat().st_size for file in (folder / "programs").rglob("constants/*"))
    weights = sum(p.numel() * p.element_size() for p in net.module.parameters())
    assert kept < 1.2 * weights + 10_000
    assert len(first.payload[1]) < 1.2 * weights + 10_000


def test_a_network_for_windows_is_converted_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[None] = []
    convert = engine_openvino.convert_network
    monkeypatch.setattr(engine_openvino, "convert_network", lambda *args: (made.append(None), convert(*args))[1])
    net = network("unet transposed")
    first, again = compile_program(net, "openvino", 1), compile_program(network("unet transposed"), "openvino", 1)
    assert len(made) == 1
    assert again == first
    image = np.random.default_rng(0).normal(size=(3, 97, 131)).astype(np.float32)
    with torch.no_grad():
        expected = net.module(torch.from_numpy(image)[None])[0].numpy()
    assert np.allclose(load_windows(again).run(image), expected, atol=1e-4)
    with torch.no_grad():
        next(net.module.parameters()).add_(1)
    assert compile_program(net, "openvino", 1) != first
    assert len(made) == 2


def test_other_weights_have_other_programs(conversions: list[None]) -> None:
    pack_programs(network(), "openvino", 2, SHAPE, ROWS[:1], COLUMNS[:1])
    other = network()
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    pack_programs(other, "openvino", 2, SHAPE, ROWS[:1], COLUMNS[:1])
    assert len(conversions) == 2


@pytest.mark.parametrize(
    "damage", ["flipped constant", "flipped graph", "short constant", "missing constant", "empty graph"]
)
def test_what_is_damaged_is_converted_again(folder: Path, conversions: list[None], damage: str) -> None:
    net = network()
    whole = pack_programs(net, "openvino", 2, SHAPE, ROWS[1:2], COLUMNS[1:2])
    (graph,) = (folder / "programs").rglob("*.xml")
    constant = max((folder / "programs").rglob("constants/*"), key=lambda file: file.stat().st_size)
    path = graph if "graph" in damage else constant
    value = bytearray(path.read_bytes())
    if "flipped" in damage:
        value[len(value) // 2] ^= 1
    path.write_bytes(b"" if "empty" in damage else bytes(value[:-1] if "short" in damage else value))
    if "missing" in damage:
        path.unlink()
    again = pack_programs(net, "openvino", 2, SHAPE, ROWS[1:2], COLUMNS[1:2])
    assert len(conversions) == 2
    assert np.array_equal(run_middle(whole, net), run_middle(again, net))
    pack_programs(net, "openvino", 2, SHAPE, ROWS[1:2], COLUMNS[1:2])
    assert len(conversions) == 2


def test_a_folder_that_cannot_be_written_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OUTSIZE_CACHE_DIR", str(tmp_path / "file"))
    net = network()
    packed = pack_programs(net, "openvino", 2, SHAPE, ROWS[1:2], COLUMNS[1:2])
    assert np.isfinite(run_middle(packed, net)).all()


def test_the_limit_is_kept_and_the_newest_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTSIZE_CACHE_LIMIT", "25kB")
    for age, name in enumerate(("old", "newer", "newest")):
        cache = ProgramCache(name)
        cache.write("key", ModelParts(graph=b"<net/>", constants={name: bytes(10_000)}))
        os.utime(folder / "programs" / name, (age, age))
        cache.trim()
    assert sorted(path.name for path in (folder / "programs").iterdir()) == ["newer", "newest"]


def test_the_networks_own_programs_keep_the_limit_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those in use, the oldest first, with the constants that nothing else needs."""
    net = network()
    pack_programs(net, "openvino", 2, SHAPE, ROWS, COLUMNS)
    graphs = list((folder / "programs").rglob("*.xml"))
    middle = graphs[len(graphs) // 2].stem
    cache = ProgramCache(graphs[0].parent.name)
    monkeypatch.setenv("OUTSIZE_CACHE_LIMIT", "1kB")
    before = cache.read(middle)
    assert before is not None
    cache.trim({middle})
    (left,) = (folder / "programs").rglob("*.xml")
    assert left.stem == middle
    assert cache.read(middle) == before
    assert {file.name for file in (folder / "programs").rglob("constants/*")} == set(before.constants)
    cache.trim()
    assert not list((folder / "programs").rglob("*.xml"))
    assert not list((folder / "programs").rglob("constants/*"))


def test_programs_of_position_dependent_weights_are_few() -> None:
    """Indices and weights of resampling are inputs: tiles share programs though each has its own."""
    net = network("unet bilinear corners")
    plan = plan_tiles((3, 2100, 2300), net, core=64, method="program")
    assert len(plan.grid) == 33 * 36
    assert plan.geometries <= 16


def test_openvinos_workers_do_without_torch(tmp_path: Path) -> None:
    """Loading and running converted programs imports no torch, which would take 170 MB of each worker."""
    net = network("unet bilinear corners")
    packed = pack_programs(net, "openvino", 1, SHAPE, ROWS[1:2], COLUMNS[1:2])
    plan = plan_tiles((3, *SHAPE), net, core=64, method="program")
    import pickle

    (tmp_path / "packed").write_bytes(pickle.dumps((packed, plan.tile(1, 1))))
    code = f"""
        import pickle, sys
        import numpy as np
        from outsize.tiler.engines.loading import load_tiles
        packed, tile = pickle.loads(open({str(tmp_path / "packed")!r}, "rb").read())
        window = tile.window
        result = load_tiles(packed).run_tile(np.ones((3, window.height, window.width), np.float32), tile)
        assert result.shape[1:] == (64, 64), result.shape
        print(sorted({{"torch", "sympy"}} & set(sys.modules)))
    """
    completed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == "[]"


def test_programs_of_other_code_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of any file of any room counts: rules and axes are as decisive as engines."""
    folder = Path(programs.__file__).parents[1]
    monkeypatch.setattr(programs, "_hash_sources", programs._hash_sources.__wrapped__)
    before = programs._hash_sources()
    read = Path.read_bytes
    for changed in ("analysis/receptive.py", "engines/programs.py", "base/geometry.py", "rasters/nodata.py"):
        assert (folder / changed).is_file()

        def altered(path: Path, changed: str = changed) -> bytes:
            return read(path) + (b"#" if path == folder / changed else b"")

        monkeypatch.setattr(Path, "read_bytes", altered)
        assert programs._hash_sources() != before
    monkeypatch.setattr(Path, "read_bytes", read)
    assert programs._hash_sources() == before
