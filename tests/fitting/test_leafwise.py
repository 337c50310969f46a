"""Which optimisers work leaf by leaf, as optax defines them, and what `train_loop` says."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from flatlayers.fitting import leafwise
from flatlayers.fitting.leafwise import differs_by_leaf


@pytest.fixture(autouse=True)
def _as_optax_needs_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


MLP = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.Dense(8, 8, jnp.tanh), fl.Dense(8, 1)).layout
MIXED = fl.Layout({"rate": (), "blocks": fl.Layout({"w": (3, 3), "b": (3,)}).stack(2), "kernel": (3, 2, 4)})


def by_ndim(ps):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, ps)


def by_path(ps):
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" not in jax.tree_util.keystr(path), ps)


LEAF_BY_LEAF = {
    "adafactor": optax.adafactor(0.1),
    "adamw, mask by ndim": optax.adamw(1e-3, mask=by_ndim),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.adam(0.1)),
    "centralize": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "clip_by_block_rms": optax.chain(optax.clip_by_block_rms(10.0), optax.sgd(0.1)),
    "fromage": optax.fromage(0.1),
    "galore": optax.contrib.galore(0.1, rank=1),
    "global clip, lamb": optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.1)),
    "lamb": optax.lamb(0.1),
    "lamb, warm-up": optax.lamb(optax.linear_schedule(0.0, 0.1, 1000)),
    "lars": optax.lars(0.1),
    "muon": optax.contrib.muon(0.1),
    "multi steps": optax.MultiSteps(optax.lars(0.1), 4),
    "novograd": optax.novograd(0.1),
    "partition by ndim": optax.multi_transform({True: optax.sgd(0.1), False: optax.adam(0.1)}, by_ndim),
    "plateau": optax.chain(optax.lars(0.1), optax.contrib.reduce_on_plateau()),
    "hyperparameters": optax.inject_hyperparams(optax.lars)(learning_rate=0.1),
    "trust ratio": optax.scale_by_trust_ratio(),
}

NUMBER_BY_NUMBER = {
    "adabelief": optax.adabelief(0.1),
    "adam": optax.adam(optax.cosine_decay_schedule(0.1, 100)),
    "adam, half precision": optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "clip": optax.chain(optax.clip(0.5), optax.zero_nans(), optax.sgd(0.1, momentum=0.9)),
    "cocob": optax.contrib.cocob(),
    "dadapt": optax.contrib.dadapt_adamw(0.1),
    "flatten": optax.flatten(optax.lamb(0.1)),
    "global clip": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100))
    ),
    "hyperparameters": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "lion": optax.lion(0.1),
    "madgrad": optax.contrib.madgrad(0.1),
    "momo": optax.contrib.momo(),
    "multi steps": optax.MultiSteps(optax.adam(0.1), 3),
    "per leaf": fl.per_leaf(optax.lamb(0.1)),
    "per leaf in a chain": optax.chain(fl.per_leaf(optax.adaptive_grad_clip(0.01)), optax.adam(0.1)),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    "prodigy": optax.contrib.prodigy(),
    "rmsprop": optax.rmsprop(0.1, centered=True, momentum=0.9),
    "schedule free": optax.contrib.schedule_free_adamw(0.1),
    "sgd": optax.sgd(0.1),
}

UNKNOWN = {
    "a mask by position": optax.stateless(lambda u, _: jax.tree.map(lambda x: x * np.ones(MLP.length), u)),
    "a mask by name": optax.lamb(0.1, mask={"layer_0": True, "layer_1": False, "layer_2": True}),
    "lbfgs": optax.lbfgs(),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "noise and lamb": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.lamb(0.1)),
    "rates by position": optax.adamw(np.ones(MLP.length), weight_decay=np.ones(MLP.length)),
    "sophia": optax.contrib.sophia(0.1),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["adafactor", "adamw, mask by ndim", "lamb"])
def test_some_work_leaf_by_leaf(name):
    assert differs_by_leaf(LEAF_BY_LEAF[name], fl.ComponentVector.zeros(MLP, jnp.float32))


@pytest.mark.parametrize("name", ["adam", "global clip", "per leaf", "noise", "lbfgs", "rates by position"])
def test_some_work_number_by_number(name):
    assert not differs_by_leaf(
        {**NUMBER_BY_NUMBER, **UNKNOWN}[name], fl.ComponentVector.zeros(MLP, jnp.float32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("layout", [MLP, MIXED], ids=["mlp", "mixed"])
def test_what_works_leaf_by_leaf(layout, dtype):
    ps = fl.ComponentVector.zeros(layout, dtype)
    assert not [name for name, optimizer in LEAF_BY_LEAF.items() if not differs_by_leaf(optimizer, ps)]
    alike = {**NUMBER_BY_NUMBER, **UNKNOWN}
    assert not [name for name, optimizer in alike.items() if differs_by_leaf(optimizer, ps)]


@pytest.mark.long
def test_it_depends_on_the_leaves():
    """Where there is nothing to tell apart, nothing is told apart."""
    assert differs_by_leaf(optax.adamw(0.1, mask=by_path), fl.ComponentVector.zeros(MLP))
    assert not differs_by_leaf(optax.adamw(0.1, mask=by_path), fl.ComponentVector.zeros(MIXED))
    # Adafactor factors what has 128 numbers or more along two axes.
    factored = optax.scale_by_factored_rms()
    assert not differs_by_leaf(factored, fl.ComponentVector.zeros(fl.Layout({"a": (127, 300), "b": (3,)})))
    assert differs_by_leaf(factored, fl.ComponentVector.zeros(fl.Layout({"a": (2, 128, 300), "b": (3,)})))
    assert differs_by_leaf(factored, fl.ComponentVector.zeros(fl.Layout({"a": (20_000, 2), "b": (130, 140)})))
    # One leaf of one axis is the vector; copies in a stack are leaves.
    assert not differs_by_leaf(optax.lamb(0.1), fl.ComponentVector.zeros(fl.Layout({"a": (5,)})))
    assert differs_by_leaf(optax.lamb(0.1), fl.ComponentVector.zeros(fl.Layout({"a": (5,)}).stack(2)))
    assert differs_by_leaf(
        optax.lamb(0.1), fl.ComponentVector.zeros(fl.Layout({"a": (5,)}).stack(2).stack(1))
    )


@pytest.mark.long
def test_trees():
    vector = fl.ComponentVector.zeros(MLP)
    assert differs_by_leaf(optax.lamb(0.1), {"net": vector, "other": jnp.ones((500, 2))})
    assert not differs_by_leaf(optax.adam(0.1), {"net": vector, "other": jnp.ones(())})
    assert not differs_by_leaf(optax.lamb(0.1), vector.to_dict())
    assert not differs_by_leaf(optax.lamb(0.1), vector.unpack())
    assert not differs_by_leaf(optax.lamb(0.1), jnp.ones(3))


def test_complex_numbers():
    ps = fl.ComponentVector.zeros(fl.Layout({"a": (4, 3), "b": (3,)}), complex)
    assert differs_by_leaf(optax.lars(0.1), ps)
    assert not differs_by_leaf(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), ps)


def test_it_costs_the_same_for_a_large_model(monkeypatch):
    """No array of the size of the model, and few leaves."""
    block = {"weight": (4000, 5000, 3, 3), "bias": (5000,), "gain": ()}
    layout = fl.Layout({f"layer_{i}": block for i in range(500)}).stack(1000)
    numbers = np.broadcast_to(np.float32(0), (layout.length,))  # one number in memory
    structure = jax.tree.structure(jax.eval_shape(lambda: fl.ComponentVector.zeros(layout)))
    whole = jax.tree.unflatten(structure, [numbers])
    stand_ins = []
    monkeypatch.setattr(leafwise, "_takes_other_steps", lambda _, ps: not stand_ins.append(ps))
    assert differs_by_leaf(optax.lamb(0.1), whole)
    (small,) = stand_ins
    assert small.size < 300_000
    assert len(small.layout.slots()) <= 8
    assert {slot.shape for _, slot in small.layout.slots()} >= {(128, 128, 3, 3), (4,), ()}


def test_train_loop_warns_once(key):
    ps = fl.ComponentVector.of({"a": jnp.ones((2, 2)), "b": jnp.ones(3)}, dtype=float)

    def loss(ps, st, _):
        return (ps.data**2).sum(), st

    def run(optimizer, ps):
        return fl.train_loop(loss, ps, {}, optimizer, steps=5, chunk=2, progress=False)

    with pytest.warns(
        UserWarning, match=r"train_loop: this optimiser works leaf by leaf.*fl\.per_leaf"
    ) as seen:
        run(optax.lars(0.1), ps)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    run(fl.per_leaf(optax.lars(0.1)), ps)
    run(optax.adam(0.1), ps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = run(optax.lars(0.1), ps)
    assert one.losses.shape == (5,)
