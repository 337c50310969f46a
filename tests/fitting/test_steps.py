"""The compiled steps: optimisers that need more than gradients, metrics, states that change their type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from flatlayers.fitting import run, steps
from flatlayers.fitting.data import OneBatch
from flatlayers.vectors.record import as_record
from tests.helpers import assert_close, assert_same, compiled_by_default


RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(12, 6))
TARGET = RNG.normal(size=12)
PS = fl.ComponentVector.of({"a": np.zeros(4), "b": np.zeros(2)}, dtype=float)


pytestmark = pytest.mark.usefixtures("_standard")


def squares(ps, st, batch):
    """A least-squares problem, solved by `np.linalg.lstsq`."""
    return ((jnp.asarray(MATRIX) @ ps.data - TARGET) ** 2).sum(), st


def train(loss, ps=PS, st=None, optimizer=None, data=None, **options):
    optimizer = optax.sgd(0.01) if optimizer is None else optimizer
    options = {"progress": False, "steps": 5, "chunk": 2, **options}
    return fl.train_loop(loss, ps, st or {}, optimizer, data, **options)


# Optimisers


@pytest.mark.parametrize("wrap", [lambda o: o, fl.per_leaf])
def test_lbfgs_finds_the_solution(wrap):
    result = train(squares, optimizer=wrap(optax.lbfgs()), steps=30, chunk=7)
    expected, *_ = np.linalg.lstsq(MATRIX, TARGET)
    assert_close(result.ps.data, expected, rtol=1e-6, atol=1e-8)


def test_lbfgs_sees_the_batch_and_the_state():
    def loss(ps, st, target):
        return ((ps.data - target * st.scale) ** 2).sum(), {"scale": st.scale}

    result = train(loss, st={"scale": 2.0}, optimizer=optax.lbfgs(), data=np.arange(6.0), steps=20)
    assert_close(result.ps.data, 2.0 * np.arange(6), rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(),
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=2, factor=0.5)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        optax.apply_if_finite(optax.lbfgs(), 3),
        fl.per_leaf(optax.polyak_sgd()),
    ],
)
def test_against_the_steps_by_hand(optimizer):
    found = train(squares, optimizer=optimizer, steps=12, chunk=5)
    ps, state, losses = PS, optimizer.init(PS), []
    for _ in range(12):
        value, gradient = jax.value_and_grad(lambda ps: squares(ps, {}, None)[0])(ps)
        updates, state = optax.with_extra_args_support(optimizer).update(
            *(gradient, state, ps),
            value=value,
            grad=gradient,
            value_fn=lambda ps: squares(ps, {}, None)[0],
        )
        ps = optax.apply_updates(ps, updates)
        losses.append(value)
    assert_close((found.ps.data, found.losses), (ps.data, np.array(losses)), rtol=1e-8)


def test_a_plateau_lowers_the_rate():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2, factor=0.5))
    result = train(lambda ps, st, _: (1.0 + 0 * ps.data.sum(), st), optimizer=optimizer, steps=9)
    assert float(result.opt_state[-1].scale) < 1.0


def test_an_optimiser_of_ones_own_without_further_arguments():
    class Plain:
        def init(self, params):
            return ()

        def update(self, updates, state, params=None):
            return jax.tree.map(lambda g: -0.01 * g, updates), state

    assert_close(train(squares, optimizer=Plain()).ps.data, train(squares).ps.data)


def test_new_parameters_are_written_in_the_place_of_the_old():
    """A step needs room for a gradient, and for no copy of the parameters."""
    model, optimizer = fl.Chain(*[fl.Dense(32, 32, jnp.tanh) for _ in range(12)]), optax.adam(1e-3)
    ps, st = fl.setup(jax.random.key(0), model)

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        return jnp.mean(y**2), st

    program = steps.Steps(loss, optimizer, lambda data, i: data)
    carry = steps.Carry(ps, as_record(st), optimizer.init(ps), (ps, as_record(st)))
    compiled = compiled_by_default(program.in_place.lower(carry, jnp.ones((2, 32), jnp.float32), 0, 10, 10))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 4 * ps.data.nbytes
    assert memory.temp_size_in_bytes < 1.3 * ps.data.nbytes, memory.temp_size_in_bytes / ps.data.nbytes


# The loss


def test_metrics(capsys):
    def loss(ps, st, x):
        return (ps.a * x).sum(), (st, {"mean of x": x.mean(), "above": (x > 2).sum()})

    batches = [np.full(4, float(i)) for i in range(5)]
    seen = []
    result = train(
        loss, data=batches, progress=True, callback=lambda step, value, ps, st, metrics: seen.append(metrics)
    )
    assert result.metrics["mean of x"].tolist() == [0, 1, 2, 3, 4]
    assert result.metrics["above"].tolist() == [0, 0, 0, 4, 4]
    assert seen == [
        {"mean of x": 0.5, "above": 0.0},
        {"mean of x": 2.5, "above": 2.0},
        {"mean of x": 4.0, "above": 4.0},
    ]
    assert "mean of x=4" in capsys.readouterr().err
    assert train(squares).metrics == {}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda ps, st, _: ps.data.sum(),
            r"to return \(value, st\) or .*, found float64\[\]",
        ),
        (lambda ps, st, _: (ps.data.sum(), st, {}), r"or \(value, \(st, metrics\)\), found \("),
        (lambda ps, st, _: (ps.data, st), r"the loss to be one floating number, found float64\[6\]"),
        (lambda ps, st, _: (jnp.array(1), st), r"the loss to be one floating number, found int64\[\]"),
        (lambda ps, st, _: (ps.data.sum(), (st, 3.0)), "metrics as a mapping of numbers, found 3.0"),
        (
            lambda ps, st, _: (ps.data.sum(), (st, {"a": ps.data})),
            r"mapping of numbers, found {a: float64\[6\]}",
        ),
    ],
)
def test_what_a_loss_does_not_return(loss, message):
    with pytest.raises(TypeError, match=message):
        train(loss)


# The state


@pytest.mark.parametrize(
    ("st", "change", "expected"),
    [
        ({"n": 0}, lambda st: {"n": st.n + 1}, 5),
        ({"n": 0}, lambda st: {"n": st.n + 1.0}, 5.0),
        ({"n": jnp.zeros((), jnp.int8)}, lambda st: {"n": st.n + jnp.ones((), jnp.int64)}, 5),
        ({}, lambda st: {"n": (st.n if "n" in st else jnp.zeros(())) + 1}, 5),
        ({"n": None}, lambda st: {"n": (0.0 if st.n is None else st.n) + 1}, 5),
        ({"n": 1, "old": 0}, lambda st: {"n": st.n + 1}, 6),
        ({"n": np.zeros(2)}, lambda st: {"n": jnp.zeros(3) + st.n[0] + 1}, 5),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_state_that_settles_in_the_first_step(st, change, expected, chunk):
    result = train(lambda ps, st, _: (squares(ps, st, _)[0], change(st)), st=st, chunk=chunk, data=None)
    assert np.all(np.asarray(result.st.n) == expected)
    assert_close(result.ps.data, train(squares).ps.data)
    assert result.losses.shape == (5,)
    assert result.step == 5


@pytest.mark.long
def test_a_layer_whose_first_call_makes_its_state(key):
    model = fl.StatefulRecurrentCell(fl.RNNCell(2, 3))
    ps, st = fl.setup(key, model, float)
    x = np.random.default_rng(0).normal(size=(4, 5, 2))

    def loss(ps, st, x):
        y, st = model(x, ps, st)
        return (y**2).mean(), st

    found = train(loss, ps, st, data=list(x), steps=4, optimizer=optax.sgd(0.1))
    for batch in x:
        (_, st), gradient = jax.value_and_grad(loss, has_aux=True)(ps, st, batch)
        ps = ps - 0.1 * gradient
    assert_close(found.ps.data, ps.data)
    assert_close(found.st, st)


def test_states_that_never_settle():
    with pytest.raises(
        TypeError, match=r"from the second step on, found n: float64\[2\] before and float64\[3\] after"
    ) as info:
        train(
            lambda ps, st, _: (ps.data.sum(), {"n": jnp.concatenate([st.n, jnp.ones(1)])}),
            st={"n": np.ones(1)},
        )
    assert info.value.result.step == 1
    with pytest.raises(
        TypeError,
        match=r"does not take in the second step: n: float64\[\] before and nothing after",
    ):
        train(lambda ps, st, _: (ps.data.sum() * st.n, {}), st={"n": 1.0})


def test_a_state_that_the_loss_does_not_take_is_told_by_its_path():
    def loss(ps, st, _):
        mean = jnp.dot(st.layer_1.mean, jnp.ones(3))
        return ps.data.sum() + mean, {
            "layer_0": st.layer_0,
            "layer_1": {"mean": jnp.ones((5, 3))},
        }

    with pytest.raises(TypeError) as info:
        train(loss, st={"layer_0": {"mean": jnp.ones(2)}, "layer_1": {"mean": jnp.ones(3)}})
    assert str(info.value).endswith(
        "found one that the loss does not take in the second step: layer_1.mean: float64[3] before and "
        "float64[5,3] after"
    )
    assert info.value.__cause__ is not None
    assert info.value.result.step == 1


def test_not_finite_after_a_first_step_alone():
    def loss(ps, st, _):
        return jnp.where(st.n > 0, jnp.nan, ps.data.sum()), {"n": st.n + 1.0}

    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(fl.NonFiniteLossError, match="nan in step 1") as info,
    ):
        train(loss, st={"n": 0})
    assert_same(info.value.ps, PS)
    assert info.value.st.n.dtype == int
    assert info.value.losses.tolist() == [0.0]


def test_large_vectors_are_trained_in_place(monkeypatch):
    beside = train(squares, optimizer=optax.adam(0.1))
    monkeypatch.setattr(run, "_SMALL_BYTES", 0)
    in_place = train(squares, optimizer=optax.adam(0.1))
    assert_same((beside.ps, beside.opt_state), (in_place.ps, in_place.opt_state))
    # What is given up is written to: of the vector, the two moments and the parameters before.
    optimizer = optax.adam(0.1)
    carry = steps.Carry(PS, fl.Record(), optimizer.init(PS), (PS, fl.Record()))
    program = steps.compiled_steps(squares, optimizer, OneBatch.pick)
    lowered = program.in_place.lower(carry, None, 0, 5, 5)
    assert lowered.as_text().count("tf.aliasing_output") + lowered.as_text().count("jax.buffer_donor") >= 4
