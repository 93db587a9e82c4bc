"""Where models come from: factories, exported programs, pickles, descriptions; and what runs without leave: nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from outsize.models import Scaling, SegmentationModel, UNet, as_tile_network
from outsize.models.segmentation.files import sources
from outsize.models.segmentation.files.sources import load_model, save_model
from outsize.models.segmentation.networks import exported, trust
from outsize.models.segmentation.networks.exported import ExportedNetwork, export_network
from outsize.models.segmentation.networks.finite import require_finite_weights
from outsize.models.segmentation.networks.model import default_classes
from outsize.models.segmentation.networks.palette import default_colour
from outsize.models.segmentation.networks.trust import ModelFileError, read_model_file
from outsize.tiler.analysis.network import analyze_network
from outsize.tiler.base.errors import OutputError, UsageError
from safetensors.torch import save_file
from stac_model.schema import MLModelProperties
from torch import nn
from torch.export import Dim

pytestmark = pytest.mark.system

ODD_SIZES = ((1, 1), (7, 5), (33, 47), (64, 62))


class Small(nn.Module):
    """Three bands to five classes; importable by this file's name in a folder of its own only."""

    def __init__(self, width: int = 6, dilation: int = 1) -> None:
        super().__init__()
        self.head = nn.Conv2d(width, 5, 1)  # made first, run last
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x))


SMALL_CODE = textwrap.dedent("""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self, width=6, dilation=1):
            super().__init__()
            self.head = nn.Conv2d(width, 5, 1)
            self.stem = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(width), nn.ReLU()
            )

        def forward(self, x):
            return self.head(self.stem(x))

    def loud(**options):
        open("was-called", "w").close()
        return Small(**options)

    def whole(width=6):
        import outsize
        from outsize.models import Scaling
        return outsize.SegmentationModel(
            name="whole", network=Small(width), bands=("a", "b", "c"), scaling=Scaling.min_max(
                minimum=(0,) * 3, maximum=(255,) * 3), fill=(1, 2, 3),
            classes=tuple(outsize.SegmentationClass(name=n, colour=(1, 2, 3)) for n in "vwxyz"))

    def no_network():
        return 7

    def broken():
        raise OSError("no disk\\nat all")

    class Dictionary(Small):
        def forward(self, x):
            return {"out": super().forward(x)}
    open("was-imported", "w").close()
""")


@pytest.fixture
def network() -> Small:
    small = Small()
    # Statistics other than 0 and 1, so that one lost is seen.
    small.train()(torch.randn(4, 3, 16, 16))
    return small.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of a name that no test used before."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


_modules = iter(range(1000))


def write_module(folder: Path, code: str = SMALL_CODE) -> str:
    name = f"outsize_test_network_{next(_modules)}"
    (folder / f"{name}.py").write_text(code)
    return name


def quietly(function: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def export(network: nn.Module, path: Path, bands: int, **free: Any) -> Path:
    free = free or {"dynamic_shapes": ({2: Dim.AUTO, 3: Dim.AUTO},)}
    quietly(lambda: torch.export.save(torch.export.export(network, (torch.zeros(1, bands, 64, 64),), **free), path))
    return path


def assert_same(found: nn.Module, expected: nn.Module, bands: int = 3) -> None:
    for size in ODD_SIZES:
        image = torch.randn(1, bands, *size)
        with torch.no_grad():
            torch.testing.assert_close(found(image), expected(image))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_valid_mlm(path: Path) -> bool:
    properties = json.loads(path.read_text())["properties"]
    MLModelProperties.model_validate({key: value for key, value in properties.items() if key.startswith("mlm:")})
    return True


# Factories


@pytest.mark.parametrize(
    "nest",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 7},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"model._orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["bare", "state_dict", "model and module.", "model._orig_mod."],
)
def test_a_factory_takes_the_state_dicts_that_training_writes(network: Small, folder: Path, nest: Any) -> None:
    name = write_module(folder)
    torch.save(nest(network.state_dict()), folder / "w.pt")
    model = load_model(f"{name}:Small", weights="w.pt")
    assert_same(model.network, network)
    assert not model.network.training
    assert model.sha256 == digest(folder / "w.pt")
    assert model.bands == ("band 1", "band 2", "band 3")
    assert model.scaling == Scaling.none(3)
    assert model.fill == (0, 0, 0)
    assert [entry.name for entry in model.classes] == [f"class {value}" for value in range(5)]
    assert model.classes == default_classes(5)


def test_a_factory_takes_safetensors_and_hyperparameters(network: Small, folder: Path) -> None:
    del network
    name = write_module(folder)
    wide = Small(width=9).eval()
    save_file(wide.state_dict(), "w.safetensors")
    model = load_model(f"{name}:Small", weights="w.safetensors", hyperparameters={"width": 9}, bands=("r", "g", "b"))
    assert_same(model.network, wide)
    assert model.bands == ("r", "g", "b")
    assert str(folder) not in sys.path
    with pytest.raises(ModelFileError, match=r"head.weight is 5 x 9 x 1 x 1 there and 5 x 6 x 1 x 1 in the network"):
        load_model(f"{name}:Small", weights="w.safetensors")
    save_file({"head.weight": wide.head.weight.detach()}, "part.safetensors")
    with pytest.raises(ModelFileError, match=r"it lacks 7 tensors such as head.bias"):
        load_model(f"{name}:Small", weights="part.safetensors")


def test_a_factory_may_return_a_whole_model(folder: Path) -> None:
    name = write_module(folder)
    small = Small().eval()
    save_file(small.state_dict(), "w.safetensors")
    model = load_model(f"{name}:whole", weights="w.safetensors")
    assert_same(model.network, small)
    assert (model.name, model.fill, model.bands) == ("whole", (1, 2, 3), ("a", "b", "c"))
    save_model(model, "m.json")
    again = load_model("m.json", trust=True)
    assert (again.bands, again.scaling, again.fill, again.classes) == (
        model.bands,
        model.scaling,
        model.fill,
        model.classes,
    )


def test_a_factory_that_is_no_good_is_refused_in_one_line(folder: Path) -> None:
    name = write_module(folder)
    (folder / "text.pt").write_text("hello, hello")
    for source, weights, words in (
        ("outsize_no_such:thing", None, "cannot be imported .ModuleNotFoundError"),
        (f"{name}:nothing", None, "cannot be imported .AttributeError"),
        (f"{name}:no_network", None, "must return a torch.nn.Module or a SegmentationModel, got int"),
        (f"{name}:broken", None, r"broken\(\) failed .OSError: no disk\)"),
        (f"{name}:Dictionary", None, r"must give one tensor .* it gives dict"),
        (f"{name}:Small", "none.pt", "none.pt cannot be read: No such file"),
        (f"{name}:Small", "text.pt", "text.pt is no model"),
    ):
        with pytest.raises(ModelFileError, match=words) as refusal:
            load_model(source, weights=weights)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="weights and hyperparameters go with a factory"):
        load_model(None, weights="w.pt")
    with pytest.raises(UsageError, match="sha256 is a file's, and"):
        load_model(f"{name}:Small", sha256="0" * 64)
    with pytest.raises(ModelFileError, match="fails on images of 2 bands"):
        load_model(f"{name}:Small", bands=("a", "b"))


def test_a_network_without_convolutions_takes_the_bands_it_is_given(folder: Path) -> None:
    name = write_module(folder, "from torch import nn\nclass Net(nn.Identity): pass\n")
    assert len(load_model(f"{name}:Net", bands=4).bands) == 4
    with pytest.raises(ModelFileError, match="runs on no image of as many bands"):
        load_model(f"{name}:Net")


def test_a_network_of_the_current_folder_reaches_workers_that_run_elsewhere(folder: Path, network: Small) -> None:
    name = write_module(folder)
    save_file(network.state_dict(), "w.safetensors")
    model = load_model(f"{name}:Small", weights="w.safetensors")
    image = torch.randn(1, 3, 9, 11)
    (folder / "sent").write_bytes(cloudpickle.dumps((model.network, image)))
    code = "import pickle, sys; n, x = pickle.load(open(sys.argv[1], 'rb')); print(n(x).double().sum().item())"
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code, folder / "sent"],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(network(image).double().sum().item())


# Leave


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bombs(folder: Path, network: Small) -> dict[str, tuple[str, dict[str, Any], Path]]:
    """source, options, the file whose hash is asked for; each creates `boom` or `was-imported` where it is run."""
    boom = folder / "boom"
    torch.save({"model": network, "extra": Bomb(boom)}, folder / "whole.pt")
    torch.save({"state_dict": network.state_dict(), "extra": Bomb(boom)}, folder / "state.pt")
    torch.save([Bomb(boom)], folder / "old.pth", _use_new_zipfile_serialization=False)
    name = write_module(folder)
    model = SegmentationModel(
        name="m",
        network=network,
        architecture=f"{name}:loud",
        bands=("a", "b", "c"),
        scaling=Scaling.none(3),
        fill=(0, 0, 0),
        classes=default_classes(5),
    )
    save_model(model, folder / "factory.json")
    # Saving has built it; what follows must import it anew.
    del sys.modules[name]
    for trace in ("was-imported", "was-called"):
        (folder / trace).unlink()
    item = json.loads((folder / "factory.json").read_text())
    item["properties"]["mlm:architecture"] = "ResNet"
    item["assets"]["weights"] = {"href": "whole.pt", "roles": ["mlm:model"]}
    (folder / "pickled.json").write_text(json.dumps(item))
    item["properties"]["mlm:architecture"] = "outsize.models.segmentation.UNet"
    item["assets"]["weights"] = {"href": "state.pt", "roles": ["mlm:model"]}
    (folder / "unet.json").write_text(json.dumps(item))
    return {
        "a pickled network": ("whole.pt", {}, folder / "whole.pt"),
        "an old pickle": ("old.pth", {}, folder / "old.pth"),
        "pickled weights": ("os:getcwd", {"weights": "state.pt"}, folder / "state.pt"),
        "a description of a factory": ("factory.json", {}, folder / "factory.json"),
        "a description of a pickle": ("pickled.json", {}, folder / "whole.pt"),
        "a UNet with pickled weights": ("unet.json", {}, folder / "state.pt"),
    }


def test_nothing_runs_without_leave(network: Small, folder: Path) -> None:
    for what, (source, options, file) in bombs(folder, network).items():
        traces = [folder / name for name in ("boom", "was-imported", "was-called")]
        for leave in ({}, {"sha256": "0" * 64}):
            with pytest.raises(ModelFileError) as refusal:
                load_model(source, **options, **leave)
            message = str(refusal.value)
            assert "\n" not in message, what
            assert str(file.name) in message, what
            assert digest(file) in message, what
            assert ("--trust-model" in message) == (not leave), what
            assert not any(trace.exists() for trace in traces), what
        # With leave it does run: the proof that there was something to refuse.
        for leave in ({"trust": True}, {"sha256": digest(file).upper()}):
            with suppress(ModelFileError):
                load_model(source, **options, **leave)
            run = [trace for trace in traces if trace.exists()]
            assert run, what
            for trace in run:
                trace.rmdir() if trace.is_dir() else trace.unlink()
            sys.modules.pop(source.partition(":")[0], None)
            for module in [name for name in sys.modules if name.startswith("outsize_test_network")]:
                del sys.modules[module]


def test_a_hash_is_checked_of_models_that_need_no_leave_too(network: Small, folder: Path) -> None:
    good = load_model().sha256
    assert load_model(sha256=good).sha256 == good
    with pytest.raises(ModelFileError, match=f"its sha256 is {good}, given {'0' * 64}"):
        load_model(sha256="0" * 64)
    name = write_module(folder)
    save_file(network.state_dict(), "w.safetensors")
    load_model(f"{name}:Small", weights="w.safetensors", sha256=digest(folder / "w.safetensors"))
    with pytest.raises(ModelFileError, match="is not the file that was meant"):
        load_model(f"{name}:Small", weights="w.safetensors", sha256="0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits, got 'abc'"):
        load_model(sha256="abc")


# Whole networks


def whole_networks(folder: Path, network: Small) -> dict[str, Path]:
    name = write_module(folder)
    save_file(network.state_dict(), folder / "w.safetensors")
    torch.save(load_model(f"{name}:Small", weights="w.safetensors").network, folder / "pickled.pt")
    (folder / "w.safetensors").unlink()
    example = torch.zeros(1, 3, 32, 32)
    quietly(lambda: torch.jit.trace(network, example).save(str(folder / "traced.pt")))
    quietly(lambda: torch.jit.script(network).save(str(folder / "scripted.pt")))
    quietly(lambda: torch.jit.freeze(torch.jit.trace(network, example)).save(str(folder / "frozen.pt")))
    return {
        "torch.export": export(network, folder / "exported.pt2", 3),
        "pickle": folder / "pickled.pt",
        "traced": folder / "traced.pt",
        "scripted": folder / "scripted.pt",
        "frozen": folder / "frozen.pt",
    }


def test_whole_networks_load_pack_and_equal_the_module(network: Small, folder: Path) -> None:
    for what, path in whole_networks(folder, network).items():
        with pytest.raises(ModelFileError, match="could run code when it is loaded"):
            load_model(path)
        model = load_model(path, sha256=digest(path))
        assert_same(model.network, network)
        assert len(model.bands) == 3
        assert len(model.classes) == 5
        if what == "pickle":
            with pytest.raises(ModelFileError, match=r'must say what builds its network .*architecture="package'):
                save_model(model, folder / "no.json")
            model = replace(model, network=export_network(model.network, 3, "pickled"))
        saved = save_model(model, folder / f"packed-{path.stem}.json")
        assert is_valid_mlm(folder / f"packed-{path.stem}.json")
        with pytest.raises(ModelFileError, match=r"packed-.*\.pt2 could run code"):
            load_model(folder / f"packed-{path.stem}.json")
        again = load_model(folder / f"packed-{path.stem}.json", sha256=saved.sha256)
        assert_same(again.network, network)
    assert not (folder / "no.json").exists()


def test_an_exported_u_net_is_tiled_though_its_guards_read_odd_sizes_only(folder: Path) -> None:
    unet = UNet(4, 3, (4, 6, 8), norm="frozen").eval()
    model = load_model(export(unet, folder / "unet.pt2", 4), trust=True)
    assert isinstance(model.network, ExportedNetwork)
    assert_same(model.network, unet, bands=4)
    found, expected = (analyze_network(each, 4, torch.float32) for each in (model.network, unet))
    assert (found.halo, found.stride, found.size_multiple) == (expected.halo, expected.stride, expected.size_multiple)
    assert_same(model.network.eval().train(), unet, bands=4)


def test_an_exported_network_reaches_workers(network: Small, folder: Path) -> None:
    model = load_model(export(network, folder / "n.pt2", 3), trust=True)
    assert_same(quietly(lambda: cloudpickle.loads(cloudpickle.dumps(model.network))), network)


def test_exports_and_scripts_that_cannot_be_tiled_are_refused_with_the_remedy(network: Small, folder: Path) -> None:
    export(network, folder / "fixed.pt2", 3, dynamic_shapes=None)
    with pytest.raises(ModelFileError, match=r"takes only images of 64 x 64; export it .*Dim.AUTO"):
        load_model("fixed.pt2", trust=True)

    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.shape[2] < 1000 else x * 2

    export(Branch(), folder / "branch.pt2", 3)
    with pytest.raises(ModelFileError, match=r"exported for a height of 2 to 999 only; remove .* export it"):
        load_model("branch.pt2", trust=True)
    limited = {2: Dim("height", max=4096), 3: Dim.AUTO}
    export(network, folder / "limited.pt2", 3, dynamic_shapes=(limited,))
    with pytest.raises(ModelFileError, match=r"for a height of \d to 4096 only"):
        load_model("limited.pt2", trust=True)

    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    image = torch.zeros(1, 3, 64, 64)
    quietly(lambda: torch.export.save(torch.export.export(Two(), (image, image)), "two.pt2"))
    with pytest.raises(ModelFileError, match=r"must take one image .* it takes 2 inputs"):
        load_model("two.pt2", trust=True)

    class Loop(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.sum() > 1):
                x = x / 2
            return x

    quietly(lambda: torch.jit.script(Loop()).save(str(folder / "loop.pt")))
    with pytest.raises(ModelFileError, match=r"is TorchScript, which torch.export cannot convert .*; export it"):
        load_model("loop.pt", trust=True)
    torch.save(network.state_dict(), "w.pt")
    save_file(network.state_dict(), "w.safetensors")
    for weights in ("w.pt", "w.safetensors"):
        with pytest.raises(ModelFileError, match=f"holds weights only; .*--weights {weights}"):
            load_model(weights, trust=True)
    torch.save([1, 2], "list.pt")
    with pytest.raises(ModelFileError, match="holds no network, but list"):
        load_model("list.pt")
    whole = (folder / "w.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match=r"cut.pt is no model"):
        load_model("cut.pt", trust=True)


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path) -> None:
    build = f"{write_module(folder)}:Small"
    good, bad = Small().eval(), Small().eval()
    with torch.no_grad():
        bad.stem[0].weight[1, 0, 2, 2] = float("nan")
    plain = nn.Sequential(nn.Conv2d(3, 2, 3))
    with torch.no_grad():
        plain[0].bias[1] = -float("inf")
    torch.save(plain, "pickled.pt")
    export(plain, folder / "exported.pt2", 3)
    example = torch.zeros(1, 3, 32, 32)
    quietly(lambda: torch.jit.trace(plain, example).save("traced.pt"))
    for path in ("pickled.pt", "exported.pt2", "traced.pt"):
        with pytest.raises(ModelFileError, match=rf"of {path} must be finite, .*0.bias holds NaN or infinity"):
            load_model(path, trust=True)
    torch.save(bad.state_dict(), "w.pt")
    with pytest.raises(ModelFileError, match=r"of w.pt must be finite, stem.0.weight holds NaN or infinity"):
        load_model(build, weights="w.pt")
    model = described(folder, good)
    save_model(model, "m.json")
    state = {name: tensor.clone() for name, tensor in bad.state_dict().items()}
    known = load_model("m.json", trust=True).sha256
    save_file(state, "m.safetensors")
    text = Path("m.json").read_text().replace(known, digest(Path("m.safetensors")))
    Path("m.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"of m.safetensors must be finite, stem.0.weight holds"):
        load_model("m.json", trust=True)
    with pytest.raises(ModelFileError, match=r"must be finite, stem.0.weight holds"):
        as_tile_network(replace(model, network=bad))


def test_masks_of_infinity_are_no_weights() -> None:
    network = nn.Conv2d(1, 2, 1)
    network.register_buffer("mask", torch.full((3, 3), float("-inf")))
    require_finite_weights(network, "it")
    network.mask[0, 0] = float("nan")
    with pytest.raises(ModelFileError, match="mask holds NaN"):
        require_finite_weights(network, "it")
    norm = nn.BatchNorm2d(2)
    norm.running_var[1] = float("inf")
    with pytest.raises(ModelFileError, match="of it must be finite, running_var holds"):
        require_finite_weights(norm, "it")


def test_networks_in_half_precision_are_refused_with_what_helps(folder: Path) -> None:
    del folder
    half = Small().eval().half()
    image = torch.zeros(1, 3, 32, 32).half()
    torch.save(half, "half.pt")
    quietly(lambda: torch.jit.trace(half, image).save("traced.pt"))
    for path in ("half.pt", "traced.pt"):
        with pytest.raises(ModelFileError, match=r"float16.* call \.float\(\) on"):
            load_model(path, trust=True)


def test_a_script_whose_converted_form_differs_is_refused(
    network: Small, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = whole_networks(folder, network)["traced"]
    other = export_network(Small(dilation=2).eval(), 3, "other")
    monkeypatch.setattr(exported, "_convert", lambda *_: other)
    with pytest.raises(ModelFileError, match=r"traced.pt is TorchScript and differs from its own torch.export form at"):
        load_model(path, trust=True)


def test_contents_are_told_by_what_stands_in_a_file(network: Small, folder: Path) -> None:
    found = {what: read_model_file(path).content for what, path in whole_networks(folder, network).items()}
    assert found == {
        "torch.export": "torch.export",
        "pickle": "pickle",
        "traced": "TorchScript",
        "scripted": "TorchScript",
        "frozen": "TorchScript",
    }
    # Another suffix hides nothing.
    (folder / "exported.pt2").rename(folder / "harmless.pt")
    with pytest.raises(ModelFileError, match=r"torch.export.load unpickles"):
        load_model("harmless.pt")


# Descriptions


def described(folder: Path, network: Small, **changes: Any) -> SegmentationModel:
    name = write_module(folder)
    model = SegmentationModel(
        name="small",
        network=network,
        architecture=f"{name}:Small",
        bands=("r", "g", "b"),
        scaling=Scaling.offset_scale(offset=(3, 0, 0), scale=(1, 10_000, 1)),
        fill=(0, 1, 2),
        classes=default_classes(5),
    )
    return replace(model, **changes)


def test_any_network_survives_its_files(network: Small, folder: Path) -> None:
    model = described(folder, network)
    saved = save_model(model, "m.json", card={"accuracy": 0.5})
    assert saved.sha256 == digest(folder / "m.safetensors")
    assert (folder / "m.safetensors").stat().st_mode == (folder / "m.json").stat().st_mode
    again = load_model("m.json", trust=True)
    assert again == replace(saved, network=again.network)
    assert_same(again.network, network)
    assert is_valid_mlm(folder / "m.json")
    item = json.loads((folder / "m.json").read_text())
    assert item["assets"]["weights"]["file:checksum"] == f"1220{saved.sha256}"
    assert item["properties"]["mlm:architecture"] == model.architecture
    assert "mlm:hyperparameters" not in item["properties"]
    wide = described(folder, Small(width=8, dilation=2).eval(), hyperparameters={"width": 8, "dilation": 2})
    save_model(wide, "wide.json")
    assert is_valid_mlm(folder / "wide.json")
    assert_same(load_model("wide.json", trust=True).network, wide.network)


def test_an_architecture_that_builds_another_network_is_not_saved(network: Small, folder: Path) -> None:
    for changes, words in (
        ({"architecture": ""}, "must say what builds its network .Small.: architecture="),
        ({"architecture": "outsize_no_such:thing"}, "cannot be imported"),
        ({"hyperparameters": {"width": 9}}, r"head.weight is 5 x 6 x 1 x 1 there and 5 x 9 x 1 x 1 in the network"),
        # The same weights fit, the result differs.
        ({"hyperparameters": {"dilation": 2}}, "builds another network from these weights"),
        ({"hyperparameters": {"width": {1, 2}}}, "must be plain JSON values"),
    ):
        with pytest.raises(ModelFileError, match=words):
            save_model(described(folder, network, **changes), folder / "out" / "m.json")
    assert not (folder / "out").exists()


def test_a_failed_write_leaves_the_earlier_model_and_nothing_else(
    network: Small, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_model(described(folder, network), folder / "out" / "m.json")

    def fail(path: Path) -> str:
        assert path.stat().st_size > 0
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "hash_file", fail)
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        save_model(described(folder, Small()), folder / "out" / "m.json")
    monkeypatch.undo()
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["m.json", "m.safetensors"]
    os.chdir(folder)
    assert load_model(folder / "out" / "m.json", trust=True).sha256 == first.sha256
    (folder / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        save_model(described(folder, network), folder / "file" / "m.json")


def test_weights_and_description_cannot_be_mixed_up(network: Small, folder: Path) -> None:
    save_model(described(folder, network), "a.json")
    save_model(described(folder, Small()), "b.json")
    (folder / "b.safetensors").replace(folder / "a.safetensors")
    with pytest.raises(ModelFileError, match=r"does not hold the weights that a.json describes: its sha256 is"):
        load_model("a.json", trust=True)
    (folder / "a.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"a.safetensors is missing, where a.json says"):
        load_model("a.json", trust=True)


def foreign_item(weights: str) -> dict[str, Any]:
    """A description as other programs write it: text bands, role of the asset, no colours, one scaling for all."""
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "foreign",
        "geometry": None,
        "properties": {
            "mlm:name": "foreign",
            "mlm:architecture": "U-Net",
            "mlm:tasks": ["semantic-segmentation"],
            "mlm:framework": "pytorch",
            "mlm:input": [
                {
                    "name": "image",
                    "bands": ["B04", {"name": "B03"}, "B02"],
                    "input": {
                        "shape": [-1, 3, 512, 512],
                        "dim_order": ["batch", "channel", "height", "width"],
                        "data_type": "float32",
                    },
                    "value_scaling": [{"type": "scale", "value": 10000}],
                    "resize_type": None,
                    "pre_processing_function": None,
                }
            ],
            "mlm:output": [
                {
                    "name": "mask",
                    "tasks": ["semantic-segmentation"],
                    "result": {"shape": [-1, 5, 512, 512], "dim_order": ["b", "c", "h", "w"], "data_type": "float32"},
                    "classification:classes": [
                        {"value": 1, "name": "water", "color_hint": "0000FF"},
                        {"value": 0, "description": "nothing"},
                        *({"value": value, "name": f"c{value}"} for value in (2, 3, 4)),
                    ],
                }
            ],
        },
        "links": [],
        "assets": {
            "thumbnail": {"href": "t.png"},
            "model": {"href": weights, "roles": ["mlm:model"], "mlm:artifact_type": "torch.export.save"},
        },
    }


def test_other_peoples_descriptions_load(network: Small, folder: Path) -> None:
    export(network, folder / "n.pt2", 3)
    item = foreign_item("n.pt2")
    (folder / "f.json").write_text(json.dumps(item))
    assert is_valid_mlm(folder / "f.json")
    model = load_model("f.json", trust=True)
    assert_same(model.network, network)
    assert model.bands == ("B04", "B03", "B02")
    assert model.scaling == Scaling(kind="scale", subtract=(0,) * 3, divide=(10_000,) * 3)
    assert [entry.name for entry in model.classes] == ["nothing", "water", "c2", "c3", "c4"]
    assert model.classes[1].colour == (0, 0, 255)
    assert model.classes[2].colour == default_colour(2)
    del item["properties"]["mlm:output"][0]["classification:classes"]
    del item["properties"]["mlm:input"][0]["bands"]
    (folder / "f.json").write_text(json.dumps(item))
    bare = load_model("f.json", trust=True)
    assert bare.bands == ("band 1", "band 2", "band 3")
    assert bare.classes == default_classes(5)


def test_descriptions_that_are_not_understood_are_refused_in_one_line(network: Small, folder: Path) -> None:
    export(network, folder / "n.pt2", 3)
    save_file(network.state_dict(), "w.safetensors")

    def changed(**changes: Any) -> dict[str, Any]:
        item = foreign_item("n.pt2")
        properties = item["properties"]
        for key, value in changes.items():
            place = {"source": properties["mlm:input"][0], "result": properties["mlm:output"][0]}.get(
                key.partition("__")[0], item["assets"]["model"]
            )
            place[key.partition("__")[2]] = value
        return item

    two_inputs = changed()
    two_inputs["properties"]["mlm:input"] *= 2
    no_name = changed()
    del no_name["properties"]["mlm:name"]
    no_role = changed(asset__roles=[])
    computed = ["B04", "B03", {"name": "NDVI", "format": "rio-calc", "expression": "(B8 - B4) / (B8 + B4)"}]
    for item, words in (
        (two_inputs, "mlm:input must hold one entry, got 2"),
        (no_name, "it lacks 'mlm:name'"),
        (no_role, 'no asset has the role "mlm:model"'),
        (changed(asset__href="https://example.com/n.pt2"), "nothing is downloaded; put them beside"),
        (changed(asset__href="w.safetensors"), "architecture must be .* got U-Net; pack the weights"),
        (changed(source__bands=computed), "band NDVI is computed from others"),
        (changed(source__pre_processing_function={"format": "python", "expression": "a:b"}), "pre_processing_function"),
        (changed(source__resize_type="crop"), "resize_type crop is not supported"),
        (changed(source__value_scaling=[{"type": "clip", "minimum": 0, "maximum": 1}]), '"clip" is not supported'),
        (changed(source__value_scaling=[{"type": "z-score", "mean": 0, "stddev": 0}]), "numbers > 0, got 0"),
        (changed(source__value_scaling=[{"type": "z-score", "mean": 0}]), "it lacks 'stddev'"),
        (changed(source__input={"shape": [1, 3, 7, 512, 512]}), "must have 4 dimensions"),
        (changed(source__bands=["a", "b"]), "fails on images of 2 bands"),
        (changed(**{"result__classification:classes": [{"value": 7, "name": "x"}]}), "class values must be .*7"),
        (
            changed(**{"result__classification:classes": [{"value": 0, "name": "x"}]}),
            "names 1 classes, its network gives 5",
        ),
        (
            changed(**{"result__classification:classes": [{"value": 0, "name": "x", "color_hint": "blue"}]}),
            "is not a model description of MLM: ValueError",
        ),
    ):
        (folder / "f.json").write_text(json.dumps(item))
        with pytest.raises(ModelFileError, match=words) as refusal:
            load_model("f.json", trust=True)
        assert "\n" not in str(refusal.value)
        assert "f.json" in str(refusal.value)
    (folder / "list.json").write_text("[]")
    with pytest.raises(ModelFileError, match=r"list.json is not a model description of MLM"):
        load_model("list.json")


# Hostile files


def test_files_without_a_tensor_are_refused_at_once(network: Small, folder: Path) -> None:
    """Once, the prefixes of no names at all were looked for without end."""
    name = write_module(folder)
    save_file({}, "empty.safetensors")
    torch.save(nn.Identity(), "identity.pt")
    for weights, words in (
        ("empty.safetensors", "holds no tensors; give the weights of a network"),
        ("identity.pt", "does not hold the weights that .* describes: it lacks"),
    ):
        with pytest.raises(ModelFileError, match=words):
            load_model(f"{name}:Small", weights=weights, trust=True)
    save_model(described(folder, network), "m.json")
    item = json.loads(Path("m.json").read_text())
    del item["assets"]["weights"]["file:checksum"]
    Path("m.json").write_text(json.dumps(item))
    Path("empty.safetensors").replace("m.safetensors")
    with pytest.raises(ModelFileError, match=r"m.safetensors holds no tensors"):
        load_model("m.json", trust=True)


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "a byte": b"{",
    "a length alone": (100).to_bytes(8, "little"),
    "a header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "a header of 2^63": (2**63).to_bytes(8, "little") + b"{}",
    "a header that is cut": (3).to_bytes(8, "little") + b'{"a',
    "a header that is a list": (2).to_bytes(8, "little") + b"[]",
    "a deep header": (200_000).to_bytes(8, "little") + b'{"a":' * 40_000,
    "no text": (9).to_bytes(8, "little") + b'{"\xff\xff":0}',
    "a shape of 2^62": (62).to_bytes(8, "little")
    + b'{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'[:62],
    "a pickle that is cut": b"\x80\x02}",
    "a pickle of no torch": b"\x80\x02K\x01.",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_weights_are_refused_in_one_line(folder: Path, what: str) -> None:
    name = write_module(folder)
    for suffix in (".safetensors", ".pt"):
        path = folder / f"w{suffix}"
        path.write_bytes(DAMAGED[what])
        with pytest.raises(ModelFileError) as refusal:
            load_model(f"{name}:Small", weights=path)
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_pipe_in_place_of_a_model_is_refused_at_once(network: Small, folder: Path) -> None:
    name = write_module(folder)
    os.mkfifo("w.pt")
    os.mkfifo("d.json")
    save_model(described(folder, network), "m.json")
    Path("m.safetensors").unlink()
    os.mkfifo("m.safetensors")
    for source, weights in ((f"{name}:Small", "w.pt"), ("w.pt", None), ("d.json", None), ("m.json", None)):
        with pytest.raises(ModelFileError, match=r"no file, but a pipe|no model at|is missing"):
            load_model(source, weights=weights, trust=True)


def test_what_is_hashed_is_what_is_loaded(network: Small, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes to the file in the middle of it."""
    model = save_model(replace(described(folder, network), network=UNet(3, 5, (4, 6)).eval()), "m.json")
    expected = {name: value.clone() for name, value in load_model("m.json").network.state_dict().items()}
    other = UNet(3, 5, (4, 6))
    save_file(other.state_dict(), "other.safetensors")
    assert Path("other.safetensors").stat().st_size == Path("m.safetensors").stat().st_size

    def read_model_file_once(path: Path) -> Any:
        file = trust.read_model_file(path)
        path.write_bytes(Path("other.safetensors").read_bytes())
        return file

    monkeypatch.setattr(sources, "read_model_file", read_model_file_once)
    again = load_model("m.json", sha256=model.sha256)
    assert again.sha256 == model.sha256
    assert all(torch.equal(value, expected[name]) for name, value in again.network.state_dict().items())


def test_a_pickle_that_is_exchanged_after_it_was_hashed_is_not_run(
    network: Small, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = whole_networks(folder, network)["pickle"]
    meant = digest(path)
    truth = trust.Trust.require_hash

    def exchange(self: trust.Trust, file: Path, found: str) -> None:
        truth(self, file, found)
        file.write_bytes(b"\x80\x02cos\nmkdir\nX\x07\x00\x00\x00was-run\x85R.")

    monkeypatch.setattr(trust.Trust, "require_hash", exchange)
    assert_same(load_model(path, sha256=meant).network, network)
    assert not (folder / "was-run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": [4, 10**6]}, r"is 6 x 4 x 3 x 3 there and 1000000 x 4 x 3 x 3 in the network"),
        ({"widths": [10**5, 10**5]}, r"in the network"),
        ({"widths": [10**18, 6]}, "no UNet has these hyperparameters"),
        ({"widths": [1] * 1_000_000}, "describes 1000000 levels, m.safetensors holds 14 tensors"),
        ({"widths": "many"}, "no UNet has these hyperparameters"),
        ({"widths": [4.5, 6]}, "no UNet has these hyperparameters"),
        ({"widths": [[4], 6]}, "no UNet has these hyperparameters"),
        ({"widths": None}, "no UNet has these hyperparameters"),
        ({"bands": 10**12}, r"no UNet has these hyperparameters|in the network"),
    ],
)
def test_a_description_of_a_giant_takes_no_memory(folder: Path, changes: dict[str, Any], words: str) -> None:
    save_model(replace(described(folder, Small()), network=UNet(3, 5, (4, 6))), "m.json")
    item = json.loads(Path("m.json").read_text())
    item["properties"]["mlm:hyperparameters"].update(changes)
    Path("m.json").write_text(json.dumps(item))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError, match=words) as refusal:
        load_model("m.json")
    assert "\n" not in str(refusal.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000


def test_a_description_of_too_many_bands_or_classes_is_refused(folder: Path) -> None:
    save_model(replace(described(folder, Small()), network=UNet(3, 5, (4, 6))), "m.json")
    item = json.loads(Path("m.json").read_text())
    kept = json.dumps(item)
    item["properties"]["mlm:input"][0]["bands"] = []
    item["properties"]["mlm:input"][0]["input"]["shape"] = [1, 10**12, -1, -1]
    Path("m.json").write_text(json.dumps(item))
    with pytest.raises(ModelFileError, match="a network has at most 65535 bands, got 1000000000000"):
        load_model("m.json")
    item = json.loads(kept)
    item["properties"]["mlm:output"][0]["classification:classes"] = []
    item["properties"]["mlm:output"][0]["result"]["shape"] = [1, 10**12, -1, -1]
    Path("m.json").write_text(json.dumps(item))
    with pytest.raises(ModelFileError, match="a network has at most 65535 classes"):
        load_model("m.json")
