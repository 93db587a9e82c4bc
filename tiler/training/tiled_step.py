"""A tiled step: one image with its network and tiles, checked, and what is asked of all tiles at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..analysis.network import Network
from ..base.dtypes import dtype_name
from ..base.errors import LabelError, UntileableError, UsageError
from ..rasters.raster import Raster
from ..system.logs import log
from ..system.machine import map_large_blocks, spare_lost_threads
from .cluster import StepData, TrainingCluster
from .gradient import GradientSum, Precision, Tiles, compute_loss_sums, gradient_of_tiles
from .loss import Loss
from .plan import TrainPlan
from .trainable import TrainableNetwork, detach_tensors, prepare_training
from .window_source import Pixels, TensorSource, WindowSource, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledStep:
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

    def sum_loss(self, loss: Loss, labels: Pixels, image: Tensor | None, named: dict[str, Tensor]) -> GradientSum:
        """The loss's sums over all tiles, here or on the cluster."""
        if self.cluster is not None:
            return self.cluster.compute_sums(self.network, self._data(named, loss, labels, image), self.plan.cores)
        with self.tiles(image) as tiles, opened(labels) as source:
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
        with self.tiles(image) as tiles, opened(labels) as source:
            return gradient_of_tiles(tiles, named, loss, source, weights=weights, image_gradient=into)

    def _data(self, named: dict[str, Tensor], loss: Loss, labels: Pixels, image: Tensor | None) -> StepData:
        pixels = self.pixels if image is None else image.detach()
        assert pixels is not None
        return StepData(
            image=_from_anywhere(pixels),
            labels=_from_anywhere(labels),
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
        with opened(pixels, self.fill) as source:
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


def begin_step(
    module: nn.Module | Network,
    plan: TrainPlan,
    raster: Pixels,
    fill: tuple[float, ...] | None,
    cluster: TrainingCluster | None = None,
) -> tuple[TiledStep, Tensor | None, list[Tensor]]:
    """(the step, the image where it is a tensor, parameters and buffers that the result depends on)."""
    spare_lost_threads()
    with opened(raster) as source:
        shape = source.shape
        dtype = source.dtype
        image = source.image if isinstance(source, TensorSource) and isinstance(raster, Tensor) else None
    image_learns = image is not None and image.requires_grad
    network = _prepare(module, shape[0], dtype, image_learns=image_learns)
    traced = network.network
    if shape[0] != traced.bands or not _fits(dtype, traced.dtype, network.tensors().values()):
        raise UsageError(
            f"the network was analysed for {traced.bands} bands {dtype_name(traced.dtype)}, the image has {shape[0]} "
            f"bands {dtype_name(dtype)}; convert the image, or analyse it for those"
        )
    if shape != plan.image_shape:
        raise UsageError(f"the plan is for images of {plan.image_shape}, got {shape}; make one for that shape")
    height, width = traced.output_shape(shape[1:])
    if plan.output_shape[1:] != (height, width):
        raise UsageError(
            f"the plan's output_shape must be (channels, {height}, {width}), as the network makes of {shape}, got "
            f"{plan.output_shape}"
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
    step = TiledStep(
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


def _fits(dtype: torch.dtype, traced: torch.dtype, tensors: Iterable[Tensor]) -> bool:
    """Whether a network takes such pixels: those that it was analysed for, or floats that autocast casts, or that its
    weights were turned into. Pixels of another kind would be scaled otherwise."""
    if dtype == traced:
        return True
    if not (dtype.is_floating_point and traced.is_floating_point):
        return False
    return torch.is_autocast_enabled() or any(
        torch.is_autocast_enabled(tensor.device.type) or tensor.dtype == dtype for tensor in tensors
    )


def _prepare(module: nn.Module | Network, bands: int, dtype: torch.dtype, *, image_learns: bool) -> TrainableNetwork:
    """`prepare_training`, which says what to do with float64 pixels that a network cannot take."""
    try:
        return prepare_training(module, bands, dtype, image_learns=image_learns)
    except UntileableError as error:
        weights = {parameter.dtype for parameter in module.parameters()} if isinstance(module, nn.Module) else set()
        if dtype != torch.float64 or not weights or torch.float64 in weights:
            raise
        raise UsageError(
            f"the image is float64 and the network's weights are {dtype_name(next(iter(weights)))}; give "
            "image.float(), or train network.double()"
        ) from error


def compute_value(loss: Loss, total: GradientSum, step: TiledStep) -> tuple[Tensor, Tensor]:
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


def compute_shared_value(loss: Loss, total: GradientSum, step: TiledStep) -> tuple[Tensor, Tensor]:
    """`compute_value`; of a rank beside others 0 where no pixel counts: they would wait for its gradients for ever."""
    try:
        return compute_value(loss, total, step)
    except LabelError as error:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            raise
        log.warning("rank %d adds nothing to this step: %s", dist.get_rank(), error)
        weights = torch.zeros(1, dtype=torch.float64) if total.sums is None else torch.zeros_like(total.sums)
        dtype = step.network.output.meta["val"].dtype
        return weights.new_zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32), weights


def require_labels(shape_yx: tuple[int, int], step: TiledStep) -> None:
    height, width = step.plan.output_shape[1:]
    if shape_yx != (height, width):
        raise LabelError(
            f"labels must lie on the network's output of {height} x {width} px, got {shape_yx[0]} x {shape_yx[1]}; "
            "resample or crop them"
        )


def _from_anywhere(pixels: Pixels) -> Pixels:
    """The same, for processes in other folders."""
    return pixels.made_absolute() if isinstance(pixels, Raster) else pixels


@contextmanager
def opened(pixels: Pixels, fill: tuple[float, ...] | None = None) -> Iterator[WindowSource]:
    source = open_source(pixels, fill)
    try:
        yield source
    finally:
        source.close()
