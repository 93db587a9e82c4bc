"""Agreement: whether the traced graph is the module at every size, tried where they could part.

A trace follows one path through the module's Python code. Branches on the size leave guards; both paths are compared at
sizes on the guard's other side, and at awkward small sizes in any case. Whatever is computed is held against the shapes
that the trace says; larger images are run for their shapes alone, without pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from ..base.errors import UntileableError
from ..base.geometry import align_up
from ..base.text import first_line
from .graph import TracedGraph, operation_name, where
from .sizes import evaluate_at, evaluate_both, expression_of, sample_extents

_SMALL = ((1, 1), (1, 5), (5, 1), (2, 3), (8, 9), (9, 8), (16, 25), (41, 22), (64, 31))
_FEWER = ((1, 1), (1, 5), (5, 1), (2, 3), (4, 3), (3, 4))
"""Where sizes are multiples of 16 and more: the first of those reach further than the last of `_SMALL`, and more of
them would take minutes for what no stride tells apart."""
_MANY_FROM = 16
_NEIGHBOURS = 12
"""Sizes next to each other whose shapes are looked at: every remainder by small strides comes up on both axes."""
_LARGEST_COMPUTED = 1 << 16
"""Pixels of an image up to which it is computed to see its tensors' shapes; larger ones have no pixels."""
_LARGEST_SAMPLE = 1 << 18
"""Pixels of an image that is tried beside the smallest ones, at most."""
_LARGEST_TRIED = 1 << 12
"""Pixels along an axis; a branch that is taken only above this is refused untried."""


def require_agreement(module: nn.Module, graph: TracedGraph, bands: int, dtype: torch.dtype) -> None:
    """Compare module and graph.

    Raises:
        UntileableError: they differ at a size that the network is said to accept, or one of them fails there.
    """
    k = graph.size_multiple
    _require_true_sizes(graph, bands, dtype)
    below = [align_up(smallest, k) - k for smallest in graph.smallest]
    small = _FEWER if k >= _MANY_FROM else _SMALL
    sizes = dict.fromkeys((below[0] + h * k, below[1] + w * k) for h, w in small)
    sizes |= dict.fromkeys(
        size
        for size in _other_sides(graph)
        if all(extent >= smallest for extent, smallest in zip(size, graph.smallest, strict=True))
    )
    for size in sizes:
        image = _random_image(bands, size, dtype)
        try:
            expected = _run_module(module, image)
        except Exception as error:
            raise UntileableError(
                f"the network fails on an image of {size[0]} x {size[1]} ({first_line(error)}), though not on others; "
                "make it accept every size, or those divisible by some number"
            ) from error
        try:
            traced = _run_graph(graph, image)
        except Exception:  # noqa: BLE001 - any failure means another path
            traced = None
        if traced is None or not _same(traced, expected):
            raise UntileableError(
                f"the network takes another path on an image of {size[0]} x {size[1]} than on others; "
                "remove control flow that depends on sizes, and randomness"
            )


def takes_batches(run: Callable[[Tensor], Tensor], bands: int, size: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether images of that size come out together as they do one by one: a module was traced with one, and may join
    several, or fix their number.

    Args:
        run: the module, or its logits.
    """
    image = _random_image(bands, size, dtype)
    images = torch.cat([image, image.flip(2), image.flip(3)])
    try:
        with torch.no_grad():
            return _same(run(images), torch.cat([run(one[None]) for one in images]))
    except Exception:  # noqa: BLE001 - any failure is the answer
        return False


class _Sizes(torch.fx.Interpreter):
    """Runs the graph and holds every tensor's shape against what the trace says of it."""

    def __init__(self, graph: TracedGraph, size: tuple[int, int]) -> None:
        super().__init__(graph.program.graph_module)
        self.traced, self.size = graph, size

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        value = n.meta.get("val")
        if isinstance(value, Tensor) and isinstance(result, Tensor):
            symbols = (self.traced.height, self.traced.width)
            said = [evaluate_at(expression_of(extent), symbols, self.size) for extent in value.shape]
            if said != list(result.shape):
                raise UntileableError(
                    f"{operation_name(n)} in {where(n)} cannot be tiled: on an image of {self.size[0]} x "
                    f"{self.size[1]} it gives {tuple(result.shape)}, where torch.export says {tuple(said)} (as for "
                    "pooling with ceil_mode and padding); pad before it, or leave ceil_mode out"
                )
        return result


def _require_true_sizes(graph: TracedGraph, bands: int, dtype: torch.dtype) -> None:
    """Interval rules believe the sizes that the trace says; torch.export follows one branch of its own in some of them.

    Raises:
        UntileableError: a tensor of another size than the trace says.
    """
    k = graph.size_multiple
    first = [max(40, -(-smallest // k)) for smallest in graph.smallest]
    with_shapes = _ShapeRunner(graph)
    for step in range(_NEIGHBOURS):
        size = ((first[0] + step) * k, (first[1] + 5 * step % _NEIGHBOURS) * k)
        if size[0] * size[1] <= _LARGEST_COMPUTED:
            _run_graph(graph, _random_image(bands, size, dtype))
        else:
            with_shapes.run(bands, size, dtype)


def _random_image(bands: int, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(size[0] * 65537 + size[1])
    image = torch.rand((1, bands, *size), generator=generator, dtype=torch.float64)
    return (image * (100 if not dtype.is_floating_point else 1)).to(dtype)


def _run_module(module: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return module(image.clone())


def _run_graph(graph: TracedGraph, image: Tensor) -> Tensor:
    """The finished result of the traced graph.

    Raises:
        UntileableError: a tensor of another size than the trace says.
    """
    with torch.no_grad():
        return _Sizes(graph, (image.shape[2], image.shape[3])).run(*_graph_inputs(graph, image))[0]


class _ShapeRunner:
    """`_run_graph` by torch's own arithmetic of shapes for images of that very size: tensors without pixels."""

    def __init__(self, graph: TracedGraph) -> None:
        self._graph, self._mode = graph, FakeTensorMode(allow_non_fake_inputs=True)
        self._inputs: list[Any] | None = None

    def run(self, bands: int, size: tuple[int, int], dtype: torch.dtype) -> None:
        with torch.no_grad(), self._mode:
            image = torch.empty((1, bands, *size), dtype=dtype)
            if self._inputs is None:
                self._inputs = [
                    self._mode.from_tensor(value) if isinstance(value, Tensor) and value is not image else value
                    for value in _graph_inputs(self._graph, image)
                ]
            inputs = [
                image if spec.target is None else value
                for spec, value in zip(self._graph.program.graph_signature.input_specs, self._inputs, strict=True)
            ]
            _Sizes(self._graph, size).run(*inputs)


def _graph_inputs(graph: TracedGraph, image: Tensor) -> list[Any]:
    """What the traced graph takes: the image, and every parameter and buffer."""
    program = graph.program
    tensors: dict[str, Any] = {**program.state_dict, **program.constants}
    return [image if spec.target is None else tensors[spec.target] for spec in program.graph_signature.input_specs]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return bool(torch.equal(a, b))
    return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().nan_to_num(0, 0, 0).max()), equal_nan=True))


def _other_sides(graph: TracedGraph) -> Iterator[tuple[int, int]]:
    """For each branch in the user's code, small sizes where it goes the other way than in the trace."""
    environment = graph.input_node.meta["val"].shape[2].node.shape_env
    library = Path(torch.__file__).parent
    extents = sample_extents(graph.size_multiple, min(graph.smallest))
    few = [*extents[:12], *extents[60:70], extents[-1]]
    pairs = [*((n, n) for n in extents), *((a, b) for a in few for b in few)]
    for guard in getattr(environment, "guards", ()):
        frame = getattr(guard.sloc, "framework_loc", None)
        if frame is None or library in Path(frame.filename).parents:
            continue
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        symbols = {graph.height, graph.width}
        if not guard.expr.free_symbols <= symbols:
            raise UntileableError(f"the network branches on pixel values at {place}; remove that control flow")
        other = [(h, w) for h, w in pairs if not evaluate_both(guard.expr, (graph.height, graph.width), (h, w))]
        small = [size for size in other if max(size) <= _LARGEST_TRIED]
        samples = [size for size in small if size[0] * size[1] <= _LARGEST_SAMPLE]
        if other and not small:
            raise UntileableError(
                f"the network takes another path on images above {_LARGEST_TRIED} pixels ({place}); "
                "remove control flow that depends on sizes"
            )
        yield from sorted(small, key=lambda size: size[0] * size[1])[:2]
        yield from samples[-1:]
