"""The reference: patches of a result computed in another way than a run computes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..analysis.graph import bound_of
from ..analysis.network import Network
from ..analysis.program import make_program
from ..base.errors import RasterError
from ..base.geometry import Window
from ..engines.engine import Engine
from ..engines.precision_loss import Pair, PrecisionLoss, compare_with_float32
from ..engines.torch import TorchEngine
from ..output.values import missing_in_output
from ..planning.check_windows import larger_core, larger_window, sample_patches
from ..planning.method import choose_method
from ..planning.plan import TilePlan
from ..rasters.nodata import Array, Mask
from ..rasters.raster import Raster, RasterReader, read_filled
from ..system.machine import one_thread
from .calibration import Sample

ComputedPatch = tuple[Window, tuple[Array, Array]]
"""A patch in output pixels, and its (finished, logits)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Runs the module itself by torch, in larger windows; or programs of larger cores, where windows are not exact."""

    raster: Raster
    plan: TilePlan
    network: Network
    fill: tuple[float, ...]
    engine: Engine | None = None
    """That runs the larger windows, for a network in few bits, of which float32 tells nothing exact; None: torch."""

    @property
    def by(self) -> str:
        """What computes."""
        return "torch" if self.engine is None else f"{self.plan.engine} in {self.plan.precision}"

    def run(self, reader: RasterReader, patch: Window, further: int = 0) -> tuple[Array, Array]:
        """(finished, logits) of a patch, in output pixels; its window begins `further` strides earlier than it would,
        so that a stride that is not the network's shows.

        Raises:
            RasterError: the window cannot be read.
        """
        network = self.network
        if self.engine is None and choose_method(network, None, self.raster.shape_yx) == "program":
            return self._run_program(reader, patch)
        window = larger_window(
            network, patch, self.raster.shape_yx, self.plan.check_margin + further * max(network.stride)
        )
        image = read_filled(reader, self.raster, window, self.fill).image
        top, left = (int(v * s) for v, s in zip((window.y, window.x), network.scale, strict=True))
        y, x = patch.y - top, patch.x - left
        cut = (slice(None), slice(y, y + patch.height), slice(x, x + patch.width))
        if self.engine is not None:
            with one_thread():
                finished, logits = self.engine.run_with_logits(image)
            return finished[cut].copy(), logits[cut].copy()
        with one_thread():  # the workers compute meanwhile
            finished, logits = TorchEngine(network.module, has_logits=network.has_logits).run_with_logits(image)
        return finished[cut], logits[cut]

    def _run_program(self, reader: RasterReader, patch: Window) -> tuple[Array, Array]:
        core = larger_core(self.network, patch, self.raster.shape_yx, self.plan.check_margin)
        program = make_program(self.network, self.raster.shape_yx, core)
        image = read_filled(reader, self.raster, program.window, self.fill).image
        with torch.inference_mode(), one_thread():
            outputs = [output[0].numpy() for output in program(torch.from_numpy(image)[None])]
        cut = (slice(None), *patch.slices(core))
        return outputs[0][cut], outputs[-1][cut]

    def measure_loss(self, held_out: Sequence[Sample]) -> PrecisionLoss:
        """What the engine's network costs against the module in float32: on the start check's patches, and on whole
        windows, each as an image of its own."""
        pairs = itertools.chain(self._patch_pairs(), map(self._compare_sample, held_out))
        return compare_with_float32(
            pairs,
            precision=self.plan.precision,
            has_logits=self.network.has_logits,
            held_out=len(held_out),
            bound=bound_of(self.network.module),
        )

    def measure_tiles(self, patches: Sequence[ComputedPatch]) -> PrecisionLoss:
        """What tiles cost against the module in float32: of what the workers made of the start check's patches."""
        pairs = self._pairs([patch for patch, _ in patches], [computed for _, computed in patches])
        return compare_with_float32(
            pairs,
            precision=self.plan.precision,
            has_logits=self.network.has_logits,
            held_out=0,
            bound=bound_of(self.network.module),
        )

    def _patch_pairs(self) -> Iterator[Pair]:
        return self._pairs([patch.window for patch in sample_patches(self.plan)])

    def _pairs(
        self, windows: Sequence[Window], computed: Sequence[tuple[Array, Array]] | None = None
    ) -> Iterator[Pair]:
        """Patches in few bits, as they were computed or by the engine, and in float32."""
        in_float32, reader = replace(self, engine=None), self.raster.open_reader()
        try:
            for index, window in enumerate(windows):
                try:
                    ours = self.run(reader, window) if computed is None else computed[index]
                    theirs, missing = in_float32.run(reader, window), self.find_missing(reader, window)
                except RasterError:
                    reader.close()
                    reader = self.raster.open_reader()
                    continue
                valid = np.ones(window.shape, np.bool_) if missing is None else ~missing
                yield (*ours, *theirs, valid)
        finally:
            reader.close()

    def _compare_sample(self, sample: Sample) -> Pair:
        assert self.engine is not None
        network = self.network
        finished, logits = (array.copy() for array in self.engine.run_with_logits(sample.image))
        theirs = TorchEngine(network.module, has_logits=network.has_logits).run_with_logits(sample.image)
        window, result = (Window.whole(array.shape[-2:]) for array in (sample.image, finished))
        valid = np.ones(result.shape, np.bool_)
        if sample.missing is not None:
            valid = ~missing_in_output(sample.missing, window, result, network.scale)
        return (finished, logits, *theirs, valid)

    def find_missing(self, reader: RasterReader, patch: Window) -> Mask | None:
        """(height, width) of a patch: where its pixels are nodata; None where none is."""
        network = self.network
        window = larger_window(network, patch, self.raster.shape_yx, 0)
        missing = read_filled(reader, self.raster, window, self.fill).missing
        if missing is None:
            return None
        return missing_in_output(missing, window, patch, network.scale)
