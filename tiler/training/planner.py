"""The training planner: the tiles, and what is computed again inside them, that cost least within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor

from ..analysis.axis_geometry import compute_geometry
from ..analysis.cost import program_shapes
from ..analysis.network import Network
from ..base.errors import BudgetError, UsageError
from ..base.geometry import Interval, Window
from ..base.text import MB, format_bytes, parse_bytes
from ..planning.spans import compute_program_spans
from ..planning.work import count_program_flops
from ..rasters.raster import Raster
from ..rasters.reading import GDAL_CACHE_BYTES
from ..system.meter import process_bytes
from .cuts import choose_cuts
from .memory import PROCESS_BYTES, WARM_UP_BYTES, count_tile_bytes, predict_tile_bytes
from .plan import TrainingMemory, TrainPlan, require_cuts
from .trainable import TrainableNetwork
from .window_source import CACHE_BYTES, Pixels

SIDES = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64, 32)
"""Of cores that a plan may choose, in output pixels."""
RECOMPUTATION = 4 / 3
"""Work of a step in which every part is computed again: two forward passes and one backward pass of twice a forward."""
LABEL_BYTES = 9
"""A pixel of labels as class numbers, and whether it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedImages:
    """What a plan must know of the images that it is for."""

    shape: tuple[int, int, int]
    """(bands, height, width) of the largest."""
    cache_bytes: int
    """Of their readers and those of their labels; of labels and gradients in memory."""
    present_bytes: int = 0
    """Of images that are in memory already."""
    is_sampled: bool = False
    """Cores may lie anywhere, not on the grid alone."""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UsageError(f"an image's shape must be (bands, height, width), each >= 1, got {self.shape}")


def plan_training(
    raster: Pixels | tuple[int, int, int],
    network: Network,
    *,
    memory: str | int | None = "2GB",
    core: int | None = None,
    cuts: tuple[int, ...] | None = None,
    keep_output: bool = False,
    optimiser_state: float = 2.0,
    on_cluster: bool = False,
) -> TrainPlan:
    """Decide how to train a network on an image within a memory budget.

    Guarantee: a process that holds the network, its optimiser and the image, and trains by the plan, keeps the budget.
    What it holds already when the plan is made counts; what it loads later is the caller's to leave room for. Of the
    cores that fit the one of least work is taken; where only small ones do, larger ones whose graph is cut into parts
    that are computed again in backward are weighed against them. Loss and gradients are the same for every plan, up
    to floating-point rounding.

    Args:
        raster: an open raster, an array or tensor in memory, or a shape (bands, height, width) of one on disk.
        network: from `analyze_network`.
        memory: budget of the whole process, such as "2GB". glibc then gives large blocks back as soon as they are
            freed, from the first step by this plan on, for the whole process; None: no budget, and glibc stays as it
            is.
        core: side of the cores in output pixels; None: chosen.
        cuts: positions in the graph's order; (): nothing is computed again; None: chosen.
        keep_output: for `tile_checkpoint`, which holds the output and its gradient.
        optimiser_state: numbers that the optimiser keeps for each parameter: 2 for Adam, 1 for momentum, 0 for SGD.
        on_cluster: the tiles are computed by workers of a `TrainingCluster`, each of which keeps the budget.

    Raises:
        UsageError: another number of bands than the network takes; a core below 1; neither budget nor core.
        BudgetError: no core fits the budget; names the smallest budget that one fits.
    """
    if core is not None and core < 1:
        raise UsageError(f"core must be >= 1, got {core}")
    return choose_training_tiles(
        TrainableNetwork(network),
        _describe(raster),
        memory=memory,
        sides=None if core is None else (core,),
        cuts=cuts,
        keep_output=keep_output,
        optimiser_state=optimiser_state,
        on_cluster=on_cluster,
    )


def choose_training_tiles(
    network: TrainableNetwork,
    images: TrainedImages,
    *,
    memory: str | int | None,
    sides: Sequence[int] | None = None,
    cuts: tuple[int, ...] | None = None,
    keep_output: bool = False,
    optimiser_state: float = 2.0,
    on_cluster: bool = False,
) -> TrainPlan:
    """`plan_training` for images of which only this much is known.

    Args:
        sides: of cores to choose from, the largest first; None: any.
    """
    if images.shape[0] != network.network.bands:
        raise UsageError(f"the network takes {network.network.bands} bands, the image has {images.shape[0]}")
    require_cuts(cuts or ())
    candidates = _Candidates(
        network, images, keep_output=keep_output, optimiser_state=optimiser_state, on_cluster=on_cluster
    )
    if memory is None:
        if not sides:
            raise UsageError("a plan needs a memory budget or a core, got neither")
        return candidates.plan(_Candidate(side=sides[0], cuts=cuts or (), tile_bytes=0), None)
    budget = parse_bytes(memory)
    wanted = candidates.sides(sides)
    chosen = candidates.largest(wanted, budget, cuts or ())
    if cuts is None:
        overlap = candidates.overlap(chosen.side) if chosen else float("inf")
        if overlap > RECOMPUTATION:
            # Only then can it pay to compute parts again, since even without any overlap that costs a third more.
            parted = candidates.largest(wanted, budget, None)
            if parted and RECOMPUTATION * candidates.overlap(parted.side) < overlap:
                chosen = parted
    if chosen is None:
        raise BudgetError(candidates.explain_refusal(wanted[-1], budget, cuts))
    return candidates.plan(chosen, budget)


def _describe(raster: Pixels | tuple[int, int, int]) -> TrainedImages:
    """Labels come from where the image comes from."""
    if isinstance(raster, tuple):
        return TrainedImages(shape=raster, cache_bytes=2 * min(prod(raster) * 4, CACHE_BYTES + GDAL_CACHE_BYTES))
    if isinstance(raster, Raster):
        return TrainedImages(shape=raster.shape, cache_bytes=2 * count_cache_bytes([raster], CACHE_BYTES))
    shape = tuple(raster.shape[-3:]) if raster.ndim > 2 else (1, *raster.shape)
    pixels = prod(shape)
    if isinstance(raster, Tensor):
        present = pixels * raster.element_size()
        # The sum of gradients, and that in the image's own type.
        made = pixels * 4 + present if raster.requires_grad else 0
    else:
        present, made = pixels * raster.dtype.itemsize, 0
    return TrainedImages(
        shape=(shape[0], shape[1], shape[2]),
        cache_bytes=LABEL_BYTES * shape[1] * shape[2] + made,
        present_bytes=present,
    )


def count_cache_bytes(rasters: Sequence[Raster], cache_bytes: int) -> int:
    """Decoded blocks that readers of rasters keep, if they may keep so many bytes together."""
    own, by_gdal = (
        sum(prod(raster.shape) * raster.dtype.itemsize for raster in rasters if (raster.kind == "zarr") == is_zarr)
        for is_zarr in (True, False)
    )
    reading = max(raster.block_bytes for raster in rasters)
    # GDAL's cache is one for all files; a reader keeps blocks of its own beside it.
    return min(cache_bytes, own + by_gdal) + min(GDAL_CACHE_BYTES, by_gdal) + reading


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    side: int
    cuts: tuple[int, ...]
    tile_bytes: int
    """Live at once while a tile is computed forward and backward."""


class _Candidates:
    """Cores for a network and images, and what each would need."""

    def __init__(
        self,
        network: TrainableNetwork,
        images: TrainedImages,
        *,
        keep_output: bool,
        optimiser_state: float,
        on_cluster: bool,
    ) -> None:
        self._network, self._images = network, images
        self._shape_yx = (images.shape[1], images.shape[2])
        output = network.output.meta["val"]
        self._output_shape = (int(output.shape[1]), *network.network.output_shape(self._shape_yx))
        tensors = {id(tensor): tensor for tensor in network.tensors().values()}.values()
        kept = sum(t.numel() * t.element_size() for t in tensors)
        # Gradients as parameters keep them, their sum over tiles, and one that backward scales or hands on.
        trained = sum(t.numel() * max(4, t.element_size()) for t in tensors if t.requires_grad)
        self._weight_bytes = kept + round((3 + optimiser_state) * trained)
        self._held_bytes = images.present_bytes + images.cache_bytes
        if on_cluster:
            # A worker has the network, at first as it was sent too, and the step's weights as they were sent and as
            # they are; of gradients those of a tile, their sum over a group, four sums that wait for each other
            # (`fold_tree`), and one on its way.
            self._weight_bytes = max(self._weight_bytes, 4 * kept + 7 * trained)
            # Images in memory come with each step.
            self._held_bytes += images.present_bytes + (images.cache_bytes if images.present_bytes else 0)
        if keep_output:
            self._held_bytes += 2 * prod(self._output_shape) * output.dtype.itemsize
        there = process_bytes() - kept - images.present_bytes
        self._process_bytes = max(PROCESS_BYTES, there + WARM_UP_BYTES)
        self._axes = network.network.on_image(self._shape_yx)
        self._overlaps: dict[int, float] = {}
        self._known: dict[int, tuple[list[Interval], list[Interval]]] = {}

    def sides(self, wanted: Sequence[int] | None) -> list[int]:
        """Of cores, the largest first: the whole output too, where it is small."""
        whole = max(self._output_shape[1:])
        most = max(wanted or SIDES)
        return [*([whole] if whole <= most else []), *(side for side in wanted or SIDES if side < whole)]

    def _parts(self, axis: int, side: int) -> list[Interval]:
        """Of cores along an axis, those that may need most: at both edges, where padding is copied, and of the longest
        window."""
        extent = self._output_shape[1 + axis]
        starts = range(0, extent, side)
        if self._images.is_sampled and side < extent:
            # Every place within a period of the network, away from the edges, where windows are whole.
            middle = (extent - side) // 2
            starts = [0, *range(middle, min(middle + self._network.network.stride[axis], extent - side)), extent - side]
        parts = [Interval(start=at, stop=min(at + side, extent)) for at in starts]
        longest = max(parts, key=lambda part: (compute_geometry(self._axes[axis], part).window.length, part.length))
        return list(dict.fromkeys((longest, parts[0], parts[-1])))

    def parts(self, side: int) -> tuple[list[Interval], list[Interval]]:
        """`_parts` along height and width."""
        if side not in self._known:
            self._known[side] = (self._parts(0, side), self._parts(1, side))
        return self._known[side]

    def overlap(self, side: int) -> float:
        """Work of a forward pass over all tiles of a grid, relative to that of the whole image."""
        if side not in self._overlaps:
            network = self._network.network
            (rows, by_row), (columns, by_column) = (
                compute_program_spans(network, axis, self._shape_yx, side, Interval(start=0, stop=extent))
                for axis, extent in enumerate(self._output_shape[1:])
            )
            bare = network.count_flops(network.padded_shape(self._shape_yx))
            work = count_program_flops(network, rows, columns, by_row, by_column)
            self._overlaps[side] = work / bare if bare else 1.0
        return self._overlaps[side]

    def try_side(self, side: int, cuts: tuple[int, ...] | None) -> _Candidate:
        """A side with what its largest tile needs; None: with the cuts that need least."""
        rows, columns = self.parts(side)

        def count(row: Interval, column: Interval, cuts: tuple[int, ...]) -> int:
            return count_tile_bytes(self._network, self._shape_yx, Window.from_intervals(row, column), cuts)

        if cuts is None:
            geometries = (
                compute_geometry(axis, part) for axis, part in zip(self._axes, (rows[0], columns[0]), strict=True)
            )
            shapes = program_shapes(self._network.network.graph, self._network.network.pixels, *geometries)
            cuts = choose_cuts(self._network.order, shapes, partial(count, rows[0], columns[0]))
        # What an edge costs along one axis does not depend on the place along the other.
        row = max(rows, key=lambda part: count(part, columns[0], cuts)) if len(rows) > 1 else rows[0]
        return _Candidate(side=side, cuts=cuts, tile_bytes=max(count(row, column, cuts) for column in columns))

    def largest(self, sides: Sequence[int], budget: int, cuts: tuple[int, ...] | None) -> _Candidate | None:
        """The largest of the sides that keeps the budget, by bisection; None for cuts: with those that need least."""
        best: _Candidate | None = None
        low, high = 0, len(sides)
        while low < high:
            middle = (low + high) // 2
            tried = self.try_side(sides[middle], cuts)
            if self.predict(tried).total_bytes <= budget:
                best, high = tried, middle
            else:
                low = middle + 1
        return best

    def predict(self, candidate: _Candidate) -> TrainingMemory:
        return TrainingMemory(
            process_bytes=self._process_bytes,
            weight_bytes=self._weight_bytes,
            tile_bytes=predict_tile_bytes(candidate.tile_bytes),
            held_bytes=self._held_bytes,
        )

    def explain_refusal(self, side: int, budget: int, cuts: tuple[int, ...] | None) -> str:
        """What the budget must be for a side, and what would help."""
        needed = self.predict(min((self.try_side(side, c) for c in {cuts, cuts or ()}), key=lambda c: c.tile_bytes))
        fitting = self.largest([s for s in SIDES if s < side], budget, cuts or ())
        smaller = f", or a core of {fitting.side} px" if fitting else ""
        # Rounded up, so that the number that is named suffices.
        enough = format_bytes(needed.total_bytes + 5 * (MB if needed.total_bytes >= 1e9 else MB // 10))
        return (
            f"memory must be at least {enough} for cores of {side} px ({needed}), got {format_bytes(budget)}; give as "
            f"much{smaller}"
        )

    def plan(self, chosen: _Candidate, budget: int | None) -> TrainPlan:
        rows, columns = self.parts(chosen.side)
        largest = Window.from_intervals(rows[0], columns[0])
        return TrainPlan(
            image_shape=self._images.shape,
            output_shape=self._output_shape,
            core=(chosen.side, chosen.side),
            cuts=chosen.cuts,
            memory=None if budget is None else self.predict(chosen),
            memory_budget_bytes=budget,
            overlap=self.overlap(chosen.side),
            largest_window=self._network.program(self._shape_yx, largest, self._network.tensors()).window.shape,
        )
