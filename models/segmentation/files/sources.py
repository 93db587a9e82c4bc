"""Where a model may come from, and how one is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ....tiler.base.errors import OutputError, UsageError
from ....tiler.base.text import first_line
from ....tiler.system.files import flush_file, sync_folder, use_default_mode
from ..networks.exported import ExportedNetwork
from ..networks.finite import require_finite_weights
from ..networks.meaning import Activation, Statement, Task
from ..networks.model import SegmentationModel, default_bands, fit_classes, name_classes
from ..networks.probe import find_meaning, guess_bands, run_small, same_result
from ..networks.scaling import Scaling
from ..networks.trust import ModelFile, ModelFileError, Trust, hash_file, read_model_file
from ..networks.unet import UNet
from .factory import build_network, is_factory
from .kinds import KINDS
from .mlm import Artifact, Description, describe, read_description, spare_path
from .state import States, fit_state, read_states, require_fit
from .whole import WholeNetwork, load_network

UNET_ARCHITECTURE = "outsize.models.segmentation.UNet"
EXPORTED_ARCHITECTURE = "torch.export.ExportedProgram"
_DESCRIPTION_SUFFIXES = (".json", ".safetensors")


def default_model_path() -> Path:
    """The shipped model's description."""
    return Path(str(resources.files("outsize.models.segmentation") / "weights" / "sample-unet.json"))


def description_path(source: str | Path) -> Path:
    """NAME.json of NAME, NAME.json or NAME.safetensors; a name may hold dots of its own, such as unet-1.5."""
    path = Path(source)
    name = path.name
    for suffix in _DESCRIPTION_SUFFIXES:
        name = name.removesuffix(suffix)
    return path.with_name(f"{name}.json")


def find_description(source: str | Path | None) -> Path | None:
    """The description that a source means: of NAME and NAME.safetensors, NAME.json; None: the shipped one.

    Returns None for a factory, and for a file without a description beside it.

    Raises:
        ModelFileError: a source that is neither a factory nor there.
    """
    if source is None:
        return default_model_path()
    if is_factory(str(source)):
        return None
    path = description_path(source)
    if Path(source).suffix != ".json" and Path(source).is_file():
        return path if Path(source).suffix in _DESCRIPTION_SUFFIXES and path.is_file() else None
    if not path.is_file():
        raise ModelFileError(f"no model at {source}; give the .json that save_model or `outsize model pack` wrote")
    return path


def load_model(
    source: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    bands: int | Sequence[str] | None = None,
    trust: bool = False,
    sha256: str | None = None,
    weights_key: str | None = None,
    task: Task | None = None,
    activation: Activation | None = None,
    threshold: float | None = None,
) -> SegmentationModel:
    """The model of a description, of a factory, or of a file that holds a whole network; None: the shipped one.

    A description (.json, STAC MLM) of this package's UNet and its safetensors weights are data: reading them runs no
    code. A factory, "package.module:name", runs because you name it. Everything else that could run code is read only
    with `trust` or `sha256`: descriptions that name a factory or a network that was pickled or exported, .pt2 of
    torch.export, whole networks of torch.save, TorchScript, and files of added kinds that say so. A network that comes
    without a description gets its band count from its first convolution or from `bands`, no scaling, fill 0 and
    numbered classes. What its values mean is told by its number of channels and its last operation, unless the
    description or the last three arguments say it.

    Args:
        weights: state dict for a factory's network: .safetensors, or what torch.save wrote.
        hyperparameters: keyword arguments for a factory.
        bands: names of the bands, or how many, for a network that comes without a description.
        trust: files that could run code may be read.
        sha256: the one file that may be read, by its hash; of a model that cannot run code, its weights.
        weights_key: which of several state dicts or networks in a checkpoint: the keys that lead there and the prefix
            of its names, joined by dots.
        task: "multiclass", "binary", "multilabel" or "regression".
        activation: what the network has applied to its result: "none", "sigmoid", "softmax" or "argmax".
        threshold: of a binary task: yes where the probability is greater.

    Raises:
        ModelFileError: a file that is missing, damaged, of another kind, or that could run code without leave to;
            weights that are not finite.
        UsageError: options that do not go together.
    """
    allowed = Trust(everything=trust, sha256=sha256)
    stated = Statement(task=task, activation=activation, threshold=threshold)
    if source is not None and is_factory(str(source)):
        given = None if weights is None else Weights(path=Path(weights), key=weights_key)
        if weights is None and weights_key is not None:
            raise UsageError("a weights key goes with weights; give their file too")
        return _load_factory(str(source), given, hyperparameters or {}, bands, allowed, stated)
    if weights is not None or hyperparameters:
        raise UsageError(
            f"weights and hyperparameters go with a factory, package.module:name, got {source or 'the shipped model'}; "
            "a model file says both by itself"
        )
    description = find_description(source)
    if description is not None:
        if weights_key is not None:
            raise UsageError(
                f"a weights key is for a checkpoint, and {description} says by itself which weights it has"
            )
        return _load_described(description, allowed, stated)
    return _load_whole(read_model_file(Path(str(source))), allowed, weights_key, bands, stated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A file of weights, and where in it they are."""

    path: Path
    key: str | None


def _load_factory(
    factory: str,
    weights: Weights | None,
    hyperparameters: Mapping[str, Any],
    bands: int | Sequence[str] | None,
    trust: Trust,
    stated: Statement,
) -> SegmentationModel:
    if weights is None and trust.sha256 is not None:
        raise UsageError(f"sha256 is a file's, and {factory} is none; give the file of its weights too")
    digest, states = "", None
    if weights is not None:
        # Before the factory's code runs: what is refused anyway is refused at once.
        file = read_model_file(weights.path)
        states, digest = read_states(file, trust), file.sha256
        trust.require_hash(file.path, digest)
    built = build_network(factory, hyperparameters)
    network = built.network if isinstance(built, SegmentationModel) else built
    remark = ""
    if weights is not None and states is not None:
        remark = fit_state(network, states, weights.path, factory, key=weights.key)
    require_finite_weights(network, factory if weights is None else str(weights.path))
    network.eval()
    known = {
        "sha256": digest,
        "architecture": factory,
        "hyperparameters": hyperparameters,
        "remarks": _remarks(remark),
    }
    if isinstance(built, SegmentationModel):
        return _settle(replace(built, **known), stated)
    return _complete(network, factory, bands, stated, **known)


def _remarks(text: str) -> tuple[str, ...]:
    """Of what `fit_state` said."""
    return (f"weights   {text}",) if text else ()


def _settle(model: SegmentationModel, stated: Statement) -> SegmentationModel:
    """The model, with what its values mean.

    Args:
        stated: goes before what the model says.
    """
    own = Statement(task=model.task, activation=model.activation, threshold=model.threshold)
    meaning = find_meaning(model.network, len(model.bands), model.name, stated.over(own))
    return replace(
        model,
        classes=fit_classes(model.classes, meaning, model.name),
        task=meaning.task,
        activation=meaning.activation,
        threshold=meaning.threshold if meaning.task == "binary" else None,
        meaning=meaning,
    )


def _load_whole(
    file: ModelFile, trust: Trust, key: str | None, bands: int | Sequence[str] | None, stated: Statement
) -> SegmentationModel:
    """The model of a file that holds a whole network, by the kind of its suffix."""
    suffix = file.path.suffix.lower().removeprefix(".")
    kind = KINDS.find(suffix) if suffix in KINDS.names() else WholeNetwork
    if kind.runs_code:
        trust.require_file(file, kind.runs_code)
    trust.require_hash(file.path, file.sha256)
    found = kind.load(file, trust, key)
    if not isinstance(found, nn.Module | SegmentationModel):
        raise ModelFileError(f"{file}: the kind of model file {suffix} must give a network, got {type(found).__name__}")
    network = (found.network if isinstance(found, SegmentationModel) else found).eval()
    require_finite_weights(network, str(file))
    if isinstance(found, SegmentationModel):
        return _settle(replace(found, sha256=file.sha256), stated)
    return _complete(network, file.path.stem, bands, stated, sha256=file.sha256)


def _load_described(path: Path, trust: Trust, stated: Statement) -> SegmentationModel:
    said = read_description(path)
    if not said.artifact.is_file():
        raise ModelFileError(f"{said.artifact} is missing, where {path} says that the weights are")
    file = read_model_file(said.artifact)
    if said.artifact_sha256 not in (None, file.sha256):
        raise ModelFileError(
            f"{file} does not hold the weights that {path.name} describes: its sha256 is {file.sha256}, "
            f"not {said.artifact_sha256}"
        )
    network, remark = _build_described(said, path, trust, file)
    require_finite_weights(network.eval(), str(file))
    is_built = said.architecture == UNET_ARCHITECTURE or is_factory(said.architecture)
    meaning = find_meaning(network, len(said.bands), path.name, stated.over(said.stated))
    return SegmentationModel(
        name=said.name,
        network=network,
        bands=said.bands,
        scaling=said.scaling,
        fill=said.fill,
        classes=fit_classes(said.classes or name_classes(meaning), meaning, str(path)),
        task=meaning.task,
        activation=meaning.activation,
        threshold=meaning.threshold if meaning.task == "binary" else None,
        meaning=meaning,
        sha256=file.sha256,
        architecture=said.architecture if is_built else "",
        hyperparameters=said.hyperparameters if is_built else {},
        remarks=_remarks(remark),
    )


def _build_described(said: Description, path: Path, trust: Trust, file: ModelFile) -> tuple[nn.Module, str]:
    """The network that a description means, with its weights, and what `fit_state` said."""
    if said.architecture == UNET_ARCHITECTURE:
        trust.require_hash(file.path, file.sha256)
        states = read_states(file, trust)
        options = {"bands": len(said.bands), "classes": said.channels, **said.hyperparameters}
        network: nn.Module = _build_unet(options, path, file, states)
    elif is_factory(said.architecture):
        reason = f"it names the factory {said.architecture}, which would be imported and called"
        trust.require(path, said.sha256, reason)
        states = read_states(file, trust)
        built = build_network(said.architecture, said.hyperparameters)
        network = built.network if isinstance(built, SegmentationModel) else built
    elif file.content == "safetensors":
        raise ModelFileError(
            f"{path}: architecture must be {UNET_ARCHITECTURE} or package.module:factory, "
            f"got {said.architecture!s:.80}; pack the weights with what builds the network: "
            f"outsize model pack package.module:factory OUT.json --weights {said.artifact}"
        )
    else:
        return load_network(file, trust), ""
    return network, fit_state(network, states, file.path, path.name, exact=True)


def _build_unet(options: Mapping[str, Any], path: Path, file: ModelFile, states: States) -> UNet:
    """The U-Net of these hyperparameters, its memory not yet filled: it is taken once it is known to be no more than
    what its weights take."""
    widths = options.get("widths")
    tensors = max(map(len, states.values()))
    if isinstance(widths, Sequence) and len(widths) > tensors:
        raise ModelFileError(f"{path} describes {len(widths)} levels, {file} holds {tensors} tensors")
    try:
        with torch.device("meta"):
            network = UNet(**options)
    except (UsageError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ModelFileError(f"{path}: no UNet has these hyperparameters: {first_line(error)}") from error
    require_fit(network, states, file.path, path.name, exact=True)
    return network.to_empty(device="cpu")


def _complete(
    network: nn.Module, name: str, bands: int | Sequence[str] | None, stated: Statement, **known: Any
) -> SegmentationModel:
    """A model of a network that says nothing of its bands, scaling, fill and classes."""
    if isinstance(bands, str):
        raise UsageError(f"bands must be a number or a list of names, got {bands!r}")
    named = None if bands is None or isinstance(bands, int) else tuple(bands)
    count = len(named) if named else guess_bands(network)
    if count is None and isinstance(bands, int):
        count = bands
    if count is None:
        raise ModelFileError(
            f"the network of {name} runs on no image of as many bands as one of its convolutions takes; "
            "name its bands: outsize model pack with --band NAME for each (from Python: bands=)"
        )
    meaning = find_meaning(network, count, name, stated)
    return SegmentationModel(
        name=name,
        network=network,
        bands=named or default_bands(count),
        scaling=Scaling.none(count),
        fill=(0.0,) * count,
        classes=name_classes(meaning),
        task=meaning.task,
        activation=meaning.activation,
        threshold=meaning.threshold if meaning.task == "binary" else None,
        meaning=meaning,
        **known,
    )


def _how_built(model: SegmentationModel) -> tuple[str, dict[str, Any]]:
    """(architecture, hyperparameters) that build the model's network again, tried before anything is written."""
    network = model.network
    if type(network) is UNet:
        return UNET_ARCHITECTURE, {"widths": list(network.widths), "norm": network.norm}
    if not is_factory(model.architecture):
        raise ModelFileError(
            f"model {model.name} must say what builds its network ({type(network).__name__}): "
            f'architecture="package.module:factory", got {model.architecture!r}'
        )
    try:
        hyperparameters = json.loads(json.dumps(dict(model.hyperparameters), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"hyperparameters must be plain JSON values: {error}") from error
    built = build_network(model.architecture, hyperparameters)
    again = built.network if isinstance(built, SegmentationModel) else built
    fit_state(again, {"": network.state_dict()}, Path(f"the network of {model.name}"), model.architecture, exact=True)
    expected, found = (run_small(each, len(model.bands)) for each in (copy.deepcopy(network).eval(), again.eval()))
    if isinstance(expected, Tensor) and not (isinstance(found, Tensor) and same_result(expected, found)):
        raise ModelFileError(
            f"{model.architecture} builds another network from these weights than that of {model.name}; "
            "put all that it was built with into hyperparameters"
        )
    return model.architecture, hyperparameters


def save_model(model: SegmentationModel, path: str | Path, card: dict[str, Any] | None = None) -> SegmentationModel:
    """Write PATH.json and PATH.safetensors (a suffix of `path` is dropped); returns the model with its hash.

    A network of an exported program is written as PATH.pt2. Any other but a UNet must say its `architecture`, which is
    built once to see that it takes these weights. The description knows the hash of the other file, so that the two
    cannot be mixed up. A failure leaves the earlier model and nothing half-written; a kill or a power cut at any moment
    leaves the earlier model or this one.

    Args:
        card: what was measured about the model, stored under `outsize:card`.

    Raises:
        ModelFileError: a network that its architecture does not build.
        OutputError: a place that cannot be written to.
    """
    item_path = description_path(path)
    network = model.network
    if isinstance(network, ExportedNetwork):
        architecture, hyperparameters = EXPORTED_ARCHITECTURE, {}
        target = item_path.with_suffix(".pt2")
        kind, media_type = "torch.export.save", "application/octet-stream; framework=pytorch"
    else:
        architecture, hyperparameters = _how_built(model)
        target = item_path.with_suffix(".safetensors")
        kind, media_type = "safetensors.torch.save_file", "application/vnd.safetensors"
    model = _settle(model, Statement())
    fresh, item = (path.with_name(f".{path.stem}.new{path.suffix}") for path in (target, item_path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(network, ExportedNetwork):
            network.save(fresh)
        else:
            # Copies: safetensors takes no two tensors of the same memory.
            save_file({key: value.detach().clone().contiguous() for key, value in network.state_dict().items()}, fresh)
        use_default_mode(fresh)
        digest = hash_file(fresh)
        description = describe(
            model,
            architecture=architecture,
            hyperparameters=hyperparameters,
            artifact=Artifact(name=target.name, kind=kind, media_type=media_type, sha256=digest),
            card=card,
        )
        item.write_text(json.dumps(description, indent=1) + "\n")
        flush_file(fresh)
        flush_file(item)
        # The second of these makes the model another: until then the earlier weights have their name, from then on
        # the new ones are found under this one.
        spare = spare_path(target, digest)
        for made, name in ((fresh, spare), (item, item_path), (spare, target)):
            made.replace(name)
            sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        for unfinished in (fresh, item):
            # Where there is no such folder, there is nothing to take away either.
            with suppress(OSError):
                unfinished.unlink()
        raise OutputError(f"{target} cannot be written: {first_line(error)}") from error
    return replace(model, sha256=digest)
