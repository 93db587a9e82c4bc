"""Gradient sums: over a list of tiles, what each contributes to a whole image's loss, output and gradients.

The cores partition the output, so that by linearity the whole image's vector-Jacobian product is the sum over tiles of
those with the cotangent of one core each: exact for every layer, with no more halo than the forward pass needs. Windows
overlap, so that gradients of the image are added where they fall.

The functions here have no state: tiles may be cut into groups, each worked on anywhere, and the sums added in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..analysis.program import Program
from ..base.errors import LabelError
from ..base.geometry import Interval, Window, footprint
from ..output.values import missing_in_output
from .loss import Loss
from .trainable import TrainableNetwork
from .window_source import WindowSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The automatic mixed precision in which tiles are computed, as it was where the step began."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def current(cls, device: torch.device) -> Precision:
        """What is set now for a device."""
        if not torch.amp.is_autocast_available(device.type):
            return cls(device=device.type, dtype=torch.float32, enabled=False)
        return cls(
            device=device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )

    def open(self) -> AbstractContextManager[object]:
        if not torch.amp.is_autocast_available(self.device):
            return nullcontext()
        # Weights are cast anew for each tile: casts that are kept would hold the graph of the tile before.
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def close(self) -> AbstractContextManager[object]:
        """Without it, as backward passes and losses are computed."""
        if not torch.amp.is_autocast_available(self.device):
            return nullcontext()
        return torch.autocast(self.device, enabled=False)


@dataclass(slots=True)
class GradientSum:
    """What some tiles contribute: sums of the loss, and gradients by the names of the trace."""

    sums: Tensor | None = None
    """(k,) float64; None: none of their pixels counts."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """In float32, or in float64 for float64 parameters."""

    def __iadd__(self, other: GradientSum) -> GradientSum:
        """Add those of later tiles; the order of additions decides the last bits."""
        self.add_sums(other.sums)
        for name, gradient in other.gradients.items():
            self.add_gradient(name, gradient)
        return self

    def add_sums(self, sums: Tensor | None) -> None:
        if sums is not None:
            self.sums = sums if self.sums is None else self.sums + sums

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            # A copy: autograd may give one tensor for two parameters, or one that is expanded from fewer numbers.
            self.gradients[name] = gradient.to(wide, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Some tiles of one image, and how they are computed."""

    network: TrainableNetwork
    image: WindowSource
    cores: Sequence[Window]
    """In output pixels, in the order of their additions."""
    cuts: tuple[int, ...] = ()
    """Where programs are cut so that parts are computed again in backward; see `Program`."""
    precision: Precision = field(default_factory=lambda: Precision.current(torch.device("cpu")))

    @property
    def shape_yx(self) -> tuple[int, int]:
        return self.image.shape[1:]


def compute_outputs(tiles: Tiles, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Window, Tensor]]:
    """(core, (channels, height, width) of it) of each tile, without anything kept for gradients."""
    device = _device(tensors, tiles)
    for core in tiles.cores:
        with torch.no_grad(), tiles.precision.open():
            program = tiles.network.program(tiles.shape_yx, core, tensors)
            image = tiles.image.read(program.window)[0][None].to(device)
            yield core, program(image)[0][0]


def compute_loss_sums(tiles: Tiles, tensors: Mapping[str, Tensor], loss: Loss, labels: WindowSource) -> GradientSum:
    """The loss's sums over the tiles, without gradients."""
    total = GradientSum()
    for core in tiles.cores:
        begun = _begin(tiles, core, tensors, loss, labels)
        if begun is None:
            continue
        with torch.no_grad(), tiles.precision.open():
            (output,) = begun.program(begun.image)
        with torch.no_grad(), tiles.precision.close():
            total.add_sums(begun.sums(loss, output))
    return total


def gradient_of_tiles(
    tiles: Tiles,
    tensors: Mapping[str, Tensor],
    loss: Loss,
    labels: WindowSource,
    *,
    weights: Tensor | None = None,
    image_gradient: Tensor | None = None,
) -> GradientSum:
    """The loss's sums over the tiles, and the gradient of sum_k weights[k] * sums[k] for each tensor that requires one.

    Args:
        tensors: parameters and buffers by the names of the trace.
        weights: the gradient of the loss's value for its sums; None: of sums[0] alone, for separable losses.
        image_gradient: (bands, height, width) of the whole image, to which its gradient is added where windows lie.

    Raises:
        LabelError: labels that do not fit.
    """
    total = GradientSum()
    leaves = _Leaves(tensors)
    for core in tiles.cores:
        begun = _begin(tiles, core, leaves.tensors, loss, labels)
        if begun is None:
            continue

        def weigh(output: Tensor, tile: _CountedTile = begun) -> tuple[Tensor, Tensor | None]:
            sums = tile.sums(loss, output)
            total.add_sums(sums.detach())
            return (sums[0] if weights is None else (weights.to(sums) * sums).sum()), None

        _differentiate(tiles, begun.program, begun.image, weigh, leaves, total, image_gradient)
    return total


def pull_back(
    tiles: Tiles,
    tensors: Mapping[str, Tensor],
    cotangent: Tensor,
    *,
    image_gradient: Tensor | None = None,
) -> GradientSum:
    """The gradient of sum(cotangent * output) over the tiles for every tensor that requires one.

    Args:
        cotangent: (channels, height, width) of the whole output.
        image_gradient: as in `gradient_of_tiles`.
    """
    total = GradientSum()
    leaves = _Leaves(tensors)
    device = _device(tensors, tiles)
    for core in tiles.cores:
        rows, columns = core.slices()
        program = tiles.network.program(tiles.shape_yx, core, leaves.tensors, tiles.cuts)
        image = tiles.image.read(program.window)[0][None].to(device)

        def given(output: Tensor, part: Tensor = cotangent[None, :, rows, columns]) -> tuple[Tensor, Tensor | None]:
            return output, part.to(output.dtype)

        _differentiate(tiles, program, image, given, leaves, total, image_gradient)
    return total


class _Leaves:
    """The tensors, with those that require gradients as leaves of their own, apart from the caller's graph."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        once: dict[int, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor.requires_grad and id(tensor) not in once:
                self.wanted[name] = once[id(tensor)] = tensor.detach().requires_grad_()
            self.tensors[name] = once.get(id(tensor), tensor)


def _differentiate(
    tiles: Tiles,
    program: Program,
    image: Tensor,
    head: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    leaves: _Leaves,
    total: GradientSum,
    image_gradient: Tensor | None,
) -> None:
    """One tile forward and backward: `head` makes of the output the root of the differentiation, and its cotangent."""
    wanted = list(leaves.wanted.values())
    image = image.detach()
    if image_gradient is not None:
        wanted.append(image.requires_grad_())
    with torch.enable_grad():
        with tiles.precision.open():
            (output,) = program(image)
        with tiles.precision.close():
            root, cotangent = head(output)
            del output
            if not (root.requires_grad and wanted):
                return
            gradients = torch.autograd.grad(root, wanted, cotangent, allow_unused=True)
    for name, gradient in zip(leaves.wanted, gradients, strict=False):
        if gradient is not None:
            total.add_gradient(name, gradient)
    if image_gradient is not None and gradients[-1] is not None:
        inside = program.window.clamp(tiles.shape_yx)
        rows, columns = inside.slices()
        # Windows overlap: added, never put.
        image_gradient[:, rows, columns] += gradients[-1][0, :, : inside.height, : inside.width]


@dataclass(frozen=True, slots=True, kw_only=True)
class _CountedTile:
    """A tile of which some pixels count."""

    program: Program
    image: Tensor
    """(1, bands, height, width) of the program's window."""
    labels: Tensor
    counted: Tensor

    def sums(self, loss: Loss, output: Tensor) -> Tensor:
        wide = output if output.dtype == torch.float64 else output.float()
        sums = loss.sums(wide[0], self.labels, self.counted)
        if sums.ndim != 1 or sums.dtype != torch.float64:
            raise LabelError(f"a loss must give its sums as (k,) in float64, got {tuple(sums.shape)} {sums.dtype}")
        return sums


def _begin(
    tiles: Tiles, core: Window, tensors: Mapping[str, Tensor], loss: Loss, labels: WindowSource
) -> _CountedTile | None:
    """Read a tile's labels and image; None where no pixel counts, so that there is nothing to compute."""
    device = _device(tensors, tiles)
    pixels, unlabelled = labels.read(core)
    pixels = pixels.to(device)
    valid = np.ones(core.shape, np.bool_) if unlabelled is None else ~unlabelled
    counted = loss.select(pixels, torch.from_numpy(valid).to(device))
    if tuple(counted.shape) != core.shape or counted.dtype != torch.bool:
        raise LabelError(f"a loss must select (height, width) in bool, got {tuple(counted.shape)} {counted.dtype}")
    if not counted.any():
        return None
    program = tiles.network.program(tiles.shape_yx, core, tensors, tiles.cuts)
    # The pixels under the core too, though the network may look elsewhere: they say where nodata is.
    scale = tiles.network.network.scale
    under = [footprint(part, ratio) for part, ratio in zip((core.rows, core.columns), scale, strict=True)]
    window = _hull(program.window, Window.from_intervals(*under))
    image, missing = tiles.image.read(window)
    if missing is not None:
        counted = counted & torch.from_numpy(~missing_in_output(missing, window, core, scale)).to(device)
        if not counted.any():
            return None
    rows, columns = program.window.slices(window)
    return _CountedTile(program=program, image=image[None, :, rows, columns].to(device), labels=pixels, counted=counted)


def _hull(a: Window, b: Window) -> Window:
    rows, columns = (
        Interval(start=min(one.start, other.start), stop=max(one.stop, other.stop))
        for one, other in ((a.rows, b.rows), (a.columns, b.columns))
    )
    return Window.from_intervals(rows, columns)


def _device(tensors: Mapping[str, Tensor], tiles: Tiles) -> torch.device:
    """Of the parameters; where there are none, that of the step."""
    return next((tensor.device for tensor in tensors.values()), torch.device(tiles.precision.device))
