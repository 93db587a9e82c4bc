"""Things of every registry, added from outside: by a decorator in a module, or by a package's entry point."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from click.testing import CliRunner
from distributed import Client
from outsize.models.faceid.base.errors import HeadError
from outsize.models.faceid.layer.head import ShardedMarginHead
from outsize.models.faceid.layer.margin_registry import MARGINS
from outsize.models.faceid.layer.margins import margin_from
from outsize.models.faceid.layer.reference import compute_dense_loss
from outsize.models.segmentation.files.kinds import KINDS
from outsize.models.segmentation.files.sources import load_model
from outsize.models.segmentation.networks.trust import ModelFileError
from outsize.models.segmentation.training.loss_text import LOSSES, parse_loss
from outsize.pipelines.commands.cli import cli
from outsize.pipelines.segment.writers import WRITERS
from outsize.sample_data.small import small_scene_path
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import EngineError, RasterError, UsageError
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.registry import MODULES_VARIABLE, Registry
from outsize.tiler.engines.loading import compile_program, load_windows
from outsize.tiler.engines.registry import ENGINES
from outsize.tiler.output.store import OutputDescription, create_output, open_array, read_header, writable
from outsize.tiler.planning.planner import plan_tiles
from outsize.tiler.rasters.block_cache import BlockStore
from outsize.tiler.rasters.formats import FORMATS
from outsize.tiler.rasters.georeference import Georeference
from outsize.tiler.rasters.opening import open_raster
from outsize.tiler.runs.inference import predict_window
from outsize.tiler.runs.run import predict

from .support.analysed import analysed
from .support.rasters import write_geotiff
from .support.registries import as_before, on_path, write_module, write_package

ALL: tuple[Registry[Any], ...] = (LOSSES, MARGINS, WRITERS, KINDS, ENGINES, FORMATS)
Add = Callable[[Registry[Any], str, str], str]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of `sys.path` that is no part of the package; what is registered meanwhile is forgotten."""
    with as_before(ALL):
        yield on_path(tmp_path / "outside", monkeypatch)


@pytest.fixture(params=["decorator", "entry point"])
def add(outside: Path, request: pytest.FixtureRequest) -> Add:
    """Adds the class or function `Toy` of a module's code by a name; returns the module's name."""

    def by_decorator(registry: Registry[Any], name: str, code: str) -> str:
        module = write_module(outside, f"toy_{name}", code)
        registry.register(name)(importlib.import_module(module).Toy)
        return module

    def by_entry_point(registry: Registry[Any], name: str, code: str) -> str:
        module = write_module(outside, f"toy_{name}", code)
        write_package(outside, f"toys_{name}", registry.group, {name: f"{module}:Toy"})
        return module

    return by_decorator if request.param == "decorator" else by_entry_point


LOSS = """
    from dataclasses import dataclass
    import torch

    @dataclass(frozen=True, kw_only=True)
    class Toy:
        ignore_index: int
        weight: tuple | None = None
        separable = True

        def select(self, labels, valid):
            return valid & (labels[0] != self.ignore_index)

        def sums(self, logits, labels, counted):
            truth = torch.nn.functional.one_hot(labels[0].long().clamp(0, len(logits) - 1), len(logits)).movedim(-1, 0)
            each = (logits.softmax(dim=0) - truth).square().sum(dim=0)
            if self.weight is not None:
                each = each * torch.tensor(self.weight, dtype=each.dtype)[labels[0].long()]
            return torch.stack([each[counted].sum(), counted.sum().to(each.dtype)])

        def value(self, sums):
            return sums[0] / sums[1]
"""


def test_an_added_loss_goes_by_its_name_in_sums_and_takes_class_weights(add: Add) -> None:
    add(LOSSES, "brier", LOSS)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((3, 6, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (1, 6, 8), generator=generator)
    weights = (0.5, 1.0, 2.0)
    sums, counted = [], torch.ones((6, 8), dtype=torch.bool)
    loss = parse_loss("2*brier", weights)
    for columns in (slice(0, 3), slice(3, 8)):
        sums.append(loss.sums(logits[..., columns], labels[..., columns], counted[..., columns]))
    scores, classes = np.exp(logits.numpy()), labels[0].numpy()
    distance = ((scores / scores.sum(axis=0) - np.eye(3)[classes].transpose(2, 0, 1)) ** 2).sum(axis=0)
    expected = 2 * (distance * np.array(weights)[classes]).mean()
    assert float(loss.value(sums[0] + sums[1])) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match=r"a loss must be cross-entropy, dice, binary, brier, or a sum .*, got 'bier'"):
        parse_loss("bier")


MARGIN = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Toy:
        value: float | None

        def apply(self, cosine):
            strength = 0.1 if self.value is None else self.value
            return cosine - strength * (1 + cosine) ** 2, 1 - 2 * strength * (1 + cosine)
"""


@pytest.mark.parametrize("value", [None, 0.2])
def test_an_added_margin_gives_the_dense_layers_loss_and_gradients(add: Add, value: float | None) -> None:
    add(MARGINS, "curved", MARGIN)
    head = ShardedMarginHead(37, 8, margin="curved", margin_value=value, storage=torch.float64)
    generator = torch.Generator().manual_seed(2)
    features = torch.randn((9, 8), generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 37, (9,), generator=generator)
    loss = head(features, labels)
    loss.backward()
    theirs = features.detach().clone().requires_grad_()
    weight = head.dense_weight().detach().clone().requires_grad_()
    expected = compute_dense_loss(theirs, labels, weight, head.margin, head.scale)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(features.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    plain = compute_dense_loss(theirs, labels, weight, margin_from("softmax"), head.scale)
    assert float(expected.detach()) > float(plain.detach()) + 0.1


@pytest.mark.parametrize(
    ("formula", "refusal"),
    [
        ("cosine - 0.5, 0.9 + 0 * cosine", r"must give the derivative of its phi, 1 at a cosine of .*, got 0\.9"),
        ("cosine + 0.5, 1 + 0 * cosine", r"finite phi of at most 1, got 1\.5"),
        ("cosine.detach(), 1 + 0 * cosine", "differentiable operations"),
        ("cosine - cosine.mean(), 1 + 0 * cosine", "derivative of its phi"),
    ],
)
def test_a_margin_that_breaks_its_promise_is_refused_before_any_step(outside: Path, formula: str, refusal: str) -> None:
    code = f"""
    class Toy:
        def __init__(self, value):
            pass

        def apply(self, cosine):
            return {formula}
    """
    MARGINS.register("bad")(importlib.import_module(write_module(outside, "toy_bad", code)).Toy)
    with pytest.raises(HeadError, match=refusal):
        ShardedMarginHead(37, 8, margin="bad", storage=torch.float64)


WRITER = """
    from outsize.tiler.base.geometry import Window

    def Toy(export, target):
        raster = export.open_raster()
        bands, height, width = raster.shape
        with target.open("wb") as file:
            for y in range(0, height, 16):
                rows = Window(y=y, x=0, height=min(16, height - y), width=width)
                file.write(raster.read(rows).tobytes())
"""


class Argmax(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().argmax(1, keepdim=True).to(torch.uint8)


def make_output(out: Path) -> np.ndarray[Any, Any]:
    """A finished class map, and its pixels."""
    plan = plan_tiles((3, 41, 53), analyze_network(Argmax(), bands=3))
    description = OutputDescription(kind="class", classes=("a", "b", "c"), colours=((1, 1, 1),) * 3)
    source = {"kind": "file", "paths": ["nowhere"], "options": {}}
    create_output(out, plan=plan, description=description, place=Georeference(), header={"source": source})
    classes = np.random.default_rng(0).integers(0, 3, (41, 53), dtype=np.uint8)
    writable(zarr.open_array(out, path="class", mode="r+"))[:] = classes
    return classes


def test_an_added_writer_exports_files_of_its_suffix(tmp_path: Path, add: Add) -> None:
    add(WRITERS, "raw", WRITER)
    classes = make_output(tmp_path / "o.zarr")
    found = CliRunner().invoke(cli, ["export", str(tmp_path / "o.zarr"), str(tmp_path / "map.RAW")])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "map.RAW").read_bytes() == classes.tobytes()
    refused = CliRunner().invoke(cli, ["export", str(tmp_path / "o.zarr"), str(tmp_path / "map.row")])
    assert isinstance(refused.exception, UsageError)
    assert str(refused.exception) == "export writes .tif (COG) or .png (quicklook), .raw, got map.row"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.RAW", "o.zarr", "outside"]


def test_a_writer_that_leaves_no_file_is_told(tmp_path: Path, outside: Path) -> None:
    write_module(outside, "toy_idle", "def idle(export, target):\n    pass\n")
    WRITERS.register("idle")(importlib.import_module("toy_idle").idle)
    make_output(tmp_path / "o.zarr")
    found = CliRunner().invoke(cli, ["export", str(tmp_path / "o.zarr"), str(tmp_path / "map.idle")])
    assert str(found.exception) == f"export writer idle left no file for {tmp_path / 'map.idle'}"


KIND = """
    import json
    import torch

    class Toy:
        runs_code = ""

        @staticmethod
        def load(file, trust, key):
            said = json.loads(file.data)
            network = torch.nn.Conv2d(said["bands"], len(said["weights"]), 1, bias=False)
            with torch.no_grad():
                network.weight.copy_(torch.tensor(said["weights"])[:, :, None, None])
            return network
"""


def test_a_model_file_of_an_added_kind_is_loaded(tmp_path: Path, add: Add) -> None:
    add(KINDS, "mixer", KIND)
    path = tmp_path / "mix.mixer"
    weights = [[1.0, 2.0, 0.0], [0.5, 0.0, -1.0]]
    path.write_text(json.dumps({"bands": 3, "weights": weights}))
    model = load_model(path)
    assert (model.name, model.bands, model.sha256) == (
        "mix",
        ("band 1", "band 2", "band 3"),
        hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    image = np.random.default_rng(3).random((1, 3, 4, 5), dtype=np.float32)
    with torch.no_grad():
        found = model.network(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(found, np.einsum("cb,nbyx->ncyx", weights, image), rtol=1e-6)
    path.write_text(json.dumps({"bands": 3, "weights": [[float("nan")] * 3]}))
    with pytest.raises(ModelFileError, match=r"mix\.mixer"):
        load_model(path)
    (tmp_path / "mix.other").write_text("{}")
    with pytest.raises(ModelFileError, match="is no model: it must hold"):
        load_model(tmp_path / "mix.other")


def test_a_kind_that_could_run_code_is_not_asked_without_trust(tmp_path: Path, outside: Path) -> None:
    code = KIND.replace('runs_code = ""', 'runs_code = "it holds formulas"').replace("json.loads(file.data)", "1 / 0")
    KINDS.register("formula")(importlib.import_module(write_module(outside, "toy_formula", code)).Toy)
    path = tmp_path / "mix.formula"
    path.write_text("{}")
    with pytest.raises(ModelFileError, match="could run code when it is loaded: it holds formulas; if you trust"):
        load_model(path)
    with pytest.raises(ModelFileError, match="is not the file that was meant"):
        load_model(path, trust=True, sha256="0" * 64)


ENGINE = """
    import pickle
    import cloudpickle
    import numpy as np
    import torch
    from outsize.tiler.base.memory import EngineMemory
    from outsize.tiler.engines.engine import EngineProgram

    class Blocks:
        runs = 0

        def __init__(self, module, both):
            self.module, self.both = module, both

        def run(self, image):
            Blocks.runs += 1
            with torch.inference_mode():
                return self.module(torch.from_numpy(image)[None])[0].numpy()

        def run_with_logits(self, image):
            found = self.run(image)
            return found, found

    class Toy:
        memory = EngineMemory(worker_bytes=100_000_000, factor=2.5, constant_bytes=200_000_000)

        @staticmethod
        def version():
            return "1.5"

        @staticmethod
        def pack(network, threads):
            payload = (cloudpickle.dumps(network.module),)
            return EngineProgram(engine="blocks", payload=payload, has_logits=network.has_logits, threads=threads)

        @staticmethod
        def load(program):
            return Blocks(pickle.loads(program.payload[0]), program.has_logits)
"""


def test_an_added_engine_runs_a_raster_as_torch_does(tmp_path: Path, client: Client, add: Add) -> None:
    module = add(ENGINES, "blocks", ENGINE)
    image = np.random.default_rng(0).normal(100, 60, (3, 91, 83)).astype(np.float32)
    source = write_geotiff(tmp_path / "s.tif", image)
    network = analysed("unet depth 2", torch.float32)
    predict(source, network, tmp_path / "toy.zarr", client=client, engine="blocks", core=32)
    predict(source, network, tmp_path / "torch.zarr", client=client, engine="torch", method="window", core=32)
    found, expected = (open_array(tmp_path / f"{name}.zarr", "logits")[:] for name in ("toy", "torch"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert importlib.import_module(module).Blocks.runs >= 9
    header = read_header(tmp_path / "toy.zarr")
    assert header["plan"]["engine"] == "blocks"
    assert header["fingerprint"]["engine_version"] == "1.5"
    window = Window(y=20, x=30, height=11, width=13)
    rows, columns = window.slices()
    here = predict_window(source, network, window, engine="blocks")
    np.testing.assert_allclose(here, expected[:, rows, columns], rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.system
def test_an_added_engine_is_found_by_other_processes(outside: Path) -> None:
    module = importlib.import_module(write_module(outside, "toy_far", ENGINE))
    ENGINES.register("far")(module.Toy)
    network = analysed("unet depth 2", torch.float32)
    packed = compile_program(network, "far", 1)
    assert (packed.engine, packed.place, packed.version) == ("far", "toy_far:Toy", "1.5")
    code = (
        "import pickle, sys; from outsize.tiler.engines.loading import load_windows; "
        "print(type(load_windows(pickle.load(sys.stdin.buffer))).__name__)"
    )
    told = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(packed), capture_output=True, timeout=60)
    assert told.stdout.decode().strip() == "Blocks", told.stderr.decode()
    with pytest.raises(EngineError, match=r"engine far is 1\.5 here, and 2\.0 where the network was made ready"):
        load_windows(replace(packed, version="2.0"))
    module.Toy.__module__ = "__main__"
    ENGINES.register("mine")(module.Toy)
    with pytest.raises(UsageError, match="engine mine is __main__:Toy, which other processes cannot import"):
        plan_tiles((3, 91, 83), network, engine="mine")


def test_what_an_added_engine_cannot_do_is_refused_by_name(outside: Path) -> None:
    ENGINES.register("small")(importlib.import_module(write_module(outside, "toy_small", ENGINE)).Toy)
    network = analysed("unet depth 2", torch.float32)
    for options, refusal in (
        ({"engine": "smell"}, r"engine must be auto, openvino, torch or small, got 'smell'"),
        ({"engine": "small", "method": "program"}, "small runs networks on windows, and this run is by programs"),
        ({"engine": "small", "device": "cuda"}, "small runs on the CPU, got --device cuda"),
        ({"engine": "small", "compiles": True}, "--compile is for torch, got --engine small"),
        ({"engine": "small", "batch": 4}, "batches are for torch on windows, this run is small by windows"),
        ({"engine": "small", "precision": "int8"}, "engine small computes in float32, got int8"),
    ):
        with pytest.raises((UsageError, EngineError), match=refusal):
            plan_tiles((3, 91, 83), network, **options)  # pyright: ignore[reportArgumentType] - one call for all
    plan = plan_tiles((3, 91, 83), network, engine="small")
    assert (plan.engine, plan.method, plan.device) == ("small", "window", "cpu")


FORMAT = """
    import json
    import pathlib
    import numpy as np
    from outsize.tiler.rasters.formats import FileDescription

    class Toy:
        def __init__(self, path):
            head, _, pixels = pathlib.Path(path).read_bytes().partition(b";")
            self.shape = tuple(json.loads(head)["shape"])
            self.image = np.frombuffer(pixels, "u2").reshape(self.shape)

        def describe(self):
            return FileDescription(
                shape=self.shape, dtype=np.dtype("u2"), block=(16, 32), nodata=(7,), band_names=("a", "b", "c")
            )

        def read(self, window, bands):
            rows, columns = window.slices()
            return self.image[[band - 1 for band in bands], rows, columns].copy()

        def close(self):
            self.image = None
"""


def write_plain(path: Path) -> np.ndarray[Any, Any]:
    """A file of the toy format, and its pixels: some 7, which is nodata where all bands have it."""
    image = np.random.default_rng(5).integers(5, 9, (3, 45, 70), dtype=np.uint16)
    path.write_bytes(json.dumps({"shape": image.shape}).encode() + b";" + image.tobytes())
    return image


def test_a_file_of_an_added_format_is_a_raster_like_others(tmp_path: Path, add: Add) -> None:
    add(FORMATS, "plain", FORMAT)
    image = write_plain(tmp_path / "s.plain")
    raster = open_raster(tmp_path / "s.plain")
    assert (raster.shape, raster.dtype, raster.band_names, raster.nodata) == (image.shape, "u2", ("a", "b", "c"), 7)
    window = Window(y=9, x=20, height=30, width=41)
    rows, columns = window.slices()
    found = raster.read(window, masked=True)
    np.testing.assert_array_equal(found.data, image[:, rows, columns])
    missing = (image[:, rows, columns] == 7).all(axis=0)
    assert missing.any()
    np.testing.assert_array_equal(found.mask, np.broadcast_to(missing, found.shape))
    chosen = open_raster(tmp_path / "s.plain", bands=("c", 1), nodata=(), mask_band=2, mask_values=(5, 6))
    found = pickle.loads(pickle.dumps(chosen)).read(window, masked=True)
    np.testing.assert_array_equal(found.data, image[[2, 0], rows, columns])
    np.testing.assert_array_equal(found.mask[0], np.isin(image[1, rows, columns], (5, 6)))
    blocks = BlockStore(10**7)
    reader = raster.open_reader(blocks)
    for _ in range(2):
        np.testing.assert_array_equal(reader.read(window), image[:, rows, columns])
    reader.close()
    assert 0 < blocks.decoded_bytes <= image.nbytes
    before = raster.identity
    write_plain(tmp_path / "s.plain")
    assert open_raster(tmp_path / "s.plain").identity != before


def test_a_whole_run_reads_an_added_format(tmp_path: Path, client: Client, add: Add) -> None:
    add(FORMATS, "plain", FORMAT)
    image = write_plain(tmp_path / "s.plain")
    predict(
        tmp_path / "s.plain", analyze_network(Argmax(), bands=3, dtype=torch.uint16), tmp_path / "o.zarr", client=client
    )
    expected = np.where((image == 7).all(axis=0), 255, image.argmax(axis=0))
    assert (expected == 255).any()
    np.testing.assert_array_equal(open_array(tmp_path / "o.zarr", "class")[:], expected)


def test_formats_keep_off_gdals_suffixes_and_their_lies_are_told(tmp_path: Path, outside: Path) -> None:
    toy = importlib.import_module(write_module(outside, "toy_format", FORMAT)).Toy
    FORMATS.register("tif")(toy)
    write_geotiff(tmp_path / "s.tif", np.ones((1, 8, 8), np.uint8))
    with pytest.raises(UsageError, match=r"raster format tif is added, and \.tif files are GDAL's or Zarr's"):
        open_raster(tmp_path / "s.tif")
    FORMATS.register("plain")(toy)
    write_plain(tmp_path / "s.plain")
    raster = open_raster(tmp_path / "s.plain")
    for lie in (np.zeros((3, 2, 2), np.uint16), np.zeros((3, 4, 5), np.int16), None):
        toy.read = lambda self, window, bands, lie=lie: lie  # noqa: ARG005 - the protocol's arguments
        with pytest.raises(RasterError, match=r"format plain must read uint16 \(3, 4, 5\) of window .*, got"):
            raster.read(Window(y=0, x=0, height=4, width=5))
    (tmp_path / "s.plain").write_bytes(b"nothing")
    with pytest.raises(RasterError, match=r"s\.plain cannot be opened as plain: Expecting value"):
        open_raster(tmp_path / "s.plain")


class Hollow:
    """Has nothing that any protocol asks for."""

    def __init__(self) -> None:
        self.empty = True


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.noun)
def test_what_lacks_something_is_refused_at_registration(outside: Path, registry: Registry[Any]) -> None:
    assert outside.is_dir()
    with pytest.raises(UsageError, match=rf"^{registry.noun} hollow: .*Hollow must have .*, as Named\w+ says$"):
        registry.register("hollow")(Hollow)
    assert "hollow" not in registry.names()


@pytest.mark.parametrize("registry", [each for each in ALL if each is not FORMATS], ids=lambda registry: registry.noun)
def test_names_are_of_one_form_and_belong_to_one_thing(outside: Path, registry: Registry[Any]) -> None:
    own = registry.names()[0]
    thing = registry.find(own)
    for name in ("Upper", "a b", "", "-x", "a+b"):
        with pytest.raises(UsageError, match="is named by small letters"):
            registry.register(name)
    write_module(outside, "toy_rival", "class Toy: pass")
    rival = importlib.import_module("toy_rival").Toy
    with pytest.raises(UsageError, match=rf"{registry.noun} {own} is outsize\..* already; register toy_rival:Toy by"):
        registry.register(own)(rival)
    assert registry.find(own) is thing


def test_the_command_line_takes_added_names_and_lists_them(outside: Path) -> None:
    ENGINES.register("small")(importlib.import_module(write_module(outside, "toy_small", ENGINE)).Toy)
    MARGINS.register("curved")(importlib.import_module(write_module(outside, "toy_curved", MARGIN)).Toy)
    for words, known in (
        (["plan", "scene.tif", "--engine"], "auto, openvino, torch, small"),
        (["face", "benchmark", "--margin"], "arcface, cosface, softmax, curved"),
        (["face", "train", "out", "--margin"], "arcface, cosface, softmax, curved, or M1,M2,M3"),
    ):
        refused = CliRunner().invoke(cli, [*words, "nosuch"])
        assert refused.exit_code == 2
        assert known in " ".join(refused.output.split())
    planned = CliRunner().invoke(cli, ["--json", "plan", str(small_scene_path()), "--engine", "small"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout.splitlines()[-1])["plan"]["engine"] == "small"


def test_the_walk_through_for_contributors_works(outside: Path) -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "MARGINS.register" in block)
    importlib.import_module(write_module(outside, "toy_walk", code))
    assert float(margin_from("curved").apply(torch.ones(1))[0]) == pytest.approx(0.6)
    told = dict(re.findall(r"\| `(\w+)\.register\(.*?\| `(outsize\.\w+)` \|", text))
    names = {
        "FORMATS": FORMATS,
        "ENGINES": ENGINES,
        "WRITERS": WRITERS,
        "LOSSES": LOSSES,
        "MARGINS": MARGINS,
        "KINDS": KINDS,
    }
    assert told == {name: registry.group for name, registry in names.items()}
    assert set(ALL) == set(names.values())


def test_two_packages_that_claim_a_name_are_both_named(outside: Path) -> None:
    for number in (1, 2):
        write_module(outside, f"toy_{number}", MARGIN)
        write_package(outside, f"toys_{number}", MARGINS.group, {"twice": f"toy_{number}:Toy"})
    with pytest.raises(UsageError, match=r"margin twice is toy_\d:Toy, and toy_\d:Toy by an entry point of outsize"):
        margin_from("twice")
    write_package(outside, "toys_3", ENGINES.group, {"torch": "toy_1:Toy"})
    with pytest.raises(
        UsageError, match=r"engine torch is outsize\.tiler\.engines\.own:Torch, and toy_1:Toy by an entry"
    ):
        ENGINES.find("torch")
    assert margin_from("arcface") == margin_from((1.0, 0.5, 0.0))


def test_what_other_processes_cannot_import_is_refused_by_name(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        MARGIN.replace("class Toy", "class Mine")
        + "\n    from outsize.models.faceid.layer.margin_registry import MARGINS\n"
    )
    write_module(outside, "toy_listed", code + "    MARGINS.register('listed')(Mine)\n")
    with pytest.raises(HeadError, match="margin must be one of arcface, cosface, softmax, got 'listed'"):
        margin_from("listed")
    monkeypatch.setenv(MODULES_VARIABLE, "toy_listed")
    assert MARGINS.place("listed") == ""
    assert float(margin_from("listed").apply(torch.zeros(1))[0]) == pytest.approx(-0.1)
    assert MARGINS.place("listed") == "toy_listed:Mine"
    here = type("Here", (importlib.import_module("toy_listed").Mine,), {"__module__": "__main__"})
    MARGINS.register("here")(here)
    with pytest.raises(UsageError, match="margin here is __main__:Here, which other processes cannot import"):
        MARGINS.place("here")
    monkeypatch.setenv(MODULES_VARIABLE, "toy_missing")
    with pytest.raises(UsageError, match="OUTSIZE_MODULES names toy_missing, which cannot be imported"):
        margin_from("absent")
