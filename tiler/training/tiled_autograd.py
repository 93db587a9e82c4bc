"""Tiled autograd: a network's output, or its loss, over a whole image as one node of the caller's autograd graph.

The parameters are explicit inputs of the node and their gradients are what it returns, so that hooks, DDP, gradient
scaling and accumulation see what they see in ordinary training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.network import Network
from ..base.errors import UsageError
from .cluster import TrainingCluster
from .gradient import compute_outputs, pull_back
from .loss import Loss
from .plan import TrainPlan
from .tiled_step import TiledStep, begin_step, compute_shared_value, compute_value, opened, require_labels
from .window_source import Pixels


def tile_checkpoint(
    module: nn.Module | Network, plan: TrainPlan, *, fill: tuple[float, ...] | None = None
) -> TiledModule:
    """The module with tiles inside: the same output and gradients, without the whole image's activations.

    Guarantee: output, parameter gradients and input gradient equal those of the module on the whole image by ordinary
    autograd, up to floating-point rounding, for every plan. Forward streams the tiles; backward computes each again.
    The output is held whole: low-resolution features under an ordinary head, say.

    Args:
        module: maps (1, bands, height, width) to floats; or its analysis.
        plan: the tiles of an image of that shape.
        fill: raw value of each band that stands in for a raster's nodata pixels, as in `tile_loss`; None: 0. What the
            network makes of them is in the output as of any others.

    Raises:
        UntileableError: at the first call, for a module that cannot be tiled or trained exactly.
    """
    return TiledModule(module, plan, fill=fill)


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
        labels: (height, width) or (bands, height, width), on the grid of the module's output. Losses of two passes
            read image and labels again in backward(); a tensor that was changed meanwhile is refused, an array or a
            file is not noticed.
        fill: raw value of each band that stands in for nodata pixels; None: 0. Nodata pixels of either do not count.
        cluster: workers of a Dask client that compute the tiles, with the same bits for any number of them; None: this
            process does. Image and labels must be rasters that workers can open, or small enough to be sent to them.

    Returns:
        A scalar in float32, or float64 for a float64 network.

    Raises:
        UntileableError: a module that cannot be tiled or trained exactly.
        LabelError: labels on another grid, labels that are no class, or no pixel that counts; of a rank of several
            (torch.distributed) the last is a loss of 0 with gradients of 0, so that the others do not wait for it.
        RasterError: a window cannot be read.
    """
    step, image, tensors = begin_step(module, plan, raster, fill, cluster)
    if cluster is not None and image is not None and image.requires_grad:
        raise UsageError(
            "the image's own gradient is not computed on a cluster; detach() the image, or leave cluster out"
        )
    with opened(labels) as source:
        require_labels(source.shape[1:], step)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *([image] if image is not None else []))):
        value = _TiledLoss.apply(step, loss, labels, image, *tensors)
        assert isinstance(value, Tensor)
        return value
    named = step.named(tensors, (False,) * len(tensors))
    return compute_value(loss, step.sum_loss(loss, labels, image, named), step)[0]


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
        step, image, tensors = begin_step(self._given[0], self.plan, raster, self.fill)
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


class _TiledOutput(torch.autograd.Function):
    """The output of all tiles; each tile is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, step: TiledStep, image: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(image, *tensors)
        return _assemble(step, image, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        step: TiledStep = ctx.step
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
    def forward(
        ctx: Any, step: TiledStep, loss: Loss, labels: Pixels, image: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        ctx.step, ctx.loss, ctx.labels = step, loss, labels
        ctx.save_for_backward(image, *tensors)
        wanted = ctx.needs_input_grad[4:]
        # float16 has no room for gradients that are scaled afterwards: those wait for the gradient scaler's factor.
        is_half = step.precision.enabled and step.precision.dtype == torch.float16
        ctx.is_fused = loss.separable and not (is_half or any(tensor.dtype == torch.float16 for tensor in tensors))
        if not ctx.is_fused:
            ctx.version = _version_of(labels)
            # With the same wishes as in backward, so that workers need not be sent the weights again.
            total = step.sum_loss(loss, labels, image, step.named(tensors, wanted))
            value, ctx.weights = compute_shared_value(loss, total, step)
            return value
        into = _zeros_for(image) if ctx.needs_input_grad[3] else None
        total = step.differentiate(loss, labels, image, step.named(tensors, wanted), None, into)
        value, weights = compute_shared_value(loss, total, step)
        factor = float(weights[0])
        ctx.gradients = (_like(into, image, factor), *step.collect(total, tensors, wanted, factor))
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (cotangent,) = cotangents
        if ctx.is_fused:
            scaled = (None if gradient is None else gradient * cotangent.to(gradient) for gradient in ctx.gradients)
            return None, None, None, *_once(ctx, cotangent, *scaled)
        step: TiledStep = ctx.step
        image, *tensors = ctx.saved_tensors
        if _version_of(ctx.labels) != ctx.version:
            raise UsageError(
                "the labels were changed in place between the loss and its backward(), which reads them again; change "
                "them later, or give a copy"
            )
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


def _assemble(step: TiledStep, image: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
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


def _version_of(labels: Pixels) -> int:
    """Changes when a tensor is written to in place; arrays do not tell."""
    return labels._version if isinstance(labels, Tensor) and not labels.is_inference() else 0


def _zeros_for(image: Tensor | None) -> Tensor:
    assert image is not None
    return torch.zeros_like(image, dtype=torch.float64 if image.dtype == torch.float64 else torch.float32)


def _like(gradient: Tensor | None, image: Tensor | None, factor: float = 1.0) -> Tensor | None:
    return None if gradient is None or image is None else gradient.mul_(factor).to(image.dtype)
