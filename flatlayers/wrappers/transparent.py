"""A wrapper with the attributes of the layer inside."""

from typing import Any

from ..core.composite import Wrapper
from ..layers.fields import AnyLayer


class Transparent(Wrapper):
    """A wrapper that can stand for its layer where others ask for it: `wrapper.out_dims` is the layer's."""

    layer: AnyLayer

    def __getattr__(self, name: str) -> Any:
        # Not what Python, JAX and others ask every object for, some of them before it has its fields.
        if name.startswith("_") or "layer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.layer, name)
