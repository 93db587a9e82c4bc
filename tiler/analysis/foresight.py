"""Foresight: what a trace meets that the rules will refuse, so that a long trace ends in that refusal.

A trace of hundreds of operations may take minutes where padding follows sizes; whole-image statistics stand near its
beginning as a rule.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..base.errors import UntileableError
from .rules import WHOLE_IMAGE, find_refusal

PATIENCE_S = 5.0
"""Of this process's computing, for which a trace goes on that has met what will be refused: the rules say it better."""
_REDUCTIONS = frozenset({"amax", "amin", "mean", "prod", "std", "std_mean", "sum", "var", "var_mean"})
"""Whose second argument says over which dimensions."""
_TORCH = Path(torch.__file__).parent


class Foresight(TorchFunctionMode):
    """While it is entered, torch's functions are looked at as the module calls them.

    Raises, from within such a call:
        UntileableError: the trace takes long, and has met an operation that needs the whole image.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._names = {part: name for name, part in module.named_modules() if name}
        self._began = time.process_time()
        self.refusal = ""
        """Of the first such operation; empty: none yet."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if not self.refusal:
            self._look_at(getattr(func, "__name__", ""), args, kwargs)
        elif time.process_time() - self._began > PATIENCE_S:
            raise UntileableError(self.refusal)
        return func(*args, **kwargs)

    def _look_at(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        image = args[0] if args else kwargs.get("input")
        if not isinstance(image, Tensor):
            return
        free = [dim for dim, extent in enumerate(image.shape) if isinstance(extent, torch.SymInt)]
        if not free:
            return
        found = find_refusal(f"aten.{name}")
        if found is None and name in _REDUCTIONS:
            given = kwargs.get("dim", args[1] if len(args) > 1 else None)
            over = given if isinstance(given, (list, tuple)) else [given]
            if any(d is None or (isinstance(d, int) and d % image.ndim in free) for d in over):
                found = WHOLE_IMAGE, "reduce over channels only"
        if found is not None:
            self.refusal = f"aten.{name} in {self._place()} cannot be tiled: {found[0]}; {found[1]}"

    def _place(self) -> str:
        """Which module calls, and from which line of the user's code, as far as the stack tells."""
        module = line = ""
        frame: FrameType | None = sys._getframe()
        while frame is not None and not (module and line):
            code, own = frame.f_code, frame.f_locals.get("self")
            if not module and isinstance(own, nn.Module) and own in self._names:
                module = self._names[own]
            if not line and _TORCH not in Path(code.co_filename).parents and code.co_filename != __file__:
                line = f"{code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return " at ".join(filter(None, (f"module '{module}'" if module else "the top module", line)))
