"""The numbers of a vector that is drawn in pieces are those of one that is drawn whole."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import flatlayers as fl
from flatlayers import initializers as init
from flatlayers.core import drawing, setup
from flatlayers.core.drawing import Keys, fold_in_name
from tests.helpers import assert_same


KINDS = ("zeros", "ones", "uniform", "normal", "truncated_normal", "orthogonal", "sparse")
FANS = ("glorot_uniform", "glorot_normal", "kaiming_uniform", "kaiming_normal")


def of_its_own(key, shape, dtype):
    return 1 + jax.random.uniform(key, shape, dtype)


MODELS = {
    "network": fl.Chain(fl.Dense(30, 70, jnp.tanh), fl.Dense(70, 30), fl.Dense(30, 1)),
    "initializers": {f"of_{name}": fl.Param((41, 33), getattr(init, name)) for name in (*KINDS, *FANS)},
    "shapes": {
        "a": fl.Param((100, 7, 3), init.normal),
        "b": fl.Param((), init.ones),
        "c": fl.Param((0, 3), init.ones),
    },
    "stacks": {
        "blocks": fl.Stacked({"w": fl.Param((12, 12), init.uniform), "b": fl.Param((3,), init.ones)}, 7),
        "nested": fl.Stacked(
            {
                "inner": fl.Stacked({"w": fl.Param((9, 9), init.uniform), "b": fl.Param((3,), init.ones)}, 3),
                "numbers": fl.Stacked(fl.Param((5,), init.uniform), 2),
                "large": fl.Param((2000,), init.uniform),
            },
            4,
        ),
        "none": fl.Stacked(fl.Dense(2, 2), 0),
    },
    "bounds": {
        "own": fl.Param((1500,), of_its_own, bounds=(0, None)),
        "cut": fl.Param((1500,), init.uniform(scale=0.5), bounds=(-1, 1)),
    },
    "ties": fl.share_parameters(
        fl.Chain(fl.Dense(40, 40), fl.Dense(40, 40), fl.Dense(40, 40)), {"layer_2": "layer_0"}
    ),
    "fans": {"w": fl.Param((30, 50), init.glorot_normal, fan_in=3, fan_out=4)},
}


def in_pieces(monkeypatch, piece=1000):
    monkeypatch.setattr(setup, "LARGE", 0)
    monkeypatch.setattr(drawing, "PIECE", piece)


SLOW = pytest.mark.slow
DTYPES = [jnp.float64, pytest.param(jnp.float32, marks=SLOW), pytest.param(jnp.bfloat16, marks=SLOW)]


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_in_pieces_and_whole(monkeypatch, key, model, dtype):
    whole = fl.initial_parameters(key, model, dtype)
    in_pieces(monkeypatch)
    assert_same(fl.initial_parameters(key, model, dtype), whole)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2,), pytest.param((2, 1), marks=SLOW)])
def test_an_ensemble_in_pieces_and_whole(monkeypatch, key, shape):
    keys, model = jax.random.split(key, shape), MODELS["stacks"]
    whole = fl.initial_parameters(keys, model)
    in_pieces(monkeypatch)
    assert_same(fl.initial_parameters(keys, model), whole)


@pytest.mark.parametrize("name", ["uniform", "truncated_normal", "normal", "glorot_normal", "constant"])
def test_complex_numbers_in_pieces(monkeypatch, key, name):
    model = {"w": fl.Param((50, 60), getattr(init, name))}
    whole = fl.initial_parameters(key, model, jnp.complex128)
    in_pieces(monkeypatch)
    assert_same(fl.initial_parameters(key, model, jnp.complex128), whole)


def test_a_generator_without_counters_in_pieces(monkeypatch):
    key, model = (
        jax.random.key(0, impl="rbg"),
        {"w": fl.Param((50, 60), init.normal), "b": fl.Param((), init.ones)},
    )
    whole = fl.initial_parameters(key, model)
    in_pieces(monkeypatch)
    assert_same(fl.initial_parameters(key, model), whole)


def test_a_parameter_is_drawn_in_pieces_of_few_numbers(monkeypatch, key):
    """None of them is as large as the parameter."""
    sizes = []
    write = setup.write_rows
    in_pieces(monkeypatch)
    monkeypatch.setattr(
        setup, "write_rows", lambda data, rows, starts: sizes.append(rows.size) or write(data, rows, starts)
    )
    fl.initial_parameters(
        key, {"w": fl.Param((50, 60), init.normal), "s": fl.Stacked(fl.Param((300,), init.ones), 7)}
    )
    assert sizes == [1000, 1000, 1000, 900, 900, 300]


def test_the_error_names_the_parameter_that_cannot_be_drawn(monkeypatch, key):
    def wrong(key, shape, dtype):
        raise RuntimeError("no")

    for model in ({"a": fl.Param((3,), wrong)}, {"a": fl.Stacked(fl.Param((3,), wrong), 2)}):
        with pytest.raises(RuntimeError) as error:
            fl.initial_parameters(key, model)
        assert "in the initial value of the parameter 'a'" in error.value.__notes__
    in_pieces(monkeypatch)
    with pytest.raises(RuntimeError) as error:
        fl.initial_parameters(key, {"a": fl.Param((3,), wrong)})
    assert "in the initial value of the parameter 'a'" in error.value.__notes__
    with pytest.raises(ValueError, match="'a': expected values inside of"):
        fl.initial_parameters(key, {"a": fl.Param((3,), init.ones, bounds=(2, None))})


def test_keys_are_folded_once(key, monkeypatch):
    folds = []
    fold = drawing._folded
    monkeypatch.setattr(drawing, "_folded", lambda key, last: folds.append(last) or fold(key, last))
    keys = Keys(key)
    assert_same(keys.of(("a", "b")), fold_in_name(fold_in_name(key, "a"), "b"))
    assert_same(
        keys.of(("a", 2)), jax.vmap(lambda i: jax.random.fold_in(fold_in_name(key, "a"), i))(jnp.arange(2))
    )
    assert folds == ["a", "b", 2]


MEMORY = """
import jax, resource
import flatlayers as fl
def model(n):
    return {"a": fl.Param((n, 1000, 1000), fl.initializers.INIT), "b": fl.Param((3,), fl.initializers.ones)}
fl.initial_parameters(jax.random.key(0), model(5)).data.block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ps = fl.initial_parameters(jax.random.key(0), model(50))
ps.data.block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / ps.data.nbytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glorot_uniform", "normal"])
def test_beside_the_vector_there_is_little(name):
    """One leaf that is nearly all of it, 200 MB: at most 1.8 vectors."""
    script = MEMORY.replace("INIT", name)
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.8
