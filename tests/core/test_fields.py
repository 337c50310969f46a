import inspect
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.core.fields import (
    Count,
    Finite,
    Flag,
    Fraction,
    Function,
    Integer,
    NonNegative,
    Positive,
    Size,
    check_module_fields,
    checked,
)


class Smooth(fl.Layer):
    width: Size
    rate: Positive = 0.5
    padding: Size | tuple[Size, ...] | None = None
    kind: Literal["mean", "sum"] = "mean"
    activation: Function | None = None
    free: float = 0.0

    def forward(self, x, ps, st):
        return x, st


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.int8(3), np.uint16(3), np.array(3), jnp.array(3)], ids=repr
)
def test_integers_of_all_kinds_become_python_integers(value):
    layer = Smooth(value, padding=[value, 2])
    assert type(layer.width) is int
    assert layer == Smooth(3, padding=(3, 2))


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int32(2), jnp.float64(2)], ids=repr)
def test_numbers_of_all_kinds_become_python_floats(value):
    layer = Smooth(1, rate=value)
    assert type(layer.rate) is float
    assert layer == Smooth(1, rate=2.0)


@pytest.mark.parametrize(
    ("annotation", "value", "kind", "expected"),
    [
        (Size, 2.5, ValueError, "an integer of at least 1, found 2.5"),
        (Size, 2.0, ValueError, "an integer of at least 1, found 2.0"),
        (Size, 0, ValueError, "an integer of at least 1, found 0"),
        (Size, True, TypeError, "an integer of at least 1, found True"),
        (Size, "3", TypeError, ", found '3'"),
        (Size, None, TypeError, ", found None"),
        (Size, jnp.ones(2, int), TypeError, r", found int64\[2\]"),
        (Count, -1, ValueError, "an integer of at least 0, found -1"),
        (Integer, float("nan"), ValueError, "an integer, found nan"),
        (Finite, float("inf"), ValueError, "a finite number, found inf"),
        (Finite, np.float32("nan"), ValueError, "a finite number, found"),
        (Finite, "1.0", TypeError, "a finite number, found '1.0'"),
        (Finite, 1j, TypeError, "a finite number, found 1j"),
        (Finite, True, TypeError, "a finite number, found True"),
        (Positive, 0.0, ValueError, "a finite number above 0, found 0.0"),
        (NonNegative, -1e-30, ValueError, "a finite number of at least 0, found -1e-30"),
        (Fraction, 1.5, ValueError, "of at least 0 and of at most 1, found 1.5"),
        (Flag, 1, TypeError, "True or False, found 1"),
        (Function, fl.Dense, TypeError, "a function, found <class"),
        (Function, "relu", TypeError, "a function, found 'relu'"),
        (Literal["a", "b", "c"], "d", ValueError, "'a', 'b' or 'c', found 'd'"),
        (Literal[1], True, ValueError, "1, found True"),
        (Size | None, 0, ValueError, "an integer of at least 1 or None, found 0"),
        (Size | str, [1], TypeError, "an integer of at least 1 or a str, found"),
        (tuple[Size, Size], (1,), ValueError, "a tuple of 2, each part an integer of at least 1, found"),
        (tuple[Size, ...], (1, 0), ValueError, "a tuple, each part an integer of at least 1, found"),
        (tuple[Size, ...], 1, TypeError, "a tuple, each part"),
    ],
)
def test_bad_values(annotation, value, kind, expected):
    with pytest.raises(kind, match=f"steps: expected .*{expected}"):
        checked(annotation, "steps", value)


def test_a_traced_number_is_told():
    with pytest.raises(TypeError, match=r"rate: expected a finite number, found a traced float64\[\]"):
        jax.jit(lambda x: checked(Finite, "rate", x))(1.0)


def test_a_field_is_checked_when_it_is_assigned():
    with pytest.raises(ValueError, match=r"Smooth.width: expected an integer of at least 1, found 2.5"):
        Smooth(2.5)
    with pytest.raises(ValueError, match=r"Smooth.rate: expected a finite number above 0, found nan"):
        Smooth(1, rate=float("nan"))
    with pytest.raises(ValueError, match=r"Smooth.kind: expected 'mean' or 'sum', found 'max'"):
        Smooth(1, kind="max")

    class Smoother(Smooth):
        more: Size = 1

        def __init__(self, more):
            super().__init__(2)
            self.more = more

    with pytest.raises(ValueError, match=r"Smoother.more: .*found -1"):
        Smoother(-1)
    assert Smoother(np.int32(4)).more == 4


def test_annotations_without_a_check_take_everything():
    assert Smooth(1, free="anything").free == "anything"
    assert checked(int, "n", 2.5) == 2.5
    assert checked(Size | Literal["same"], "padding", "same") == "same"
    assert checked("Size", "n", 2.5) == 2.5


def test_annotations_that_are_strings():
    class Text(fl.Layer):
        width: "Size"
        unknown: "NotThere" = None  # noqa: F821

    with pytest.raises(ValueError, match="Text.width"):
        Text(0)


def test_fields_of_other_classes():
    class Solver(eqx.Module):
        rtol: Positive
        history: Size = 5

        def __check_init__(self):
            check_module_fields(self)

    assert Solver(1e-3, np.int64(3)).history == 3
    with pytest.raises(ValueError, match="Solver.rtol: expected a finite number above 0, found -1"):
        Solver(-1)
    with pytest.raises(ValueError, match="Solver.history: expected an integer of at least 1, found 0"):
        Solver(1e-3, 0)


def test_signatures_show_no_functions_of_checks():
    text = str(inspect.signature(fl.BatchNorm))
    assert "Annotated[int, Check('an integer of at least 1')]" in text
    for name in fl.__all__ if hasattr(fl, "__all__") else dir(fl):
        layer = getattr(fl, name)
        if isinstance(layer, type) and issubclass(layer, fl.Layer):
            assert "accept" not in str(inspect.signature(layer))
