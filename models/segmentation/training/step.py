"""One step's gradient: the one place that says how tiles of several scenes become the gradient of a loss."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from ....tiler.analysis.network import analyze_network, torch_dtype
from ....tiler.base.dtypes import dtype_name
from ....tiler.base.errors import LabelError, RasterError
from ....tiler.base.geometry import Window
from ....tiler.base.text import MB, first_line
from ....tiler.labels.labels import UNLABELLED, Classes
from ....tiler.rasters.block_cache import BlockStore
from ....tiler.rasters.nodata import Mask
from ....tiler.rasters.raster import RasterReader, read_filled
from ....tiler.training.cluster import TrainingCluster
from ....tiler.training.gradient import GradientSum, Tiles, compute_loss_sums, compute_outputs, gradient_of_tiles
from ....tiler.training.loss import Loss
from ....tiler.training.sum_tree import cut_groups, fold_tree
from ....tiler.training.trainable import TrainableNetwork, detach_tensors
from .augmentation import Variant
from .sampling import TrainingTile
from .scene import UNTURNED, LabelPart, SceneLabelReader, SceneLabels, TrainingScene, VariantRaster, VariantReader


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGradient:
    """What a step is made from."""

    loss: float
    """Of the pixels that count."""
    gradients: dict[str, Tensor]
    """Of each parameter by its name in the module; those without influence are left out."""
    pixels: int
    """That count."""


class VariantSource:
    """Windows of a scene in one variant, read through a reader that stays open from step to step."""

    def __init__(
        self, scene: TrainingScene, reader: RasterReader, variant: Variant, fill: tuple[float, ...], dtype: torch.dtype
    ) -> None:
        self._fill = fill
        numpy_dtype = np.dtype(dtype_name(dtype))
        self._view = VariantRaster.of(scene.raster, variant, numpy_dtype)
        self._reader = VariantReader(reader, scene.raster, variant, numpy_dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._view.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self._view.dtype)

    def read(self, window: Window) -> tuple[Tensor, Mask | None]:
        filled = read_filled(self._reader, self._view, window, self._fill)
        return torch.from_numpy(filled.image), filled.missing

    def close(self) -> None:
        """The reader is the engine's."""


class LabelSource:
    """Windows of a scene's classes, as (1, height, width); masked where none counts."""

    def __init__(self, reader: SceneLabelReader, shape_yx: tuple[int, int]) -> None:
        self._reader, self._shape = reader, shape_yx

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1, *self._shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32

    def read(self, window: Window) -> tuple[Tensor, Mask | None]:
        found = self._reader.read(window)
        # torch compares no unsigned numbers of two bytes.
        return torch.from_numpy(found.astype(np.int32))[None], found == UNLABELLED

    def close(self) -> None:
        """The reader is the engine's."""


class CountingLoss:
    """A loss whose last sum is the number of pixels that count."""

    def __init__(self, loss: Loss) -> None:
        self.inner = loss

    @property
    def separable(self) -> bool:
        return self.inner.separable

    def select(self, labels: Tensor, valid: Tensor) -> Tensor:
        return self.inner.select(labels, valid)

    def sums(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return torch.cat([self.inner.sums(logits, labels, counted), counted.sum(dtype=torch.float64)[None]])

    def value(self, sums: Tensor) -> Tensor:
        return self.inner.value(sums[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOrder:
    """What a worker process needs for the steps of a training; sent to it once."""

    module: nn.Module
    bands: int
    dtype: torch.dtype
    scenes: tuple[TrainingScene, ...]
    loss: Loss
    fill: tuple[float, ...]
    cuts: tuple[int, ...]
    cache_bytes: int

    def begin(self) -> StepEngine:
        network = TrainableNetwork(analyze_network(self.module, self.bands, self.dtype))
        return StepEngine(network, self.scenes, self.loss, self.fill, self.cuts, self.cache_bytes)

    def try_scenes(self) -> None:
        """Read a pixel of each scene and of its labels.

        Raises:
            RasterError: one cannot be opened or read.
        """
        pixel = Window(y=0, x=0, height=1, width=1)
        for part in (part for scene in self.scenes for part in (scene.raster, scene.labels)):
            try:
                with closing(part.open_reader()) as reader:
                    reader.read(pixel)
            except (OSError, ValueError) as error:
                raise RasterError(f"{part.path} cannot be opened: {first_line(error)}") from error


class StepEngine:
    """Scenes held open beside a traced network: gradients of steps, classes of tiles.

    Guarantee: `compute` gives the gradient of the loss over the union of the tiles' cores, each as it would be in its
    whole scene shown in the tile's variant, up to floating-point rounding. Tiles are added in fixed groups and by a
    fixed tree, so that it has the same bits here and on any number of workers, with as many threads.

    Args:
        fill: raw value of each band that stands in for nodata.
        cuts: where a tile's graph is cut so that its parts are computed again in backward.
        cache_bytes: of decoded blocks of all scenes.
        bound: of a network of one channel: its logit must be greater for class 1.
    """

    def __init__(
        self,
        network: TrainableNetwork,
        scenes: Sequence[TrainingScene],
        loss: Loss,
        fill: tuple[float, ...],
        cuts: tuple[int, ...] = (),
        cache_bytes: int = 64 * MB,
        bound: float = 0.0,
    ) -> None:
        self.network, self.scenes, self.fill, self.cuts = network, scenes, fill, cuts
        self._bound = bound
        self.loss = CountingLoss(loss)
        self._cache_bytes = cache_bytes
        self._cluster: TrainingCluster | None = None
        self._work = ""
        """Its name on the cluster."""
        self._pixels = [scene.raster.open_reader(BlockStore(cache_bytes // len(scenes))) for scene in scenes]
        self._labels = [scene.labels.open_reader() for scene in scenes]

    def spread_over(self, cluster: TrainingCluster) -> None:
        """Have `compute` use the workers of a cluster from now on.

        Raises:
            ClusterError: a worker cannot load the network, or open the scenes or their labels.
        """
        traced = self.network.network
        order = StepOrder(
            module=self.network.module,
            bands=traced.bands,
            dtype=traced.dtype,
            scenes=tuple(scene.made_absolute() for scene in self.scenes),
            loss=self.loss.inner,
            fill=self.fill,
            cuts=self.cuts,
            cache_bytes=self._cache_bytes,
        )
        self._cluster, self._work = cluster, cluster.introduce(self, order)
        cluster.try_out(self._work, StepOrder.try_scenes)

    def compute(self, tiles: Sequence[TrainingTile]) -> StepGradient:
        """The gradient of a step."""
        weights: Tensor | None = None
        if not self.loss.separable:
            sums = self._add_up(tiles, None, with_gradients=False).sums
            _, weights = self._value(sums)
        total = self._add_up(tiles, weights, with_gradients=True)
        loss, slope = self._value(total.sums)
        scale = float(slope[0]) if weights is None else 1.0
        assert total.sums is not None
        return StepGradient(
            loss=loss,
            gradients={self.network.names[name]: gradient * scale for name, gradient in total.gradients.items()},
            pixels=round(float(total.sums[-1])),
        )

    def _add_up(self, tiles: Sequence[TrainingTile], weights: Tensor | None, *, with_gradients: bool) -> GradientSum:
        """`sum_tiles` of all tiles, here or on the cluster."""
        tensors = self.network.tensors()
        if self._cluster is not None:
            data = detach_tensors(tensors)
            return self._cluster.add_up(self._work, data, tiles, weights, with_gradients=with_gradients)
        groups = cut_groups(tiles)
        return fold_tree(
            (self.sum_tiles(tensors, group, weights, with_gradients=with_gradients) for group in groups),
            operator.iadd,
        )

    def sum_tiles(
        self,
        data: Mapping[str, Tensor],
        tiles: Sequence[TrainingTile],
        weights: Tensor | None,
        *,
        with_gradients: bool,
    ) -> GradientSum:
        """The loss's sums over some tiles, added in their order, and their gradients.

        Args:
            data: parameters and buffers by the names of the trace.
            weights: the gradient of the loss's value for its sums; None: of sums[0] alone.
        """
        total = GradientSum()
        for (scene, variant), group in groupby(tiles, key=lambda tile: (tile.scene, tile.variant)):
            part = self._tiles(scene, variant, [tile.core for tile in group])
            labels = self._label_source(scene, variant, "training")
            total += (
                gradient_of_tiles(part, data, self.loss, labels, weights=weights)
                if with_gradients
                else compute_loss_sums(part, data, self.loss, labels)
            )
        return total

    def _value(self, sums: Tensor | None) -> tuple[float, Tensor]:
        """The loss of sums, and its slope along each."""
        if sums is None:
            raise LabelError("no labelled pixel counts in this step; give more labels, or larger cores by --core")
        leaf = sums.detach().clone().requires_grad_()
        value = self.loss.value(leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), slope

    def predict(self, scene: int, core: Window, tensors: Mapping[str, Tensor] | None = None) -> Classes:
        """(height, width) classes of a window of a scene as it is.

        Args:
            tensors: in place of the network's own, by their names in the module.
        """
        live = self.network.tensors()
        if tensors is not None:
            live = {traced: tensors.get(name, live[traced]) for traced, name in self.network.names.items()}
        ((_, logits),) = compute_outputs(self._tiles(scene, UNTURNED, [core]), live)
        return self._decide(logits)

    def _decide(self, logits: Tensor) -> Classes:
        """(height, width) classes of logits (channels, height, width)."""
        found = logits[0] > self._bound if len(logits) == 1 else logits.argmax(0)
        return found.numpy().astype(np.uint16)

    def read_validation(self, scene: int, core: Window) -> Classes:
        """(height, width) labels of a window, UNLABELLED where a pixel does not validate or is nodata."""
        return self._label_reader(scene, UNTURNED, "validation", self._pixels[scene]).read(core)

    def read_batch(self, draw: Callable[[int], Sequence[TrainingTile]], side: int, count: int) -> Tensor:
        """(count, bands, side, side) raw pixels at the first steps' tiles, as they are: without context or variant.

        Pixels in validation blocks are given the fill, as nodata are.
        """
        windows: list[tuple[int, Window]] = []
        step = 0
        while len(windows) < count:
            for tile in draw(step):
                shape = self.scenes[tile.scene].raster.shape_yx
                core = tile.variant.turn.source_window(tile.core, shape)
                y, x = (min(start, extent - side) for start, extent in zip((core.y, core.x), shape, strict=True))
                windows.append((tile.scene, Window(y=y, x=x, height=side, width=side)))
            step += 1
        # Of a whole scene's tiles some from everywhere.
        chosen = [windows[index * len(windows) // count] for index in range(count)]
        return torch.cat([self._read_unheld(scene, window)[None] for scene, window in chosen])

    def _read_unheld(self, scene: int, window: Window) -> Tensor:
        image, _ = self._tiles(scene, UNTURNED, []).image.read(window)
        held = self.scenes[scene].find_validation(window)
        if held is None:
            return image
        fill = torch.tensor(self.fill, dtype=image.dtype)[:, None, None]
        return torch.where(torch.from_numpy(held), fill, image)

    def read_image(self, scene: int, window: Window) -> np.ndarray:
        """(bands, height, width) of a window as it is."""
        return self._pixels[scene].read(window)

    def _tiles(self, scene: int, variant: Variant, cores: Sequence[Window]) -> Tiles:
        dtype = self.network.network.dtype
        source = VariantSource(self.scenes[scene], self._pixels[scene], variant, self.fill, dtype)
        return Tiles(network=self.network, image=source, cores=cores, cuts=self.cuts)

    def _label_reader(
        self, scene: int, variant: Variant, part: LabelPart, pixels: RasterReader | None
    ) -> SceneLabelReader:
        view = SceneLabels(scene=self.scenes[scene], part=part, turn=variant.turn)
        return SceneLabelReader(view, self._labels[scene], pixels)

    def _label_source(self, scene: int, variant: Variant, part: LabelPart) -> LabelSource:
        # Nodata pixels are left out where the image is read.
        reader = self._label_reader(scene, variant, part, None)
        return LabelSource(reader, variant.turn.shape(self.scenes[scene].raster.shape_yx))

    def close(self) -> None:
        for reader in (*self._pixels, *self._labels):
            with suppress(OSError):
                reader.close()
