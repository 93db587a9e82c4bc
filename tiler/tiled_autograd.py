"""Tiled autograd: a network's output, or its loss, over a whole image as one node of the caller's autograd graph.

The parameters are explicit inputs of the node and their gradients are what it returns, so that hooks, DDP, gradient
scaling and accumulation see what they see in ordinary training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LabelError, UsageError
from .gradient import (
    GradientSum,
    Precision,
    Tiles,
    compute_loss_sums,
    compute_outputs,
    gradient_of_tiles,
    pull_back,
)
from .loss import Loss
from .machine import map_large_blocks
from .network import Network
from .trainable import TrainableNetwork, detach_tensors, prepare_training
from .training_cluster import StepData, TrainingCluster
from .training_plan import TrainPlan
from .window_source import Pixels, TensorSource, WindowSource, open_source


def tile_checkpoint(module: nn.Module | Network, plan: TrainPlan) -> TiledModule:
    """The module with tiles inside: the same output and gradients, without the whole image's activations.

    Guarantee: output, parameter gradients and input gradient equal those of the module on the whole image by ordinary
    autograd, up to floating-point rounding, for every plan. Forward streams the tiles; backward computes each again.
    The output is held whole: low-resolution features under an ordinary head, say.

    Args:
        module: maps (1, bands, height, width) to floats; or its analysis.
        plan: the tiles of an image of that shape.

    Raises:
        UntileableError: at the first call, for a module that cannot be tiled or trained exactly.
    """
    return TiledModule(module, plan)


def tile_loss(
    module: nn.Module | Network,
    plan: TrainPlan,
    loss: Loss,
    raster: Pixels,
    labels: Pixels,
    *,
    fill: tuple[float, ...] | None = None,
    cluster: TrainingCluster | None = None,
) -> Tensor:
    """The loss of the module on a whole image: a scalar whose backward() gives the whole image's gradients.

    Guarantee: value and gradients equal those of ordinary autograd on the whole image, up to floating-point rounding,
    for every plan: sums over tiles are divided by counts of the whole image, tile losses are never averaged. Neither
    output nor activations are held; rasters on disk are read window by window.

    A separable loss takes one forward and one backward pass a tile, both when it is called; others take their sums
    first, and each tile once more in backward().

    Args:
        module: maps (1, bands, height, width) in the raster's dtype to logits; or its analysis. Traced at the first
            call, never again while it stays the same module in the same modes.
        plan: the tiles of an image of that shape; any gives the same gradients.
        loss: see `Loss`; `outsize.CrossEntropy` and others.
        raster: (bands, height, width): an open raster, an array or a tensor, which may require gradients.
        labels: (height, width) or (bands, height, width), on the grid of the module's output.
        fill: raw value of each band that stands in for nodata pixels; None: 0. Nodata pixels of either do not count.

        cluster: workers of a Dask client that compute the tiles, with the same bits for any number of them; None: this
            process does. Image and labels must be rasters that workers can open, or small enough to be sent to them.

    Returns:
        A scalar in float32, or float64 for a float64 network.

    Raises:
        UntileableError: a module that cannot be tiled or trained exactly.
        LabelError: labels on another grid, labels that are no class, or no pixel that counts.
        RasterError: a window cannot be read.
    """
    step, image, tensors = _begin(module, plan, raster, fill, cluster)
    if cluster is not None and image is not None and image.requires_grad:
        raise UsageError(
            "the image's own gradient is not computed on a cluster; detach() the image, or leave cluster out"
        )
    with _opened(labels) as source:
        _require_labels(source.shape[1:], step)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *([image] if image is not None else []))):
        value = _TiledLoss.apply(step, loss, labels, image, *tensors)
        assert isinstance(value, Tensor)
        return value
    return _value(loss, step.sum_loss(loss, labels, image, tensors), step)[0]


class TiledModule(nn.Module):
    """`tile_checkpoint` as a module, whose parameters are the module's own: for DDP and torch.nn.Sequential.

    Shapes: (batch, bands, height, width), or one raster or array without the batch -> (batch, channels, h, w).
    """

    def __init__(self, module: nn.Module | Network, plan: TrainPlan, *, fill: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.module = module.module if isinstance(module, Network) else module
        self.plan, self.fill = plan, fill
        self._given = (module,)

    def forward(self, raster: Pixels) -> Tensor:
        if isinstance(raster, Tensor) and raster.ndim == 4:
            return torch.cat([self._one(image) for image in raster])
        return self._one(raster)

    def _one(self, raster: Pixels) -> Tensor:
        step, image, tensors = _begin(self._given[0], self.plan, raster, self.fill)
        output = (
            _TiledOutput.apply(step, image, *tensors) if torch.is_grad_enabled() else _assemble(step, image, tensors)
        )
        assert isinstance(output, Tensor)
        return output[None]


class TiledLoss(nn.Module):
    """`tile_loss` as a module: what DistributedDataParallel needs, whose hooks begin in its forward."""

    def __init__(
        self,
        module: nn.Module | Network,
        plan: TrainPlan,
        loss: Loss,
        *,
        fill: tuple[float, ...] | None = None,
        cluster: TrainingCluster | None = None,
    ) -> None:
        super().__init__()
        self.module = module.module if isinstance(module, Network) else module
        self.plan, self.loss, self.fill, self.cluster = plan, loss, fill, cluster
        self._given = (module,)

    def forward(self, raster: Pixels, labels: Pixels) -> Tensor:
        return tile_loss(self._given[0], self.plan, self.loss, raster, labels, fill=self.fill, cluster=self.cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One image on its way through one node."""

    network: TrainableNetwork
    plan: TrainPlan
    precision: Precision
    names: tuple[str, ...]
    """Of the tensors in the trace, in the order in which the node takes them."""
    aliases: dict[str, str]
    """Names under which a tensor is used too."""
    pixels: Pixels | None
    """None: the node takes the image as a tensor."""
    fill: tuple[float, ...] | None
    cluster: TrainingCluster | None

    def sum_loss(self, loss: Loss, labels: Pixels, image: Tensor | None, tensors: Sequence[Tensor]) -> GradientSum:
        """The loss's sums over all tiles, here or on the cluster."""
        named = self.named(tensors, (False,) * len(tensors))
        if self.cluster is not None:
            return self.cluster.compute_sums(self.network, self._data(named, loss, labels, image), self.plan.cores)
        with self.tiles(image) as tiles, _opened(labels) as source:
            return compute_loss_sums(tiles, named, loss, source)

    def differentiate(
        self,
        loss: Loss,
        labels: Pixels,
        image: Tensor | None,
        named: dict[str, Tensor],
        weights: Tensor | None,
        into: Tensor | None,
    ) -> GradientSum:
        """`gradient_of_tiles` for all tiles, here or on the cluster."""
        if self.cluster is not None:
            data = self._data(named, loss, labels, image)
            return self.cluster.compute_gradient(self.network, data, self.plan.cores, weights)
        with self.tiles(image) as tiles, _opened(labels) as source:
            return gradient_of_tiles(tiles, named, loss, source, weights=weights, image_gradient=into)

    def _data(self, named: dict[str, Tensor], loss: Loss, labels: Pixels, image: Tensor | None) -> StepData:
        pixels = self.pixels if image is None else image.detach()
        assert pixels is not None
        return StepData(
            image=pixels,
            labels=labels,
            fill=self.fill,
            tensors=detach_tensors(named),
            loss=loss,
            precision=self.precision,
            cuts=self.plan.cuts,
        )

    @contextmanager
    def tiles(self, image: Tensor | None) -> Iterator[Tiles]:
        pixels = self.pixels if image is None else image.detach()
        assert pixels is not None
        with _opened(pixels, self.fill) as source:
            yield Tiles(
                network=self.network,
                image=source,
                cores=self.plan.cores,
                cuts=self.plan.cuts,
                precision=self.precision,
            )

    def named(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> dict[str, Tensor]:
        """The tensors by name; of those only the `wanted` require gradients."""
        given = zip(self.names, tensors, wanted, strict=True)
        found = {name: tensor if wants else tensor.detach() for name, tensor, wants in given}
        return found | {alias: found[name] for alias, name in self.aliases.items()}

    def collect(
        self, total: GradientSum, tensors: Sequence[Tensor], wanted: Sequence[bool], factor: float = 1.0
    ) -> list[Tensor | None]:
        """factor * gradients in the order and types of the tensors; zeros where no tile depends on one."""
        found: list[Tensor | None] = []
        for name, tensor, wants in zip(self.names, tensors, wanted, strict=True):
            gradient = total.gradients.pop(name, None)
            if wants and gradient is None:
                found.append(torch.zeros_like(tensor))
            else:
                found.append(gradient.mul_(factor).to(tensor) if wants and gradient is not None else None)
        return found


class _TiledOutput(torch.autograd.Function):
    """The output of all tiles; each tile is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, step: _Step, image: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(image, *tensors)
        return _assemble(step, image, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        step: _Step = ctx.step
        image, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        into = _zeros_for(image) if ctx.needs_input_grad[1] else None
        with step.tiles(image) as tiles:
            total = pull_back(tiles, step.named(tensors, wanted), cotangents[0], image_gradient=into)
        return None, *_once(ctx, cotangents[0], _like(into, image), *step.collect(total, tensors, wanted))


class _TiledLoss(torch.autograd.Function):
    """The loss of all tiles. A separable one is differentiated in forward, tile by tile, and backward only scales;
    of others forward takes the sums, and backward differentiates."""

    @staticmethod
    def forward(ctx: Any, step: _Step, loss: Loss, labels: Pixels, image: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.step, ctx.loss, ctx.labels = step, loss, labels
        ctx.save_for_backward(image, *tensors)
        wanted = ctx.needs_input_grad[4:]
        # float16 has no room for gradients that are scaled afterwards: those wait for the gradient scaler's factor.
        is_half = step.precision.enabled and step.precision.dtype == torch.float16
        ctx.is_fused = loss.separable and not (is_half or any(tensor.dtype == torch.float16 for tensor in tensors))
        if not ctx.is_fused:
            value, ctx.weights = _value(loss, step.sum_loss(loss, labels, image, tensors), step)
            return value
        into = _zeros_for(image) if ctx.needs_input_grad[3] else None
        total = step.differentiate(loss, labels, image, step.named(tensors, wanted), None, into)
        value, weights = _value(loss, total, step)
        factor = float(weights[0])
        ctx.gradients = (_like(into, image, factor), *step.collect(total, tensors, wanted, factor))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (cotangent,) = cotangents
        if ctx.is_fused:
            scaled = (None if gradient is None else gradient * cotangent.to(gradient) for gradient in ctx.gradients)
            return None, None, None, *_once(ctx, cotangent, *scaled)
        step: _Step = ctx.step
        image, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        into = _zeros_for(image) if ctx.needs_input_grad[3] else None
        weights = ctx.weights * cotangent.double()
        total = step.differentiate(ctx.loss, ctx.labels, image, step.named(tensors, wanted), weights, into)
        return None, None, None, *_once(ctx, cotangent, _like(into, image), *step.collect(total, tensors, wanted))


class _Underivable(torch.autograd.Function):
    """Gradients as they are, whose own gradients are an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        del ctx
        return tuple(gradient.clone() for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        del ctx
        raise UsageError(
            "second derivatives through tiles are not computed; leave out create_graph, or run a smaller image whole"
        )


def _once(ctx: Any, cotangent: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients; where the caller could differentiate them again (create_graph), doing so is an error.

    torch's once_differentiable would take them for constants where the cotangent is one.
    """
    if not torch.is_grad_enabled():
        return gradients
    found = [gradient for gradient in gradients if gradient is not None]
    sources = [tensor for tensor in (cotangent, *ctx.saved_tensors) if tensor is not None]
    made = iter(_Underivable.apply(len(found), *found, *sources) if found else ())
    return tuple(None if gradient is None else next(made) for gradient in gradients)


def _begin(
    module: nn.Module | Network,
    plan: TrainPlan,
    raster: Pixels,
    fill: tuple[float, ...] | None,
    cluster: TrainingCluster | None = None,
) -> tuple[_Step, Tensor | None, list[Tensor]]:
    """(the step, the image where it is a tensor, parameters and buffers that the result depends on)."""
    with _opened(raster) as source:
        shape = source.shape
        dtype = source.dtype
        image = source.image if isinstance(source, TensorSource) and isinstance(raster, Tensor) else None
    image_learns = image is not None and image.requires_grad
    network = prepare_training(module, shape[0], dtype, image_learns=image_learns)
    traced = network.network
    # Casts between floats are what mixed precision does; pixels of another kind would be scaled otherwise.
    fits = dtype == traced.dtype or (dtype.is_floating_point and traced.dtype.is_floating_point)
    if shape[0] != traced.bands or not fits:
        raise UsageError(
            f"the network was analysed for {traced.bands} bands {_name(traced.dtype)}, the image has {shape[0]} bands "
            f"{_name(dtype)}; analyse it for those"
        )
    if shape != plan.image_shape:
        raise UsageError(f"the plan is for images of {plan.image_shape}, got {shape}; make one for that shape")
    expected = (plan.output_shape[0], *traced.output_shape(shape[1:]))
    if plan.output_shape != expected:
        raise UsageError(
            f"the plan's output_shape must be {expected}, as the network makes of {shape}, got {plan.output_shape}"
        )
    if fill is not None and len(fill) != shape[0]:
        raise UsageError(f"fill must have one value a band, got {len(fill)} for {shape[0]} bands")
    if plan.memory is not None:
        map_large_blocks()
    live = network.tensors()
    first: dict[int, str] = {}
    for name, tensor in live.items():
        first.setdefault(id(tensor), name)
    tensors = [live[name] for name in first.values()]
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    step = _Step(
        network=network,
        plan=plan,
        precision=Precision.current(device),
        names=tuple(first.values()),
        aliases={name: first[id(tensor)] for name, tensor in live.items() if first[id(tensor)] != name},
        pixels=None if image is not None else raster,
        fill=fill,
        cluster=cluster,
    )
    return step, image, tensors


def _assemble(step: _Step, image: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """(channels, height, width) of the whole output, streamed."""
    whole: Tensor | None = None
    with step.tiles(image) as tiles:
        for core, part in compute_outputs(tiles, step.named(tensors, (False,) * len(tensors))):
            if whole is None:
                whole = part.new_empty((part.shape[0], *step.plan.output_shape[1:]))
            rows, columns = core.slices()
            whole[:, rows, columns] = part
    assert whole is not None
    return whole


def _value(loss: Loss, total: GradientSum, step: _Step) -> tuple[Tensor, Tensor]:
    """(the loss, its gradient for each of its sums)."""
    if total.sums is None:
        raise LabelError("no pixel counts: all are nodata in the image or its labels, or ignored; leave the image out")
    with torch.inference_mode(False), torch.enable_grad():
        sums = total.sums.detach().clone().requires_grad_()
        value = loss.value(sums)
        (weights,) = torch.autograd.grad(value, sums)
        if loss.separable:
            other = torch.cat([sums.detach()[:1] + 1, sums.detach()[1:]]).requires_grad_()
            (elsewhere,) = torch.autograd.grad(loss.value(other), other)
            if not torch.allclose(elsewhere[0], weights[0], rtol=1e-9, atol=0):
                raise UsageError(f"{type(loss).__name__} is not linear in its first sum; say separable = False")
    dtype = step.network.output.meta["val"].dtype
    return value.detach().to(torch.float64 if dtype == torch.float64 else torch.float32), weights


def _require_labels(shape_yx: tuple[int, int], step: _Step) -> None:
    height, width = step.plan.output_shape[1:]
    if shape_yx != (height, width):
        raise LabelError(
            f"labels must lie on the network's output of {height} x {width} px, got {shape_yx[0]} x {shape_yx[1]}; "
            "resample or crop them"
        )


@contextmanager
def _opened(pixels: Pixels, fill: tuple[float, ...] | None = None) -> Iterator[WindowSource]:
    source = open_source(pixels, fill)
    try:
        yield source
    finally:
        source.close()


def _zeros_for(image: Tensor | None) -> Tensor:
    assert image is not None
    return torch.zeros_like(image, dtype=torch.float64 if image.dtype == torch.float64 else torch.float32)


def _like(gradient: Tensor | None, image: Tensor | None, factor: float = 1.0) -> Tensor | None:
    return None if gradient is None or image is None else gradient.mul_(factor).to(image.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
