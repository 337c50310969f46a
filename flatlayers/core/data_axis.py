"""The mapped axis over which a loss has its batch divided: known to layers while the loss is traced."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax


_DATA_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("data_axis", default=None)


@contextlib.contextmanager
def data_axis(name: str) -> Iterator[None]:
    """Say, for what is traced inside, that each device sees its part of the batch alone.

    So a layer for which the parts are not as good as the whole can refuse to go on.
    """
    token = _DATA_AXIS.set(name)
    try:
        yield
    finally:
        _DATA_AXIS.reset(token)


def current_data_axis() -> str | None:
    """Return the name of this axis; `None` where a layer sees the whole batch."""
    return _DATA_AXIS.get()


def check_sees_batch(axis_name: str | tuple[str, ...] | None) -> None:
    """Raise if a layer sees a part of the batch, and takes its statistics over other axes, or none."""
    axis = current_data_axis()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis is not None and axis not in names:
        raise ValueError(
            f"expected axis_name={axis!r}, over which the loss has its batch divided, found {axis_name!r}; "
            "each device would normalise by the statistics of its own part"
        )


def parts_of(axis_name: str | tuple[str, ...]) -> int:
    """Return the number of parts of the batch. **Raises:** `ValueError` outside of the mapped axis."""
    try:
        return int(jax.lax.psum(1, axis_name))
    except NameError:
        raise ValueError(
            f"expected a mapped axis for axis_name={axis_name!r}, as of `jax.vmap` or `jax.shard_map`, found "
            "none; a layer that sees the whole batch, as in plain `jax.jit` over several devices, needs no "
            "axis_name"
        ) from None
