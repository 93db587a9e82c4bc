"""Kinds of files that hold a whole model, by their suffixes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from ....tiler.base.registry import Registry
from ..networks.trust import ModelFile, ModelFileError, Trust

if TYPE_CHECKING:
    from torch import nn

    from ..networks.model import SegmentationModel

_BY_CONTENT = "outsize.models.segmentation.files.whole:WholeNetwork"


class NamedModelKind(Protocol):
    """A class of functions that read the files of one suffix."""

    runs_code: str
    """Why reading such a file could run code, for the refusal of files that are not trusted; "": it cannot."""

    def load(self, file: ModelFile, trust: Trust, key: str | None) -> nn.Module | SegmentationModel:
        """The network of a file, or the model, where the file says bands, scaling and classes too.

        Only `file.data` is read: it is what was hashed. `key` names one of several networks; None: there is one. A file
        that holds none is a ModelFileError.
        """
        ...


KINDS: Registry[Any] = Registry(
    "kind of model file",
    "outsize.model_kinds",
    dict.fromkeys(("json", "safetensors", "pt2", "pt", "pth", "ckpt", "bin", "ts"), _BY_CONTENT),
    protocol=NamedModelKind,
    kind=ModelFileError,
)
"""`NamedModelKind` by suffix, without the dot, in small letters. Files of this package's own suffixes, and of
those that nobody registered, are told apart by what stands in them."""
