"""Trainable networks: traced once, their parameters read anew at every step, refused where training is not exact."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..analysis.axis_geometry import AxisGeometry, ImageAxis, compute_geometry
from ..analysis.graph import WithLogits
from ..analysis.network import Network, analyze_network
from ..analysis.program import Program, list_order, name_placeholders
from ..base.errors import UntileableError, UsageError
from ..base.geometry import Interval, Window
from ..base.text import first_line

_TRIED = (41, 29)
"""Height and width of the image on which gradients are compared, at least."""
_TOLERANCE = 1e-2
"""Of a parameter's largest gradient. float32 differs by 1e-5 and less; another rule of differentiation by all of it."""
_IMAGE = "the image"
_NOISE = 1e-4
"""Of the largest gradient of all: below it is rounding, as for a bias that a norm takes out again."""
_KEPT = 8


class TrainableNetwork:
    """A network whose parameters are trained: its traced graph, and its live tensors.

    What is trained is the floating result: the logits, for a module that has them.

    Args:
        network: analysed once; its graph stays, whatever its weights become.
        module: whose parameters are trained, where that is not the network's own (but has the same names).

    Raises:
        UntileableError: training of this module is random, looks at the whole image, changes the module's state in
            forward, or differentiates otherwise than its operations do.
    """

    def __init__(self, network: Network, module: nn.Module | None = None) -> None:
        if not isinstance(network, Network):
            raise UsageError("training needs a traced network, and this one's halo is only stated")
        self.network = network
        self.module = network.module if module is None else module
        self.output = network.graph.output_nodes[-1]
        dtype = self.output.meta["val"].dtype
        if not dtype.is_floating_point:
            raise UsageError(
                f"the network returns {str(dtype).removeprefix('torch.')} and shows no logits; train one that returns "
                "them: as_training_network(model), or the module before argmax"
            )
        self._geometries: OrderedDict[tuple[tuple[int, int], int, Interval], AxisGeometry] = OrderedDict()
        self._axes: OrderedDict[tuple[int, int], tuple[ImageAxis, ImageAxis]] = OrderedDict()

    @cached_property
    def order(self) -> list[Node]:
        """The nodes of a program, in the order of its cuts."""
        return list_order(self.network, (self.output,))

    @cached_property
    def names(self) -> dict[str, str]:
        """Of the tensors that the result depends on: name in the trace -> name in the module."""
        prefix = "module." if self.network.has_logits else ""
        placeholders = name_placeholders(self.network)
        traced = [placeholders[node] for node in self.order if node in placeholders]
        return {name: name.removeprefix(prefix) for name in traced}

    def tensors(self) -> dict[str, Tensor]:
        """The live parameters and buffers, by their names in the trace.

        Tensors that the module holds otherwise stay those of the trace.

        Raises:
            UsageError: the module has lost one.
        """
        live: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        live |= dict(self.module.named_buffers(remove_duplicate=False))
        program = self.network.graph.program
        found: dict[str, Tensor] = {}
        for traced, name in self.names.items():
            if name in live:
                found[traced] = live[name]
            elif traced in program.state_dict:
                raise UsageError(f"the module has no {name} any more; analyse it again")
            else:
                found[traced] = cast("Tensor", program.constants[traced])
        return found

    def program(
        self,
        shape_yx: tuple[int, int],
        core: Window,
        tensors: Mapping[str, Tensor],
        cuts: tuple[int, ...] = (),
    ) -> Program:
        """The program of a core of the result for an image of that shape, with these tensors."""
        rows, columns = (self._geometry(shape_yx, axis, part) for axis, part in enumerate((core.rows, core.columns)))
        return Program(self.network, rows, columns, tensors=tensors, outputs=(self.output,), cuts=cuts)

    def _geometry(self, shape_yx: tuple[int, int], axis: int, core: Interval) -> AxisGeometry:
        """Kept from step to step: a row of tiles has one along height."""
        key = (shape_yx, axis, core)
        if key not in self._geometries:
            if shape_yx not in self._axes:
                self._axes[shape_yx] = self.network.on_image(shape_yx)
                _keep(self._axes, 64)
            self._geometries[key] = compute_geometry(self._axes[shape_yx][axis], core)
            _keep(self._geometries, 4096)
        self._geometries.move_to_end(key)
        return self._geometries[key]


def detach_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, without the caller's graph, hooks and device; one that has two names stays one."""
    once: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in once:
            once[id(tensor)] = tensor.detach().cpu().requires_grad_(tensor.requires_grad)
    return {name: once[id(tensor)] for name, tensor in tensors.items()}


def _keep(entries: OrderedDict, most: int) -> None:
    if len(entries) > most:
        entries.popitem(last=False)


def refuse_training_state(module: nn.Module) -> None:
    """Refuse modules that are random, or look at the whole image, in the mode in which they are.

    Raises:
        UntileableError: names the module and the remedy.
    """
    for name, part in module.named_modules():
        if not part.training:
            continue
        place = f"module '{name}' ({type(part).__name__})"
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            raise UntileableError(
                f"{place} takes whole-image statistics in training mode; freeze it by calling its eval() before each "
                "step (weight and bias still learn), or use FrozenNorm"
            )
        if (isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0) or isinstance(part, nn.RReLU):
            raise UntileableError(f"{place} is random in training mode; call its eval() before each step, or remove it")


_TRAINABLE: OrderedDict[tuple[object, ...], TrainableNetwork] = OrderedDict()


def prepare_training(
    network: Network | nn.Module, bands: int, dtype: torch.dtype, *, image_learns: bool = False
) -> TrainableNetwork:
    """The trainable network of a module, traced at the first call; the last eight are kept.

    Before it is used for the first time in a mode (train or eval, of each of its parts) and with those parameters that
    learn, its gradients on a small image are compared with ordinary autograd's: that finds custom backward rules, hooks
    and blocks without gradients, which the graph does not show. A hook that is set later is not found.

    Args:
        image_learns: the image's own gradient is wanted too.

    Raises:
        UntileableError: it cannot be tiled, or not be trained exactly.
    """
    module = network.module if isinstance(network, Network) else network
    if not isinstance(module, nn.Module):
        raise UsageError(f"training needs a module or an analysed network, got {type(network).__name__}")
    refuse_training_state(module)
    modes = tuple((id(part), part.training) for part in module.modules())
    learns = tuple(parameter.requires_grad for parameter in module.parameters())
    key = (id(module), id(network), bands, dtype, modes, learns, image_learns)
    if key not in _TRAINABLE:
        with _unchanged_buffers(module):
            found = TrainableNetwork(
                network if isinstance(network, Network) else _analyse(module, bands, dtype), module
            )
            require_same_gradients(found, image_learns=image_learns)
        _TRAINABLE[key] = found
        _keep(_TRAINABLE, _KEPT)
    _TRAINABLE.move_to_end(key)
    return _TRAINABLE[key]


def _analyse(module: nn.Module, bands: int, dtype: torch.dtype) -> Network:
    """Traced on the CPU, wherever its parameters are."""
    if all(tensor.is_cpu for tensor in module.parameters()):
        return analyze_network(module, bands, dtype)
    return analyze_network(copy.deepcopy(module).cpu(), bands, dtype)


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """What tracing and trying it out may write into a module's state is taken back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                # Writing what is there already would still make graphs that hold the buffer stale.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def require_same_gradients(trainable: TrainableNetwork, *, image_learns: bool = False) -> None:
    """Compare result and gradients of the graph with those of the module on a small image, by ordinary autograd.

    Raises:
        UntileableError: they differ, or the module cannot be differentiated.
    """
    network, module = trainable.network, trainable.module
    shape = network.padded_shape((max(_TRIED[0], network.smallest[0]), max(_TRIED[1], network.smallest[1])))
    # Leaves of their own, so that hooks on the parameters stay silent.
    leaves = {id(t): t.detach().requires_grad_(t.requires_grad) for t in trainable.tensors().values()}
    tensors = {name: leaves[id(tensor)] for name, tensor in trainable.tensors().items()}
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, network.bands, *shape), generator=generator, dtype=torch.float64)
    image = (image * (1 if network.dtype.is_floating_point else 100)).to(device, network.dtype)
    image.requires_grad_(image_learns)
    traced = WithLogits(module) if network.has_logits else module
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            results = torch.func.functional_call(traced, tensors, (image.clone(),))
        except Exception as error:
            raise UntileableError(f"torch itself cannot train this module: {first_line(error)}") from error
        whole: Tensor = results[-1] if network.has_logits else results
        height, width = network.output_shape(shape)
        whole = whole[..., :height, :width]
        direction = torch.rand(whole.shape, generator=generator, dtype=torch.float64).to(whole)
        program = trainable.program(shape, Window.whole((height, width)), tensors)
        rows, columns = program.window.slices()
        (tiled,) = program(image[..., rows, columns])
        wanted = {name: leaf for name, leaf in tensors.items() if leaf.requires_grad}
        if image_learns:
            wanted[_IMAGE] = image
        ordinary, ours = (_gradients(result, wanted, direction) for result in (whole, tiled))
    if not torch.allclose(whole, tiled, rtol=_TOLERANCE, atol=_TOLERANCE * float(whole.detach().abs().max())):
        raise UntileableError(
            "the module computes another result than when it was analysed, in train() or eval() mode or since it was "
            "changed; analyse it again"
        )
    noise = _NOISE * max((float(gradient.abs().max()) for gradient in ordinary), default=0.0)
    for name, expected, found in zip(wanted, ordinary, ours, strict=True):
        if float((expected - found).abs().max()) > _TOLERANCE * float(expected.abs().max()) + noise:
            raise UntileableError(
                f"the gradient of {trainable.names.get(name, name)} is another than that of the operations that compute"
                " the result; remove custom backward rules, hooks and no_grad blocks (freeze parameters by "
                "requires_grad_(False))"
            )


def _gradients(result: Tensor, wanted: dict[str, Tensor], direction: Tensor) -> list[Tensor]:
    """Zeros where the result does not depend on a parameter."""
    if not (wanted and result.requires_grad):
        return [torch.zeros_like(parameter) for parameter in wanted.values()]
    found = torch.autograd.grad(result, list(wanted.values()), direction, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted.values(), found, strict=True)]
