"""`per_leaf` against optax on a tree of the same numbers, whose stacked copies are entries of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl

from ..helpers import assert_close, assert_same


pytestmark = pytest.mark.usefixtures("_standard")


LAYOUT = fl.Layout(
    {
        "encoder": {"weight": (4, 3), "bias": (4,), "empty": {}},
        "blocks": fl.Layout({"w": (3, 3), "inner": fl.Layout({"k": (2, 3, 2), "b": ()}).stack(2)}).stack(2),
        "decoder": {"weight": (4, 3), "gain": ()},
    }
).tie({"decoder.weight": "encoder.weight"})


def vector(seed=0, dtype=float, layout=LAYOUT):
    return fl.ComponentVector(
        jnp.asarray(np.random.default_rng(seed).normal(size=layout.length), dtype), layout
    )


def tree_of(v):
    """The leaves of a vector with `LAYOUT`, by their positions."""

    def block(start):
        inner = {
            str(j): {"k": v.data[start + 13 * j :][:12].reshape(2, 3, 2), "b": v.data[start + 13 * j + 12]}
            for j in range(2)
        }
        return {"w": v.data[start - 9 : start].reshape(3, 3), "inner": inner}

    return {
        "encoder": {"weight": v.data[:12].reshape(4, 3), "bias": v.data[12:16]},
        "blocks": {str(i): block(16 + 35 * i + 9) for i in range(2)},
        "decoder": {"gain": v.data[-1]},
    }


def test_the_positions_are_those_of_the_layout():
    v, tree = vector(), tree_of(vector())
    assert v.size == 16 + 2 * 35 + 1
    assert_same(v.blocks.inner.k[1, 1], tree["blocks"]["1"]["inner"]["1"]["k"])
    assert_same(v.blocks.w[1], tree["blocks"]["1"]["w"])
    assert_same(v.decoder.weight, tree["encoder"]["weight"])


@functools.partial(jax.jit, static_argnums=0)
def first_step(optimizer, gradient, ps):
    return optimizer.update(gradient, optimizer.init(ps), ps)


def ndim_mask(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


OPTIMIZERS = {
    "adafactor, factored": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "adamw, mask by ndim": lambda: optax.adamw(0.1, weight_decay=0.1, mask=ndim_mask),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "centralize": optax.centralize,
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(0.1),
    "fromage": lambda: optax.fromage(0.1),
    "galore": lambda: optax.contrib.galore(0.1, rank=2),
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)),
    "lamb": lambda: optax.lamb(optax.linear_schedule(0.0, 0.1, 3), weight_decay=0.1),
    "lars": lambda: optax.lars(0.1),
    "muon": lambda: optax.contrib.muon(0.1, weight_decay=0.1),
    "novograd": lambda: optax.novograd(0.1),
    "partition by ndim": lambda: optax.multi_transform(
        {True: optax.sgd(0.1, momentum=0.9), False: optax.adam(0.1)}, ndim_mask
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.lamb(0.1), 0.1, b1=0.9),
    "trust ratio, clip": lambda: optax.chain(optax.clip(0.5), optax.scale_by_trust_ratio()),
}


@pytest.mark.long
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_tree(name, dtype):
    ours, theirs = fl.per_leaf(OPTIMIZERS[name]()), OPTIMIZERS[name]()
    ps = 2 * vector(0, dtype)
    tree = tree_of(ps)
    state, tree_state = ours.init(ps), theirs.init(tree)
    step, tree_step = jax.jit(ours.update), jax.jit(theirs.update)
    for seed, length in ((1, 1.0), (2, 5.0), (3, 0.1)):
        gradient = length * vector(seed, dtype)
        updates, new = step(gradient, state, ps)
        expected, tree_state = tree_step(tree_of(gradient), tree_state, tree)
        assert_tree_close(tree_of(updates), expected, dtype)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert list(map(np.shape, jax.tree.leaves(new))) == list(map(np.shape, jax.tree.leaves(state)))
        ps, tree = optax.apply_updates(ps, updates), optax.apply_updates(tree, expected)
        state = new
    assert ps.layout == LAYOUT
    assert ps.dtype == dtype
    assert_tree_close(tree_of(ps), tree, dtype)


def assert_tree_close(found, expected, dtype=float):
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-12
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, rtol=10 * tolerance, atol=tolerance)


def test_a_vector_alone_is_another_algorithm():
    """So that the comparison above means something."""
    ps, gradient = vector(0), vector(1)
    updates, _ = first_step(optax.lamb(0.1), gradient, ps)
    expected, _ = first_step(optax.lamb(0.1), tree_of(gradient), tree_of(ps))
    assert abs(updates.data[0] - expected["encoder"]["weight"][0, 0]) > 1e-3


def seen_by(ps):
    """What an optimiser in `per_leaf` is shown."""
    seen = []
    fl.per_leaf(optax.GradientTransformation(lambda ps: seen.append(ps) or (), lambda u, s, p: (u, s))).init(
        ps
    )
    return seen[0]


def test_what_is_shown():
    ps = fl.ComponentVector.of({"net": {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}, "rate": 0.5})
    assert_same(seen_by(ps), ps.to_dict())
    shown = seen_by(vector())
    assert jax.tree.map(np.shape, shown) == {
        "encoder": {"weight": (4, 3), "bias": (4,), "empty": {}},
        "blocks": [{"w": (3, 3), "inner": [{"k": (2, 3, 2), "b": ()}] * 2}] * 2,
        "decoder": {"gain": ()},
    }
    assert_same(shown["blocks"][1]["inner"][0]["k"], vector().blocks.inner.k[1, 0])


def test_stacks_of_stacks_and_empty_ones():
    twice = fl.Layout({"w": (2,)}).stack(3).stack(2)
    assert_same(seen_by(vector(layout=twice))[1][2]["w"], vector(layout=twice).w[1, 2])
    none = fl.Layout({"a": (2,), "blocks": fl.Layout({"w": (3,)}).stack(0)})
    assert jax.tree.map(np.shape, seen_by(vector(layout=none))) == {"a": (2,), "blocks": []}
    for layout in (twice, none, fl.Layout({})):
        ps = vector(layout=layout)
        updates, _ = first_step(fl.per_leaf(optax.adam(0.1)), ps, ps)
        expected, _ = first_step(optax.adam(0.1), ps, ps)
        assert_close(updates.data, expected.data)
        assert updates.layout == layout


@pytest.mark.long
def test_a_model_with_repeated_and_shared_layers(key):
    model = fl.Chain(
        first=fl.Dense(3, 4, jnp.tanh), blocks=fl.Repeated(fl.Dense(4, 4, jnp.tanh), 3), last=fl.Dense(4, 3)
    )
    ps, st = fl.setup(key, model, float)
    x = jax.random.normal(key, (5, 3))

    def dense(x, own):
        return x @ own["weight"].T + own["bias"][None]

    @jax.jit
    def of_tree(tree, state):
        value, gradient = jax.value_and_grad(tree_loss)(tree)
        updates, state = optimizer.update(gradient, state, tree)
        return value, optax.apply_updates(tree, updates), state

    def tree_loss(tree):
        y = jnp.tanh(dense(x, tree["first"]))
        for block in tree["blocks"]:
            y = jnp.tanh(dense(y, block))
        return jnp.mean((dense(y, tree["last"]) - x) ** 2)

    def loss(ps, st, _):
        return jnp.mean((model(x, ps, st)[0] - x) ** 2), st

    tree = ps.to_dict()
    blocks = tree["blocks"]["layer"]
    tree["blocks"] = [{name: leaf[i] for name, leaf in blocks.items()} for i in range(3)]
    result = fl.train_loop(loss, ps, st, fl.per_leaf(optax.lamb(0.05)), steps=20, progress=False)
    optimizer = optax.lamb(0.05)
    state, losses = optimizer.init(tree), []
    for _ in range(20):
        value, tree, state = of_tree(tree, state)
        losses.append(value)
    assert_close(result.losses, np.array(losses))
    assert_close(result.ps.blocks.layer.weight[2], tree["blocks"][2]["weight"])


def test_tied_names_have_one_gradient_the_sum():
    layout = fl.Layout({"a": (2, 2), "b": (2, 2), "c": (3,)}).tie({"b": "a"})
    ps = vector(layout=layout)
    gradient = jax.grad(lambda ps: (ps.a**2).sum() + (3 * ps.b).sum() + ps.c.sum())(ps)
    tree = {"a": ps.a, "c": ps.c}
    expected, _ = optax.lars(0.1).update(
        {"a": 2 * ps.a + 3, "c": jnp.ones(3)}, optax.lars(0.1).init(tree), tree
    )
    optimizer = fl.per_leaf(optax.lars(0.1))
    updates, _ = optimizer.update(gradient, optimizer.init(ps), ps)
    assert_close(updates.a, expected["a"])
    assert_same(updates.b, updates.a)
    assert_close(updates.c, expected["c"])


# Masks and labels by name


def masks(shown):
    return {
        "by name": {
            "encoder": {"weight": True, "bias": False, "empty": {}},
            "blocks": [
                {"w": True, "inner": [{"k": True, "b": False}] * 2},
                {"w": True, "inner": [{"k": True, "b": False}, {"k": False, "b": True}]},
            ],
            "decoder": {"gain": False},
        },
        "from the top": {"encoder": False, "blocks": [True, False], "decoder": True},
        "by path": jax.tree_util.tree_map_with_path(
            lambda path, _: "bias" not in jax.tree_util.keystr(path), shown
        ),
    }


@pytest.mark.parametrize("name", ["by name", "from the top", "by path"])
def test_masks_by_name(name):
    ps, gradient = vector(0), vector(1)
    mask = masks(seen_by(ps))[name]
    optimizer = fl.per_leaf(optax.masked(optax.set_to_zero(), mask))
    updates, _ = optimizer.update(gradient, optimizer.init(ps), ps)
    full = jax.tree.map(lambda on, part: jax.tree.map(lambda _: on, part), mask, seen_by(ps))
    zeros = jax.tree.map(lambda leaf: bool((leaf == 0).all()), seen_by(updates))
    assert zeros == full
    assert_same(updates.data[updates.data != 0], gradient.data[updates.data != 0])


def test_labels_by_name():
    ps, gradient = vector(0), vector(1)
    labels = {"encoder": "slow", "blocks": ["fast", "slow"], "decoder": "fast"}
    rates = {"slow": optax.sgd(0.1), "fast": optax.sgd(1.0)}
    for optimizer in (optax.multi_transform(rates, labels), optax.multi_transform(rates, lambda _: labels)):
        optimizer = fl.per_leaf(optimizer)
        updates, _ = optimizer.update(gradient, optimizer.init(ps), ps)
        rate = jnp.ones(ps.size).at[:16].set(0.1).at[16 + 35 : 16 + 70].set(0.1)
        assert_close(updates.data, -rate * gradient.data)


# What a loop does with it


def test_in_a_scan_and_in_vmap():
    optimizer = fl.per_leaf(optax.lamb(0.1))

    @jax.jit
    def train(ps):
        def step(carry, gradient):
            ps, state = carry
            updates, state = optimizer.update(gradient, state, ps)
            return (optax.apply_updates(ps, updates), state), None

        gradients = fl.ComponentVector(jnp.stack([vector(seed).data for seed in (1, 2, 3)]), LAYOUT)
        return jax.lax.scan(step, (ps, optimizer.init(ps)), gradients)[0][0]

    @jax.jit
    def written_out(ps):
        tree, state = tree_of(ps), optax.lamb(0.1).init(tree_of(ps))
        for seed in (1, 2, 3):
            updates, state = optax.lamb(0.1).update(tree_of(vector(seed)), state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    members = [vector(seed) for seed in (4, 5)]
    together = jax.jit(jax.vmap(train))(fl.ComponentVector(jnp.stack([ps.data for ps in members]), LAYOUT))
    for i, ps in enumerate(members):
        assert_tree_close(tree_of(train(ps)), written_out(ps))
        assert_tree_close(tree_of(fl.ComponentVector(together.data[i], LAYOUT)), written_out(ps))


def test_leading_axes_are_refused_and_the_way_out_works():
    ensemble = fl.ComponentVector(jnp.stack([vector(seed).data for seed in range(3)]), LAYOUT)
    optimizer = fl.per_leaf(optax.scale_by_trust_ratio())
    with pytest.raises(
        ValueError, match=r"of shape \(87,\), found ComponentVector\(float64\[3,87\].*jax.vmap"
    ):
        optimizer.init(ensemble)
    with pytest.raises(ValueError, match=r"per_leaf: expected a vector of shape \(87,\)"):
        optimizer.update(ensemble, optimizer.init(vector()), ensemble)
    each = optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    updates, _ = first_step(each, ensemble, ensemble)
    alone, _ = first_step(optimizer, vector(1), vector(1))
    assert_close(updates.data[1], alone.data)


def test_moments_are_vectors():
    ps = vector()
    state = fl.per_leaf(optax.lamb(0.1)).init(ps)
    assert optax.tree.get(state, "mu").layout == LAYOUT
    assert len(jax.tree.leaves(state)) == 3
    # Those of another shape stay by name.
    rows = optax.tree.get(fl.per_leaf(optax.adafactor(0.1, min_dim_size_to_factor=2)).init(ps), "v_row")
    assert rows["encoder"]["weight"].shape == (3,)


def quadratic(ps):
    return jnp.sum(jnp.cosh(ps.data - jnp.arange(ps.size) / ps.size))


@pytest.mark.slow
def test_value_fn_is_a_function_of_the_vector():
    """Nothing in L-BFGS goes leaf by leaf: it is the same on the vector."""

    def train(optimizer):
        ps = vector()
        state = optimizer.init(ps)
        value_and_grad = optax.value_and_grad_from_state(quadratic)

        @jax.jit
        def step(ps, state):
            value, gradient = value_and_grad(ps, state=state)
            updates, state = optimizer.update(
                gradient, state, ps, value=value, grad=gradient, value_fn=quadratic
            )
            return optax.apply_updates(ps, updates), state

        for _ in range(4):
            ps, state = step(ps, state)
        return ps

    found, expected = train(fl.per_leaf(optax.lbfgs())), train(optax.lbfgs())
    assert_close(found.data, expected.data, rtol=1e-7)
    assert quadratic(found) < quadratic(vector()) - 10


def test_further_arguments_of_value_fn_go_through():
    def value_fn(ps, scale):
        return scale * quadratic(ps)

    @functools.partial(jax.jit, static_argnums=0)
    def step(optimizer):
        ps = vector()
        value, gradient = jax.value_and_grad(value_fn)(ps, 2.0)
        return optimizer.update(
            gradient, optimizer.init(ps), ps, value=value, grad=gradient, value_fn=value_fn, scale=2.0
        )[0]

    line_search = optax.scale_by_backtracking_linesearch(10)
    found, expected = step(fl.per_leaf(line_search)), step(line_search)
    assert_close(found.data, expected.data)
    assert jnp.abs(found.data).max() > 0.01


def test_functions_that_give_vectors_are_shown_too():
    """As `grad_fn` of an opaque SAM, which optax calls with leaves and expects leaves from."""
    sam = functools.partial(
        optax.contrib.sam, optax.sgd(0.1), optax.sgd(0.05), sync_period=2, opaque_mode=True
    )

    def step(optimizer, ps, gradient):
        grad_fn = jax.grad(lambda ps, _: sum(jnp.sum(jnp.cosh(leaf)) for leaf in jax.tree.leaves(ps)))
        return optimizer.update(gradient, optimizer.init(ps), ps, grad_fn=grad_fn)[0]

    found = step(fl.per_leaf(sam()), vector(0), vector(1))
    assert_tree_close(tree_of(found), step(sam(), tree_of(vector(0)), tree_of(vector(1))))


def test_without_params():
    optimizer = fl.per_leaf(optax.centralize())
    updates, _ = optimizer.update(vector(1), optimizer.init(vector(0)))
    assert_close(
        updates.encoder.weight, vector(1).encoder.weight - vector(1).encoder.weight.mean(1, keepdims=True)
    )
    with pytest.raises(ValueError, match="params"):
        fl.per_leaf(optax.lamb(0.1)).update(vector(1), fl.per_leaf(optax.lamb(0.1)).init(vector(0)))


def test_one_link_of_a_chain():
    optimizer = optax.chain(fl.per_leaf(optax.adaptive_grad_clip(0.01)), optax.adam(0.1))
    theirs = optax.chain(optax.adaptive_grad_clip(0.01), optax.adam(0.1))
    ps, gradient = vector(0), vector(1)
    updates, state = first_step(optimizer, gradient, ps)
    expected, _ = first_step(theirs, tree_of(gradient), tree_of(ps))
    assert_tree_close(tree_of(updates), expected)
    assert optax.tree.get(state, "mu").layout == LAYOUT


@pytest.mark.long
@pytest.mark.parametrize("inside", [True, False])
def test_multi_steps_and_hyperparameters(inside):
    def wrapped(wrap, optimizer):
        return fl.per_leaf(wrap(optimizer)) if inside else wrap(fl.per_leaf(optimizer))

    def steps(optimizer, view):
        ps = view(vector(0))
        state, update = optimizer.init(ps), jax.jit(optimizer.update)
        for seed in (1, 2):
            updates, state = update(view(vector(seed)), state, ps)
        return updates, state

    every_second = functools.partial(optax.MultiSteps, every_k_schedule=2)
    updates, _ = steps(wrapped(every_second, optax.lars(0.1)), lambda ps: ps)
    assert_tree_close(tree_of(updates), steps(every_second(optax.lars(0.1)), tree_of)[0])

    def lars(learning_rate):
        return optax.lars(learning_rate) if inside else fl.per_leaf(optax.lars(learning_rate))

    optimizer = optax.inject_hyperparams(lars)(learning_rate=0.1)
    updates, state = steps(fl.per_leaf(optimizer) if inside else optimizer, lambda ps: ps)
    assert_tree_close(tree_of(updates), steps(optax.lars(0.1), tree_of)[0])
    assert_close(state.hyperparams["learning_rate"], np.array(0.1))


def test_a_tree_with_vectors_in_it():
    layout = fl.Layout({"w": (2, 3), "b": (2,)})
    for network in ("net", "a_net"):
        ps = {network: vector(0, layout=layout), "other": jnp.ones((2, 2))}
        gradient = {network: vector(1, layout=layout), "other": jnp.full((2, 2), 3.0)}
        mask = {network: {"w": True, "b": False}, "other": True}
        theirs = optax.lamb(0.1, weight_decay=0.5, mask=mask)
        optimizer = fl.per_leaf(theirs)
        updates, state = first_step(optimizer, gradient, ps)
        tree, tree_gradient = ({network: t[network].to_dict(), "other": t["other"]} for t in (ps, gradient))
        expected, _ = first_step(theirs, tree_gradient, tree)
        assert_tree_close({network: updates[network].to_dict(), "other": updates["other"]}, expected)
        assert optax.tree.get(state, "mu")[network].layout == layout


def test_a_tree_without_vectors_is_as_it_is():
    tree = tree_of(vector())
    assert_same(
        first_step(fl.per_leaf(optax.lars(0.1)), tree, tree)[0], first_step(optax.lars(0.1), tree, tree)[0]
    )


def test_bad_input():
    with pytest.raises(TypeError, match="expected an optax optimiser, found float"):
        fl.per_leaf(0.1)
    with pytest.raises(TypeError, match="expected an optax optimiser, found function"):
        fl.per_leaf(optax.adam)
    sums = optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: leaf.sum(), updates))
    with pytest.raises(ValueError, match=r"to keep the shape \(4, 3\) of 'encoder.weight', found \(\)"):
        fl.per_leaf(sums).update(vector(), fl.per_leaf(sums).init(vector()))
