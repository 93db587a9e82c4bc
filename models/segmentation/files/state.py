"""Weights: state dicts from files, fitted to a network."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ....tiler.base.dtypes import dtype_name
from ....tiler.base.text import first_line
from ..networks.trust import ModelFile, ModelFileError, Trust
from .factory import importing_from_here

PICKLE_REASON = "it holds pickled Python objects"

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""What torch.compile, FSDP and checkpointing put into names, wherever the module lies that they wrap."""
_UNUSED = ".num_batches_tracked"
"""Of a batch norm: a count that only training without momentum looks at, and that old files lack."""
_DEPTH = 3
"""Mappings in mappings in which weights are looked for."""
_SHOWN = 5

States = Mapping[str, Mapping[str, Tensor]]
"""State dicts by the keys that lead to them in a file, joined by dots; "" for the file itself."""


def read_pickle(file: ModelFile, trust: Trust) -> Any:
    """What torch.save wrote: tensors and plain containers always, other objects only with leave.

    Raises:
        ModelFileError: a damaged file, or one that could run code.
    """
    try:
        return torch.load(file.open(), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        pass
    except Exception as error:  # what a damaged pickle makes torch stumble over
        raise ModelFileError(f"{file} is damaged: {first_line(error)}") from error
    trust.require_file(file, PICKLE_REASON)
    with importing_from_here(), warnings.catch_warnings():
        # torch warns of sources that have changed since; the weights decide.
        warnings.simplefilter("ignore")
        try:
            return torch.load(file.open(), map_location="cpu", weights_only=False)
        except Exception as error:
            raise ModelFileError(
                f"{file} cannot be unpickled ({type(error).__name__}: {first_line(error)}); its classes must be "
                "installed, or stand in the current folder"
            ) from error


def _find(value: object, depth: int = 0) -> Iterator[tuple[str, nn.Module | Mapping[str, Any]]]:
    """Networks, and mappings that hold tensors, by the keys that lead to them."""
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, Mapping):
        if any(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items()):
            yield "", value
        for key, entry in value.items() if depth < _DEPTH else ():
            if isinstance(key, str):
                yield from ((f"{key}.{rest}".rstrip("."), found) for rest, found in _find(entry, depth + 1))


def find_network(value: object, path: Path, key: str | None = None) -> nn.Module | None:
    """A network that was saved whole, by itself or in a checkpoint; None where there is none.

    Args:
        key: of the one that is meant, where a checkpoint holds several.

    Raises:
        ModelFileError: several, and it is not said which; or none of that key.
    """
    found = {place: entry for place, entry in _find(value) if isinstance(entry, nn.Module)}
    # Losses are modules too.
    found = {place: each for place, each in found.items() if any(True for _ in each.parameters())} or found
    if key is not None and found:
        found = {place: each for place, each in found.items() if place == key} or _refuse_key(path, key, list(found))
    if len({id(each) for each in found.values()}) > 1:
        raise ModelFileError(
            f"{path} holds several networks, under {_few(list(found))}; choose with --weights-key {next(iter(found))}"
        )
    return next(iter(found.values()), None)


def find_states(value: object) -> States:
    """The state dicts in what a file held: by itself, in a checkpoint, or of networks that were saved whole."""
    return {
        place: entry.state_dict()
        if isinstance(entry, nn.Module)
        else {name: tensor for name, tensor in entry.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
        for place, entry in _find(value)
    }


def read_states(file: ModelFile, trust: Trust) -> States:
    """The state dicts of a .safetensors file or of what torch.save wrote; one at least, of one tensor at least.

    Raises:
        ModelFileError: a file without one, a damaged one, or one that could run code.
    """
    if file.content == "safetensors":
        try:
            state = load_safetensors(file.data)
        except Exception as error:  # of its reader in Rust, and of torch for kinds of numbers that it lacks
            raise ModelFileError(f"{file} is damaged: {first_line(error)}") from error
        if not state:
            raise ModelFileError(f"{file} holds no tensors; give the weights of a network")
        return {"": state}
    if file.content != "pickle":
        raise ModelFileError(f"{file} holds a whole network ({file.content}), not weights; give it as the model itself")
    states = find_states(read_pickle(file, trust))
    if not states:
        raise ModelFileError(
            f"{file} holds no state dict; write one: torch.save(network.state_dict(), {file.path.name!r})"
        )
    return states


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Names of a state dict that begin alike."""

    key: str
    """That leads to the state dict in the file."""
    prefix: str
    """Before every name, with the dot at its end."""
    names: Mapping[str, Tensor] = field(repr=False)
    """Tensors under the prefix, by the rest of their names."""
    others: tuple[str, ...]
    """Names of the state dict that do not begin so."""

    @property
    def label(self) -> str:
        return ".".join(part for part in (self.key, self.prefix.rstrip(".")) if part) or "the file itself"

    def is_called(self, key: str) -> bool:
        return key.rstrip(".") in (self.key, self.label, self.prefix.rstrip("."))


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _list_places(key: str, state: Mapping[str, Tensor], wanted: set[str]) -> Iterator[_Place]:
    """Where in a state dict names of the network are found, whatever stands before them."""
    plain = {_plain(name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        plain = dict(state)
    # Of names of which many others are the end, such as "weight", the longest tells most.
    sought = sorted(wanted, key=len)[-1:] + sorted(wanted)[:1]
    prefixes = {name.removesuffix(end) for end in sought for name in plain if name == end or name.endswith(f".{end}")}
    for prefix in sorted(prefixes or {""}):
        names = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
        others = tuple(name for name in plain if not name.startswith(prefix))
        yield _Place(key=key, prefix=prefix, names=names, others=others)


def require_fit(
    network: nn.Module, states: States, path: Path, what: str, *, key: str | None = None, exact: bool = False
) -> _Place:
    """The one place of a file under which all names of a network are found, each with its shape.

    Of a network on torch's meta device nothing is allocated.

    Args:
        path: where the states come from.
        what: what the network comes from, for messages.
        key: of the place that is meant, where there are several.
        exact: the file must hold nothing else.

    Raises:
        ModelFileError: no such place or several, or one that holds more of the network's own parts than it has.
    """
    own = _names_of(network)
    wanted = {name for name, (_, value) in own.items() if isinstance(value, Tensor) and not name.endswith(_UNUSED)}
    places = [place for at, state in states.items() for place in _list_places(at, state, wanted)]
    if key is not None:
        places = [place for place in places if place.is_called(key)] or _refuse_key(
            path, key, [place.label for place in places]
        )
    if not wanted:
        raise _misfit(path, what, ["the network has no weights"])
    whole = [place for place in places if wanted <= set(place.names)]
    fitting = [place for place in whole if not _find_wrong_shapes(own, place)]
    if not fitting:
        best = max(whole or places, key=lambda place: len(wanted & set(place.names)))
        raise _misfit(path, what, _list_complaints(own, wanted, best))
    chosen = fitting[0]
    if any(not _same_weights(chosen, other, wanted) for other in fitting[1:]):
        labels = [place.label for place in fitting]
        raise ModelFileError(
            f"{path} holds all weights of {what} {len(fitting)} times, under {_few(labels)}, and they differ; choose "
            f"with --weights-key {labels[0]}"
        )
    other_kinds = _list_other_kinds(own, chosen)
    if other_kinds:
        raise _misfit(path, what, other_kinds)
    rest = [name for name in chosen.names if name not in own]
    alien = rest if exact else [name for name in rest if _belongs(name, wanted)]
    if alien or (exact and chosen.others):
        raise _misfit(path, what, [_count("the network lacks", alien or chosen.others)])
    return chosen


def fit_state(
    network: nn.Module, states: States, path: Path, what: str, *, key: str | None = None, exact: bool = False
) -> str:
    """Load weights into a network: those that `require_fit` finds. Returns a line on what was left over or lost digits;
    empty: nothing did."""
    chosen, own = require_fit(network, states, path, what, key=key, exact=exact), _names_of(network)
    try:
        network.load_state_dict({name: chosen.names.get(bare, value) for bare, (name, value) in own.items()})
    except Exception as error:
        raise _misfit(path, what, [first_line(error)]) from error
    rest = [name for name in chosen.names if name not in own]
    left = [*(f"{chosen.prefix}{name}" for name in rest), *chosen.others]
    place = f"the names of {chosen.label} in {path.name}" if chosen.prefix or chosen.key else path.name
    remarks = [f"{place} are the network's; left over: {_few(left)}"] if left else []
    rounded = [
        (chosen.names[bare].dtype, value.dtype) for bare, (_, value) in own.items() if _is_rounded(chosen, bare, value)
    ]
    if rounded:
        (theirs, ours), count = rounded[0], f"{len(rounded)} tensor{'s' * (len(rounded) > 1)}"
        remarks.append(f"{count} of {path.name} rounded, {dtype_name(theirs)} to the network's {dtype_name(ours)}")
    return "; ".join(remarks)


def _is_rounded(place: _Place, name: str, value: object) -> bool:
    """Whether the network's tensor of that name holds fewer digits than the file's."""
    theirs = place.names.get(name)
    if theirs is None or not isinstance(value, Tensor) or name.endswith(_UNUSED):
        return False
    return torch.promote_types(theirs.dtype, value.dtype) != value.dtype


def _kind(dtype: torch.dtype) -> str:
    """Numbers of one kind are copied as what they mean; those of 8 bits mean nothing without scales."""
    if dtype == torch.bool:
        return "truth values"
    if dtype.is_complex:
        return "complex numbers"
    if dtype.is_floating_point:
        return "numbers" if dtype.itemsize > 1 else "numbers of 8 bits"
    return "quantised numbers" if dtype_name(dtype).startswith("q") else "whole numbers"


def _list_other_kinds(own: Mapping[str, tuple[str, Any]], place: _Place) -> list[str]:
    """Tensors whose numbers are of another kind than the network's: int8 for float32."""
    wrong: list[str] = []
    for name, (_, value) in own.items():
        theirs = place.names.get(name)
        if theirs is None or not isinstance(value, Tensor) or name.endswith(_UNUSED):
            continue
        if _kind(theirs.dtype) != _kind(value.dtype):
            wrong.append(
                f"{name} holds {_kind(theirs.dtype)} ({dtype_name(theirs.dtype)}) there and {_kind(value.dtype)} "
                f"({dtype_name(value.dtype)}) in the network"
            )
    return wrong[:_SHOWN] + ([f"and {len(wrong) - _SHOWN} more of other kinds"] if len(wrong) > _SHOWN else [])


def _names_of(network: nn.Module) -> dict[str, tuple[str, Any]]:
    """(name, tensor) by the names without wrappers."""
    return {_plain(name): (name, value) for name, value in network.state_dict().items()}


def _refuse_key(path: Path, key: str, labels: Sequence[str]) -> NoReturn:
    raise ModelFileError(f"{path} holds no weights under {key!r}, but under {_few([*dict.fromkeys(labels)])}")


def _misfit(path: Path, what: str, complaints: Sequence[str]) -> ModelFileError:
    return ModelFileError(f"{path} does not hold the weights that {what} describes: {'; '.join(complaints)}")


def _belongs(name: str, wanted: set[str]) -> bool:
    """Whether a tensor is of a part that the network has too, which then has fewer layers than what was saved; parts
    that it has not at all, such as a loss, are another matter."""
    part = name.partition(".")[0]
    parts = {other.partition(".")[0] for other in wanted}
    return part in parts or (part.isdigit() and any(other.isdigit() for other in parts))


def _same_weights(one: _Place, other: _Place, wanted: set[str]) -> bool:
    return all(torch.equal(one.names[name], other.names[name]) for name in wanted)


def _find_wrong_shapes(own: Mapping[str, tuple[str, Any]], place: _Place) -> list[str]:
    return [
        name
        for name, (_, value) in own.items()
        if name in place.names and isinstance(value, Tensor) and value.shape != place.names[name].shape
    ]


def _list_complaints(own: Mapping[str, tuple[str, Any]], wanted: set[str], place: _Place) -> list[str]:
    lacking, foreign = wanted - set(place.names), set(place.names) - set(own)
    complaints = [
        _count(verb, names) for verb, names in (("it lacks", lacking), ("the network lacks", foreign)) if names
    ]
    wrong = _find_wrong_shapes(own, place)
    complaints += [
        f"{name} is {_shape(place.names[name])} there and {_shape(own[name][1])} in the network"
        for name in wrong[:_SHOWN]
    ]
    return complaints + ([f"and {len(wrong) - _SHOWN} more of other shapes"] if len(wrong) > _SHOWN else [])


def _count(verb: str, names: Collection[str]) -> str:
    return f"{verb} {len(names)} tensor{'s' * (len(names) > 1)} such as {min(names)}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a number"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
