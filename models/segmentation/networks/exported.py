"""Exported programs: networks that come without their Python code."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ....tiler.analysis.network import analyze_network
from ....tiler.base.errors import UntileableError
from ....tiler.base.text import first_line
from .finite import require_finite_weights
from .trust import ModelFile, ModelFileError, Trust

_EXPORT_REASON = "torch.export.load unpickles and evaluates parts of it"
_SCRIPT_REASON = "it is a program (TorchScript)"
_REMEDY = (
    "export it from its Python code: "
    "torch.export.export(network, (image,), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))"
)
_EXAMPLE_SIZES = ((331, 293), (448, 320))
"""Primes, so that no size is special; and multiples of 64, for networks that take only those."""
_NO_LIMIT, _LARGEST_SMALLEST = 2**31, 64
"""An upper limit of torch.export from which on it is none; the largest lower limit that a network may have."""
_COMPARED_SIZES = ((64, 128), (192, 64), (67, 83), (130, 33), (7, 5))


class ExportedNetwork(nn.Module):
    """A torch.export program as a network: y = graph(x) at every size that the graph's range constraints allow.

    torch.export's further guards say where the traced Python code might have taken another path. They are left out:
    they speak of no more than the code that is gone, and refuse harmless sizes (a U-Net's crop reads "odd sizes only").

    Shapes: (1, bands, h, w) float -> (1, classes, h, w).
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program
        takes_guards = "check_guards" in inspect.signature(program.module).parameters  # since torch 2.9
        self.graph: nn.Module = program.module(check_guards=False) if takes_guards else program.module()

    @property
    def bands(self) -> int:
        """Input channels."""
        return int(_input_shape(self.program)[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of its input."""
        return _input_value(self.program).dtype

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Nothing: what dropout and norms do was decided at the export."""
        self.training = mode
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and workers get it as torch.export writes it; the program itself holds what cannot be pickled."""
        buffer = io.BytesIO()
        self.save(buffer)
        return _restore, (buffer.getvalue(),)

    def save(self, target: Path | io.BytesIO) -> None:
        """Write the program as torch.export.save does."""
        with _quiet():
            torch.export.save(self.program, target)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)


def _restore(data: bytes) -> ExportedNetwork:
    with _quiet():
        return ExportedNetwork(torch.export.load(io.BytesIO(data)))


def _input_value(program: ExportedProgram) -> Tensor:
    """What stands for the image in the trace."""
    inputs = set(program.graph_signature.user_inputs)
    return next(node.meta["val"] for node in program.graph.nodes if node.name in inputs)


def _input_shape(program: ExportedProgram) -> torch.Size:
    return _input_value(program).shape


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on its own deprecations and on the batch size of 1."""
    log = logging.getLogger("torch")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _require_image_input(program: ExportedProgram, path: Path) -> None:
    inputs = program.graph_signature.user_inputs
    shape = _input_shape(program) if len(inputs) == 1 else torch.Size(())
    if len(shape) != 4:
        raise ModelFileError(f"{path} must take one image (1, bands, height, width), it takes {len(inputs)} inputs")
    batch, bands, height, width = (_is_fixed(extent) for extent in shape)
    if batch and int(shape[0]) != 1:
        raise ModelFileError(f"{path} takes only batches of {shape[0]} images, and one is given at a time; {_REMEDY}")
    if not bands:
        raise ModelFileError(f"{path} must fix the number of bands; {_REMEDY}")
    if height or width:
        raise ModelFileError(f"{path} takes only images of {shape[2]} x {shape[3]}; {_REMEDY}")
    for axis, extent in zip(("height", "width"), shape[2:], strict=True):
        assert isinstance(extent, torch.SymInt)
        for symbol in extent.node.expr.free_symbols & program.range_constraints.keys():
            limits = program.range_constraints[symbol]
            if limits.upper < _NO_LIMIT or limits.lower > _LARGEST_SMALLEST:
                raise ModelFileError(
                    f"{path} was exported for a {axis} of {limits.lower} to {limits.upper} only; "
                    f"remove limits and control flow that depends on sizes, and {_REMEDY}"
                )


def _is_fixed(extent: int | torch.SymInt) -> bool:
    # A size that was a symbol and turned out to have one value keeps the symbol's type.
    return not isinstance(extent, torch.SymInt) or bool(extent.node.expr.is_number)


def load_exported(file: ModelFile, trust: Trust) -> ExportedNetwork:
    """The network that torch.export.save wrote.

    Raises:
        ModelFileError: without leave to run code, a damaged file, or a program of fixed sizes or other inputs.
    """
    trust.require_file(file, _EXPORT_REASON)
    with _quiet():
        try:
            program = torch.export.load(file.open())
        except Exception as error:
            raise ModelFileError(f"{file} cannot be loaded by torch.export.load: {first_line(error)}") from error
    _require_image_input(program, file.path)
    return ExportedNetwork(program)


def export_network(network: nn.Module, bands: int, name: str) -> ExportedNetwork:
    """The network as a program, compared with it at awkward sizes.

    Raises:
        ModelFileError: a network that cannot be exported for every size, with the reason.
    """
    try:
        return ExportedNetwork(analyze_network(network, bands, torch.float32).graph.program)
    except UntileableError as error:
        raise ModelFileError(f"{name} has no factory and cannot be exported: {error}") from error


def load_script(file: ModelFile, trust: Trust) -> ExportedNetwork:
    """A TorchScript archive as a program, if torch's converter knows all of it and both agree at awkward sizes.

    Raises:
        ModelFileError: without leave to run code, or an archive that has no such program.
    """
    path = file.path
    trust.require_file(file, _SCRIPT_REASON)
    with _quiet():
        try:
            script = torch.jit.load(file.open(), map_location="cpu")
        except RuntimeError as error:
            raise ModelFileError(f"{path} cannot be loaded by torch.jit.load: {first_line(error)}") from error
        # The converted form has parameters as buffers, and NaN never agrees with itself.
        require_finite_weights(script, str(path))
        converted = _convert(script, path)
        _require_image_input(converted.program, path)
        for size in _COMPARED_SIZES:
            image = torch.rand((1, converted.bands, *size), generator=torch.Generator().manual_seed(0))
            image = image.to(converted.dtype)
            if not _agree(script, converted, image):
                raise ModelFileError(
                    f"{path} is TorchScript and differs from its own torch.export form at {size[0]} x {size[1]}; "
                    f"{_REMEDY}"
                )
    return converted


def _convert(script: torch.jit.ScriptModule, path: Path) -> ExportedNetwork:
    reason = "it takes no image of as many bands as one of its convolutions"
    kernels = [tensor for tensor in _list_tensors(script) if tensor.dim() == 4 and tensor.is_floating_point()]
    dtype = kernels[0].dtype if kernels else torch.float32
    if dtype in (torch.float16, torch.bfloat16):
        raise ModelFileError(
            f"{path} is TorchScript in {str(dtype).removeprefix('torch.')}, and scaled pixels are float32; call "
            ".float() on the network before it is traced"
        )
    for bands, size in product(dict.fromkeys(kernel.shape[1] for kernel in kernels), _EXAMPLE_SIZES):
        example = torch.zeros((1, bands, *size), dtype=dtype)
        try:
            script(example)
        except Exception:  # noqa: BLE001 - another number of bands, or another size
            continue
        try:
            # The converter that torch.export names when it is given TorchScript; it has no public name.
            from torch._export.converter import TS2EPConverter

            return ExportedNetwork(TS2EPConverter(script, (example,)).convert())
        except Exception as error:  # noqa: BLE001 - whatever it stumbles over is the answer
            reason = first_line(error)
    raise ModelFileError(f"{path} is TorchScript, which torch.export cannot convert ({reason}); {_REMEDY}")


def _list_tensors(script: torch.jit.ScriptModule) -> list[Tensor]:
    """Weights, also where freezing made constants of them."""
    # Held, since nodes die with their graph.
    graph: Any = script.inlined_graph
    constants = [node.t("value") for node in graph.findAllNodes("prim::Constant") if _is_tensor(node)]
    return [*script.state_dict().values(), *constants]


def _is_tensor(constant: Any) -> bool:
    return constant.hasAttribute("value") and constant.kindOf("value") == "t"


def _agree(script: nn.Module, converted: nn.Module, image: Tensor) -> bool:
    """Whether the converted form gives the script's result at this size, or refuses the size."""
    try:
        found = converted(image)
    except Exception:  # noqa: BLE001 - a size that is too small for it; analysis will name it
        return True
    try:
        expected = script(image)
    except Exception:  # noqa: BLE001 - any failure of the user's program is the answer
        return False
    return expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, atol=1e-5)
