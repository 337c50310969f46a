"""Which adjoints can be differentiated in `jax.shard_map`, where each device solves its part of a batch."""

import re
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.sharding import PartitionSpec as P

import flatlayers as fl
from flatlayers.core.data_axis import data_axis
from flatlayers.core.values import plain
from tests.parallel.programs import mesh_of


pytestmark = pytest.mark.long


DEVICES, BATCH = 4, 8
MESH = mesh_of(DEVICES)


def ode(adjoint, **options):
    model = fl.Chain(fl.Dense(2, 5, jnp.tanh), fl.Dense(5, 2))
    # The same steps on all devices, so that the gradient is that of one device to rounding.
    steps = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
    return fl.NeuralODE(model, adjoint=adjoint, **{**steps, **options})


class Pulled(fl.Wrapper):
    """A model of `(z, x)` that pulls `z` to a point of `x`."""

    model: fl.Layer

    def forward(self, x, ps, st):
        z, x = x
        y, st = self.model(z, ps, st)
        return jnp.tanh(0.2 * y + x), st


def deq(adjoint=None, **options):
    return fl.DeepEquilibriumNetwork(
        Pulled(fl.Dense(2, 2)), **{"adjoint": adjoint, "max_steps": 100, **options}
    )


ADAPTIVE = {
    "stepsize_controller": diffrax.PIDController(rtol=1e-6, atol=1e-8),
    "batching": "each",
    "dt0": None,
}
TIGHT = fl.Anderson(1e-10, 1e-10)

WORK = {
    "AdaptiveCheckpointAdjoint": ode(fl.AdaptiveCheckpointAdjoint()),
    "AdaptiveCheckpointAdjoint, adaptive steps": ode(fl.AdaptiveCheckpointAdjoint(), **ADAPTIVE),
    "AdaptiveCheckpointAdjoint, few kept": ode(fl.AdaptiveCheckpointAdjoint(every=3, keep=0)),
    "GaussAdjoint": ode(fl.GaussAdjoint()),
    "GaussAdjoint, adaptive steps": ode(fl.GaussAdjoint(), **ADAPTIVE),
    "diffrax.DirectAdjoint": ode(diffrax.DirectAdjoint(), max_steps=16),
    "diffrax.BacksolveAdjoint": ode(diffrax.BacksolveAdjoint()),
    "DeepEquilibriumNetwork": deq(solver=TIGHT),
    "DeepEquilibriumNetwork, throw": deq(solver=TIGHT, throw=True),
    "DeepEquilibriumNetwork, phantom": deq("phantom", solver=TIGHT),
    "DeepEquilibriumNetwork, fixed depth": deq(fixed_depth=5),
    "SteadyState": deq(solver=fl.SteadyState(rtol=1e-8, atol=1e-8)),
}

FAIL = {
    "diffrax.RecursiveCheckpointAdjoint": ode(diffrax.RecursiveCheckpointAdjoint()),
    "unroll": deq("unroll"),
    "optimistix.ImplicitAdjoint": deq(optx.ImplicitAdjoint()),
}


def problem(layer):
    ps, st = fl.setup(jax.random.key(1), layer)
    x = np.random.default_rng(1).normal(size=(BATCH, 2))
    return ps.map(lambda p: p.astype(jnp.float64)), st, jnp.asarray(x)


def gradient(layer, st):
    def loss(ps, x):
        return jnp.mean(layer(x, ps, st)[0] ** 2)

    return jax.grad(loss, argnums=(0, 1))


def on_devices(layer, st):
    def local(ps, x):
        of_ps, of_x = gradient(layer, st)(ps, x)
        return jax.lax.pmean(of_ps, "data"), of_x / DEVICES

    parts = {"in_specs": (P(), P("data")), "out_specs": (P(), P("data")), "check_vma": False}
    return jax.jit(jax.shard_map(local, mesh=MESH, **parts))


# Steps of a constant size tell as much, and compile in a third of the time; diffrax's adjoints are not ours.
SLOW = {name for name in WORK if "adaptive" in name or name.startswith("diffrax.")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WORK]
)
def test_the_gradient_is_that_of_one_device(name):
    layer = WORK[name]
    ps, st, x = problem(layer)
    found, expected = on_devices(layer, st)(ps, x), jax.jit(gradient(layer, st))(ps, x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", FAIL)
def test_the_others_cannot(name):
    """Of these errors none is of ours; if one of them is gone, say so in the table."""
    layer = FAIL[name]
    ps, st, x = problem(layer)
    with pytest.raises((ValueError, TypeError, NotImplementedError)):
        on_devices(layer, st)(ps, x)


# Where the batch of a loss is divided


@pytest.mark.parametrize("name", WORK)
def test_what_can_does(name):
    layer = WORK[name]
    ps, st, x = problem(layer)
    with data_axis("data"):
        jax.eval_shape(gradient(layer, st), ps, x)


@pytest.mark.parametrize("name", FAIL)
def test_what_cannot_says_what_can(name):
    layer = FAIL[name]
    ps, st, x = problem(layer)
    kind = type(plain(layer.adjoint)).__name__ if layer.adjoint != "unroll" else "RecursiveCheckpointAdjoint"
    names = (
        r"fl\.AdaptiveCheckpointAdjoint\(\), fl\.GaussAdjoint"
        if isinstance(layer, fl.NeuralODE)
        else "'phantom'"
    )
    with data_axis("data"), pytest.raises(ValueError, match=f"{names}.* divided over 'data', found .*{kind}"):
        layer(x, ps, st)
    layer(x, ps, st)


@pytest.mark.parametrize(
    "options", [{"max_steps": None}, {"event": diffrax.Event(lambda t, y, args, **_: y[0, 0] > 9)}]
)
def test_a_default_that_cannot_says_why(options):
    layer = ode(None, **options)
    ps, st, x = problem(layer)
    message = "found diffrax.RecursiveCheckpointAdjoint.., the default with an event or without max_steps"
    with data_axis("data"), pytest.raises(ValueError, match=message):
        layer(x, ps, st)


def test_the_table_of_the_docs_is_that():
    text = (Path(fl.__file__).parent.parent / "docs/devices.md").read_text()
    rows = re.findall(r"^\| (.*) \| (yes|no) \|$", text, re.MULTILINE)
    found = {kind: " ".join(row for row, answer in rows if answer == kind) for kind in ("yes", "no")}
    for names, kind in ((WORK, "yes"), (FAIL, "no")):
        for name in names:
            first, _, option = name.partition(", ")
            words = {"DeepEquilibriumNetwork": "of fixed points", "SteadyState": "of fixed points"}
            assert words.get(first, first) in found[kind]
            if first in words and option in ("phantom", "fixed depth"):
                assert option.replace(" ", "_") in found[kind]
