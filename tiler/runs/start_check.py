"""The start check carried out: workers compute patches as tiles, this process by the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
from distributed import Client

from ..base.dtypes import stored_dtype
from ..base.errors import RasterError
from ..base.geometry import Window
from ..output.values import as_stored
from ..planning.check_windows import sample_patches
from .check import StartCheck, compare_patches, relative_tolerance
from .reference import ComputedPatch, Reference
from .worker import RunSpec, check_tiles

Array = npt.NDArray[Any]

CHECK_ATTEMPTS = 4
"""Sets of tiles that the start check tries where the raster cannot be read in the first ones."""


def run_start_check(
    client: Client,
    spec: RunSpec,
    reference: Reference,
    computed_by_tiles: Callable[[list[ComputedPatch]], None] | None = None,
) -> StartCheck:
    """Compare patches that workers compute as tiles with the reference: the module in larger windows, or programs of
    other cores by torch; of a network in few bits that network itself in larger windows.

    Args:
        computed_by_tiles: gets what the workers made of the patches.

    Raises:
        RasterError: none of several tiles can be read.
    """
    failure: RasterError | None = None
    for attempt in range(CHECK_ATTEMPTS):
        patches = sample_patches(spec.plan, attempt)
        key = f"start-check-{spec.run_id}-{attempt}"
        future = client.submit(check_tiles, spec.run_id, patches, key=key, pure=False)
        expected: list[tuple[Array, Array] | None] = []
        reader = spec.raster.open_reader()
        try:
            for index, patch in enumerate(patches):
                try:
                    expected.append(reference.run(reader, patch.window, index % 2))
                except RasterError as error:
                    reader.close()
                    failure, reader = error, spec.raster.open_reader()
                    expected.append(None)
        finally:
            reader.close()
        computed: list[tuple[Array, Array] | None] = future.result()
        both = [
            (patch, (*ours, *theirs))
            for patch, ours, theirs in zip(patches, computed, expected, strict=True)
            if ours is not None and theirs is not None
        ]
        if both:
            _require_storable(reference, [(patch.window, pair[0]) for patch, pair in both])
            tiles = len({(patch.row, patch.column) for patch, _ in both})
            if computed_by_tiles is not None:
                computed_by_tiles([(patch.window, pair[:2]) for patch, pair in both])
            return compare_patches(
                [pair for _, pair in both],
                tiles=tiles,
                has_logits=reference.network.has_logits,
                by=reference.by,
                relative=relative_tolerance(spec.plan.precision),
            )
    raise RasterError(f"no tile of {CHECK_ATTEMPTS} sets can be read for the start check; {failure}")


def _require_storable(reference: Reference, finished: list[tuple[Window, Array]]) -> None:
    """See that class numbers can be stored, before anything is written.

    Raises:
        OutputError: one that cannot.
    """
    if all(stored_dtype(result.dtype) == result.dtype for _, result in finished):
        return
    reader = reference.raster.open_reader()
    try:
        for window, result in finished:
            as_stored(result.copy(), reference.find_missing(reader, window))
    except RasterError:
        return  # each tile is looked at again when it is written
    finally:
        reader.close()
