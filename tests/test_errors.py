"""The page of errors and their cures: each message on it is one that the library raises."""

import functools
import pickle
import re
import sys
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from flatlayers.adjoints import _diffrax as diffrax_names


PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
MESSAGES = re.findall(r"^``` text\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)

KINDS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)

KEY = jax.random.key(0)
VECTOR = fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(2)})
STACKED = fl.ComponentVector(jnp.ones((3, 4)), VECTOR.layout)
DENSE = fl.Dense(2, 2)
PS, ST = fl.setup(KEY, DENSE, jnp.float64)
ONES = jnp.ones(2)
SMALLEST = diffrax.PIDController(rtol=1e-9, atol=1e-9, dtmin=1e-3, force_dtmin=False)


def squares(ps, st, batch):
    return (ps.data**2).sum(), st


def sgd_loop(loss=squares, data=None, **options):
    return fl.train_loop(loss, VECTOR, {}, optax.sgd(0.1), data, steps=2, progress=False, **options)


def node(**options):
    layer = fl.NeuralODE(DENSE, **options)
    return layer, *fl.setup(KEY, layer, jnp.float64)


def call_node(**options):
    layer, ps, st = node(**options)
    return layer(ONES, ps, st)


def slope(mode, **options):
    layer, ps, st = node(**options)
    return mode(lambda ps: layer(ONES, ps, st)[0].sum())(ps)


# A solve that fails


def too_many_steps():
    return call_node(max_steps=1, rtol=1e-9, atol=1e-9)


def steps_that_become_too_small():
    layer = fl.NeuralODE(fl.WrappedFunction(lambda y: 1e6 * y**2), stepsize_controller=SMALLEST)
    return layer(ONES, *fl.setup(KEY, layer, jnp.float64))


# Vectors and names


def unknown_name():
    return PS.wieght


def pattern_without_a_match():
    return VECTOR.layout.mask("*.wieght")


def reserved_name():
    return fl.ComponentVector.of({"shape": jnp.ones(2)})


def keyword():
    return fl.ComponentVector.of({"lambda": jnp.ones(2)})


def ligature():
    return fl.ComponentVector.of({"ﬁeld": jnp.ones(2)})


def truth_value():
    return bool(VECTOR > 0)


def one_number():
    return float(VECTOR)


def list_of_names():
    return VECTOR[["a", "b"]]


def several_indices():
    return VECTOR[0, 1]


def index_with_leading_axes():
    return STACKED[0]


def list_of_mappings():
    return fl.ComponentVector.of({"layers": [{"w": jnp.ones(2)}, {"w": jnp.ones(2)}]})


def two_dtypes():
    return fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32)})


def dtype_for_a_layout():
    return fl.ComponentVector.of({"a": 1.0}, jnp.float32)


def integers():
    return fl.ComponentVector.of({"a": jnp.arange(2)})


def wrong_length():
    return VECTOR.layout.unpack(jnp.ones(5))


def arithmetic_of_a_shard():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    return fl.shard(VECTOR, mesh) * 2.0


def pickled_shard():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    return pickle.dumps(fl.shard(VECTOR, mesh))


# Layers and state


def array_in_a_field():
    class Scaled(fl.Layer):
        scale: object

    return Scaled(jnp.ones(2))


def unknown_option():
    return fl.initializers.normal(std=0.1)


def another_models_vector():
    other = fl.setup(KEY, fl.Dense(3, 2), jnp.float64)[0]
    return DENSE(ONES, other, ST)


def state_where_none_is():
    layer = fl.BatchNorm(2)
    ps, _ = fl.setup(KEY, layer, jnp.float64)
    return fl.stateless_apply(layer, ONES, ps)


def positional_compact():
    return fl.compact(DENSE)


def two_declarations_in_one_keyword():
    pair = (fl.Param((2,), fl.initializers.ones), fl.Param((2,), fl.initializers.ones))
    return fl.compact(pair=pair)(lambda m, x: x)


def assigned_in_compact():
    @fl.compact(net=DENSE)
    def model(m, x):
        m.count = 1
        return m.net(x)

    ps, st = fl.setup(KEY, model, jnp.float64)
    return model(ONES, ps, st)


def changed_state():
    class Counter(fl.Layer):
        def states(self, key):
            return {"count": 0.0}

        def forward(self, x, ps, st):
            return x, st.replace(count="many")

    layer = Counter()
    return fl.StatefulLayer(layer, *fl.setup(KEY, layer))(ONES)


def mask_of_another_shape():
    layer = fl.VariationalHiddenDropout(0.5)
    _, st = fl.setup(KEY, layer)
    _, st = layer(jnp.ones((2, 3)), {}, st)
    return layer(jnp.ones((4, 3)), {}, st)


def axis_that_is_not_mapped():
    layer = fl.BatchNorm(2, axis_name="data")
    return layer(jnp.ones((3, 2)), *fl.setup(KEY, layer, jnp.float64))


def axis_that_is_not_named():
    layer = fl.BatchNorm(2)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    ps, st = fl.setup(KEY, layer, jnp.float64)

    def loss(ps, st, batch):
        y, st = layer(batch, ps, st)
        return (y**2).sum(), st

    return fl.sharded_value_and_grad(loss, mesh)(fl.shard(ps, mesh), st, jnp.ones((4, 2)))


def not_frozen():
    return fl.unfreeze(DENSE)


def attention_mask():
    layer, x = fl.MultiHeadAttention(4, heads=2), jnp.ones((3, 5, 4))
    ps, st = fl.setup(KEY, layer, jnp.float64)
    return layer((x, x, x, jnp.ones((5, 5), bool)), ps, st)


# Differential equations


def forward_mode_by_gauss():
    return slope(jax.jacfwd, adjoint=fl.GaussAdjoint())


def reverse_over_reverse():
    layer, ps, st = node()
    gradient = jax.grad(lambda ps: layer(ONES, ps, st)[0].sum())
    return jax.make_jaxpr(jax.grad(lambda ps: gradient(ps).data.sum()))(ps)


def event_with_an_adjoint():
    event = diffrax.Event(lambda t, y, args, **_: y[0] > 10)
    return slope(jax.grad, adjoint=fl.AdaptiveCheckpointAdjoint(), event=event)


def no_bound_on_the_steps():
    return call_node(adjoint=fl.AdaptiveCheckpointAdjoint(), max_steps=None)


def steps_with_gauss():
    return call_node(adjoint=fl.GaussAdjoint(), saveat=diffrax.SaveAt(steps=True))


def gauss_for_noise():
    layer = fl.NeuralSDE(DENSE, DENSE, adjoint=fl.GaussAdjoint())
    ps, st = fl.setup(KEY, layer, jnp.float64)
    return layer(ONES, ps, st)


def nothing_saved():
    return call_node(saveat=diffrax.SaveAt(subs=None, dense=True))


def noise_as_a_control():
    control = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-2, (), KEY)
    layer = fl.NeuralCDE(fl.Dense(2, 4), channels=2)
    ps, st = fl.setup(KEY, layer, jnp.float64)
    return layer((ONES, control), ps, st)


def sizes_of_diagonal_noise():
    return fl.NeuralSDE(DENSE, DENSE, noise="diagonal", noise_dims=2)


def start_of_another_shape():
    layer = fl.DeepEquilibriumNetwork(fl.Parallel(jnp.add, fl.Dense(3, 2), fl.Dense(3, 2)))
    ps, st = fl.setup(KEY, layer, jnp.float64)
    return layer(jnp.ones(3), ps, st)


def solver_of_another_kind():
    return fl.DeepEquilibriumNetwork(DENSE, solver=diffrax.Tsit5())


# Training


def not_finite():
    return sgd_loop(lambda ps, st, batch: (jnp.log(-ps.data.sum()), st))


def integer_parameters():
    def loss(ps, st, batch):
        return ps["w"].sum(), st

    return fl.train_loop(loss, {"w": jnp.arange(3)}, {}, optax.sgd(0.1), steps=1, progress=False)


def list_for_one_batch():
    return sgd_loop(data=[3.0, "x"])


def batches_of_two_shapes():
    return sgd_loop(lambda ps, st, x: ((ps.a * x.sum()).sum(), st), data=[jnp.ones(3), jnp.ones(2)])


def no_key_to_shuffle_with():
    return fl.batches(jnp.ones((6, 2)), 2)


def validation_by_an_iterator():
    return sgd_loop(validate=(squares, iter([jnp.ones(2)]), 1))


def state_of_another_optimiser():
    opt_state = optax.sgd(0.1).init(VECTOR)
    return fl.train_loop(squares, VECTOR, {}, optax.adam(0.1), steps=1, progress=False, opt_state=opt_state)


def file_of_a_longer_run():
    run = functools.partial(fl.train_loop, squares, VECTOR, {}, optax.sgd(0.1), progress=False)
    run(steps=2, save="run.safetensors")
    return run(steps=1, resume="run.safetensors")


def bounds_by_a_method_without():
    pytest.importorskip("scipy")
    return fl.minimize(lambda ps: (ps.data**2).sum(), VECTOR, method="BFGS", bounds={"a": (0.0, 1.0)})


def ensemble_by_leaf():
    return fl.per_leaf(optax.adam(0.1)).init(STACKED)


def shard_by_leaf():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    return fl.per_leaf(optax.adam(0.1)).init(fl.shard(VECTOR, mesh))


def complex_collocation():
    return fl.collocate(jnp.linspace(0, 1, 5), jnp.ones((5, 2), complex))


# Derivatives


def derivatives_of_no_vector():
    return fl.hessian(lambda ps: (ps**2).sum())(ONES)


def derivatives_of_many():
    return fl.hessian(lambda ps: (ps.data**2).sum())(STACKED)


def jacobian_of_one_sample():
    return fl.batched_jacobian(DENSE)(ONES, PS, ST)


def one_path_of_a_matrix():
    return fl.hessian(lambda ps: (ps.data**2).sum())(VECTOR)["a"]


def views_of_a_plain_hessian():
    return jax.hessian(lambda ps: (ps.data**2).sum())(VECTOR).a


# Files and other libraries


def not_of_this_library():
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"w": np.ones(2)}, "other.safetensors")
    return fl.load("other.safetensors")


def part_that_is_not_there():
    fl.save("run.safetensors", ps=VECTOR)
    return fl.load("run.safetensors", st=ST)


def another_layout():
    return fl.transfer(VECTOR, fl.ComponentVector.of({"a": jnp.ones(2), "b": jnp.ones(3)}))


def transfer_between_dtypes():
    return fl.transfer(VECTOR, fl.ComponentVector.of({"a": jnp.ones(2, jnp.float32)}))


def module_with_keys():
    class Noisy(eqx.Module):
        key: jax.Array

        def __call__(self, x):
            return x + jax.random.normal(self.key, x.shape)

    return fl.FromEquinox(Noisy(KEY))


def module_with_state():
    return fl.FromEquinox(eqx.nn.BatchNorm(2, "batch", mode="batch"))


def package_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        return VECTOR.to_series()


def untested_diffrax():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffrax_names.check_version, "__defaults__", ("0.9.0",))
        return fl.AdaptiveCheckpointAdjoint()


def torch_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return fl.to_torch(DENSE, PS, ST)


def flax_that_is_missing():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flax", None)
        return fl.from_nnx(object(), DENSE)


# Precision


def times_that_float32_does_not_tell_apart():
    with jax.enable_x64(False):
        layer = fl.NeuralODE(DENSE, t0=1e9, t1=1e9 + 1, saveat=[1e9, 1e9 + 1])
        ps, st = fl.setup(KEY, layer)
        return layer(jnp.ones(2), ps, st)


def float64_without_x64():
    with jax.enable_x64(False):
        return fl.f64(VECTOR)


RAISING = [
    value
    for value in list(globals().values())
    if getattr(value, "__module__", "") == __name__
    and not isinstance(value, type)
    and value.__name__ not in ("squares", "sgd_loop", "node", "call_node", "slope")
]


def pattern(message):
    """`...` stands for anything, and so does the end of a line for any space."""
    return r"\s+".join(re.escape(word).replace(r"\.\.\.", ".*?") for word in message.split())


def test_the_page_has_all_of_them():
    assert len(MESSAGES) == len(RAISING)


@pytest.mark.parametrize("raising", RAISING, ids=lambda one: one.__name__)
def test_what_is_raised_is_one_message_of_the_page(raising, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KINDS) as caught:
        raising()
    found = " ".join(f"{type(caught.value).__name__}: {caught.value}".split())
    assert sum(re.fullmatch(pattern(message), found) is not None for message in MESSAGES) == 1, found
