"""Windows that move over spatial axes, as those of convolutions and pools."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..core.fields import Count
from .fields import Sizes
from .shapes import per_axis


@dataclasses.dataclass(frozen=True)
class SamePad:
    """A value of `pad`: as much as keeps the spatial sizes when the stride is 1.

    With a stride, `Conv` and the pools give `ceil(size / stride)` and `ConvTranspose` gives
    `size * stride`. Of an odd total the low end gets one more than the high end.

    >>> import jax.numpy as jnp
    >>> import flatlayers as fl
    >>> fl.output_shape(fl.Conv((4, 5), 3, 7, stride=2, pad=fl.SamePad()), jnp.ones((9, 10, 3)))
    (5, 5, 7)
    """


Counts = Count | tuple[Count, ...]
Pad = Count | tuple[Count, ...] | SamePad


class Windows(NamedTuple):
    """The places of windows on the spatial axes, with an entry for each of them."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def span(self) -> tuple[int, ...]:
        return spans(self.size, self.dilation)

    def check(self, sizes: Sequence[int], what: str) -> None:
        """Raise unless a window fits into the padded spatial sizes."""
        padded = tuple(n + low + high for n, (low, high) in zip(sizes, self.pads, strict=True))
        if any(n < span for n, span in zip(padded, self.span, strict=True)):
            raise ValueError(
                f"expected x to be at least as long as the {what}, which spans {self.span}, "
                f"found {padded} with the padding"
            )


class HasWindows(Protocol):
    """A layer that moves windows over spatial axes."""

    stride: Any
    pad: Pad
    dilation: Sizes


def windows_of(layer: HasWindows, field: str) -> Windows:
    """Return the windows of a layer whose sizes are in a field, with its `stride`, `pad` and `dilation`.

    **Raises:** `ValueError` for other numbers of sizes.
    """
    name, size = type(layer).__name__, getattr(layer, field)
    if not size:
        raise ValueError(f"{name}.{field}: expected one size or more, found {size}")
    stride = per_axis(size if layer.stride is None else layer.stride, len(size), f"{name}.stride")
    dilation = per_axis(layer.dilation, len(size), f"{name}.dilation")
    same = [span - 1 for span in spans(size, dilation)]
    return Windows(size, stride, dilation, paddings(layer.pad, same, f"{name}.pad"))


def spans(size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))


def paddings(pad: Pad, same: Sequence[int], where: str) -> tuple[tuple[int, int], ...]:
    """`pad` as `(low, high)` for each axis; `same` is what `SamePad` adds to each in total."""
    if isinstance(pad, SamePad):
        return tuple((total - total // 2, total // 2) for total in same)
    rank = len(same)
    if isinstance(pad, tuple) and len(pad) == 2 * rank:
        return tuple(zip(pad[::2], pad[1::2], strict=True))
    if isinstance(pad, tuple) and len(pad) != rank:
        raise ValueError(f"{where}: expected an integer, or {rank} or {2 * rank} of them, found {pad}")
    return tuple((n, n) for n in per_axis(pad, rank, where))
