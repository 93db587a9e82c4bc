"""The reference: patches of a result computed in another way than a run computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .check import larger_core, larger_window
from .engine_torch import TorchEngine
from .geometry import Window
from .machine import one_thread
from .network import Network
from .nodata import Array, Mask
from .plan import TilePlan
from .planner import choose_method
from .program import make_program
from .raster import Raster, RasterReader, read_filled
from .worker import missing_in_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Runs the module itself by torch, in larger windows; or programs of larger cores, where windows are not exact."""

    raster: Raster
    plan: TilePlan
    network: Network
    fill: tuple[float, ...]

    def run(self, reader: RasterReader, patch: Window, further: int = 0) -> tuple[Array, Array]:
        """(finished, logits) of a patch, in output pixels; its window begins `further` strides earlier than it would,
        so that a stride that is not the network's shows.

        Raises:
            RasterError: the window cannot be read.
        """
        network = self.network
        if choose_method(network, None, self.raster.shape_yx) == "program":
            return self._run_program(reader, patch)
        window = larger_window(
            network, patch, self.raster.shape_yx, self.plan.check_margin + further * max(network.stride)
        )
        image = read_filled(reader, self.raster, window, self.fill).image
        top, left = (int(v * s) for v, s in zip((window.y, window.x), network.scale, strict=True))
        y, x = patch.y - top, patch.x - left
        cut = (slice(None), slice(y, y + patch.height), slice(x, x + patch.width))
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

    def find_missing(self, reader: RasterReader, patch: Window) -> Mask | None:
        """(height, width) of a patch: where its pixels are nodata; None where none is."""
        network = self.network
        window = larger_window(network, patch, self.raster.shape_yx, 0)
        missing = read_filled(reader, self.raster, window, self.fill).missing
        if missing is None:
            return None
        return missing_in_output(missing, window, patch, network.scale)
