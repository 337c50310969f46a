import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same, count_primitives


LAYOUT = fl.Layout({"a": (2, 3), "b": {"c": (3,), "d": ()}})


def vector(seed=0, lead=(), dtype=float):
    return fl.ComponentVector(jax.random.normal(jax.random.key(seed), (*lead, LAYOUT.length), dtype), LAYOUT)


# One function of named parts, on a vector through views, through `unpack`, and on a tree. Each part
# is used once: where a compiled program adds several products, LLVM chooses which of them to round
# by what else is in the loop, and compiled trees do not agree with themselves to the last bit.


def energy(p):
    return jnp.sum(jnp.tanh(p.a @ p.b.c) ** 2) * jnp.exp(p.b.d)


def by_views(v):
    return energy(v)


def by_unpacking(v):
    return energy(v.unpack())


@pytest.fixture(params=[by_views, by_unpacking], ids=["views", "unpack"])
def function(request):
    return request.param


@pytest.fixture(params=[lambda f: f, jax.jit], ids=["eager", "jit"])
def compiled(request):
    return request.param


def test_gradients_equal_those_of_a_tree(function, compiled):
    v = vector()
    tree = v.unpack()
    expected = compiled(jax.grad(energy))(tree)
    assert_same(compiled(jax.grad(function))(v), fl.ComponentVector.of(expected, LAYOUT))


def test_gradients_of_parts_used_twice_equal_those_of_a_tree():
    def reusing(p):
        return energy(p) + jnp.sum(jnp.sin(p.a) * p.b.d) + jnp.sum(p.b.c**3)

    v = vector()
    expected = fl.ComponentVector.of(jax.grad(reusing)(v.unpack()), LAYOUT)
    assert_same(jax.grad(reusing)(v), expected)
    assert_same(jax.grad(lambda v: reusing(v.unpack()))(v), expected)
    compiled_tree = jax.jit(jax.grad(reusing))(v.unpack())
    assert_same(
        jax.jit(jax.grad(lambda v: reusing(v.unpack())))(v), fl.ComponentVector.of(compiled_tree, LAYOUT)
    )


def test_jvp_equals_that_of_a_tree(function, compiled):
    v, t = vector(0), vector(1)
    got = compiled(lambda v, t: jax.jvp(function, (v,), (t,)))(v, t)
    expected = compiled(lambda v, t: jax.jvp(energy, (v,), (t,)))(v.unpack(), t.unpack())
    assert_same(got, expected)


@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_jacobians_equal_those_of_a_tree(function, compiled, mode):
    def many(f):
        return lambda p: jnp.stack([f(p), 2 * f(p)])

    v = vector()
    expected = compiled(mode(many(energy)))(v.unpack())
    assert_same(compiled(mode(many(function)))(v), fl.ComponentVector.of(expected, LAYOUT))


@pytest.mark.long
def test_hessian_equals_that_of_a_tree(function, compiled):
    v = vector()
    rows = compiled(jax.hessian(energy))(v.unpack())
    # Rows outside, columns inside: pack the columns of each leaf, then the rows.
    hessian = compiled(jax.hessian(function))(v)
    assert hessian.data.data.shape == (10, 10)
    columns = {path: fl.ComponentVector.of(rows[path], LAYOUT).data for path, _ in LAYOUT.slots()}
    expected = jnp.concatenate([columns[path].reshape(-1, 10) for path, _ in LAYOUT.slots()])
    assert_same(hessian.data.data, expected)


def test_vmap_of_gradients_equals_that_of_a_tree(function, compiled):
    v = vector(lead=(4,))
    expected = compiled(jax.vmap(jax.grad(energy)))(v.unpack())
    assert_same(compiled(jax.vmap(jax.grad(function)))(v), fl.ComponentVector.of(expected, LAYOUT))


def test_unpacking_is_one_split_and_its_transpose_one_concatenation():
    counts = count_primitives(jax.grad(by_unpacking), vector())
    assert counts["split"] == 1
    assert counts["concatenate"] == 1
    assert counts["slice"] == counts["pad"] == 0


# Views


def test_views_keep_leading_axes():
    v = vector(lead=(5, 2))
    assert v.a.shape == (5, 2, 2, 3)
    assert v.b.d.shape == (5, 2)
    assert v["b"].shape == (5, 2, 4)
    assert (v.layout.length, v.size, v.ndim) == (10, 100, 3)
    assert_same(v["b.c"], v["b", "c"])
    assert_same(v.unpack().b.c, v.b.c)


def test_numbers_are_indexed_along_the_last_axis():
    v = vector(lead=(2,))
    assert_same(v[..., 3], v.data[:, 3])
    assert_same(v[..., 2:5], v.data[:, 2:5])
    assert_same(v[..., jnp.array([1, -1])], v.data[:, jnp.array([1, -1])])
    assert_same(v[LAYOUT.mask("b")], v.data[:, 6:])
    assert_same(v[...], v.data)
    w = vector()
    assert_same(
        (w[3], w[2:5], w[..., -1], w[LAYOUT.mask("b")]), (w.data[3], w.data[2:5], w.data[-1], w.data[6:])
    )
    assert len(w) == 10
    with pytest.raises(TypeError, match="one index"):
        v[0, 1]
    with pytest.raises(TypeError):
        iter(v)


@pytest.mark.parametrize("key", [-1, 0, slice(1, None), slice(None), np.int64(2), np.array([0, 1])], ids=repr)
@pytest.mark.parametrize("lead", [(2,), (10,), (3, 10)], ids=str)
def test_an_index_that_may_mean_a_leading_axis_is_refused(key, lead):
    v = vector(lead=lead)
    with pytest.raises(TypeError, match=r"v\[\.\.\., i\].*v\.lead\[i\]"):
        v[key]
    with pytest.raises(TypeError, match="leading axes"):
        v.at[key].set(0.0)
    with pytest.raises(TypeError, match=r"len\(v.lead\)"):
        len(v)


def test_numbers_are_gone_through_one_by_one():
    assert_same(jnp.stack(list(vector())), vector().data)
    with pytest.raises(TypeError, match=r"iter\(v\) of a vector with leading axes \(2,\) has two meanings"):
        list(vector(lead=(2,)))


@pytest.mark.long
def test_leading_axes_are_indexed_by_lead():
    v = vector(lead=(4, 3))
    assert_same(v.lead[-1].data, v.data[-1])
    assert_same(v.lead[1, 2].b.c, v.b.c[1, 2])
    assert_same(v.lead[1:3, 0].data, v.data[1:3, 0])
    assert_same(v.lead[..., 0].a, v.a[:, 0])
    assert_same(v.lead[jnp.array([0, 2])].a, v.a[jnp.array([0, 2])])
    assert [part.shape for part in v.lead] == [(3, 10)] * len(v.lead)
    assert isinstance(v.lead[0], fl.ComponentVector)
    assert_same(jax.jit(lambda v: v.lead[2].b.d)(v), v.data[2, :, -1])
    with pytest.raises(IndexError):
        v.lead[0, 0, 0]
    with pytest.raises(TypeError, match=r"leading axes, found shape \(10,\)"):
        vector().lead[0]


def test_the_last_time_of_a_solution_by_name():
    v = fl.ComponentVector.of({"q": 1.0, "p": 0.0})
    ts = jnp.linspace(0.0, 1.0, 2)  # as many times as numbers: the shapes do not tell them apart
    ys = jax.vmap(lambda t: fl.ComponentVector.of({"q": jnp.cos(t), "p": -jnp.sin(t)}))(ts)
    assert_close(ys.lead[-1].data, jnp.array([jnp.cos(1.0), -jnp.sin(1.0)]))
    assert_close(ys.p[-1], -jnp.sin(1.0))
    assert ys.lead[0].layout == v.layout


def test_numbers_are_set_behind_leading_axes():
    v = vector(lead=(2,))
    assert_same(v.at[..., 2:5].set(0.0).data, v.data.at[:, 2:5].set(0.0))
    assert_same(v.at[LAYOUT.mask("b.d")].add(1.0).data, v.data.at[:, -1].add(1.0))


def test_some_parts_are_picked():
    v = vector(lead=(3,))
    some = v.pick("b.d", "a")
    assert some.layout == fl.Layout({"b": {"d": ()}, "a": (2, 3)})
    assert_same((some.b.d, some.a), (v.b.d, v.a))
    assert_same(v.pick("b").data, v.b.data)
    assert v.pick().shape == (3, 0)
    gradient = jax.grad(lambda v: (v.pick("b.c", "b.d").data ** 2).sum())(v)
    assert_same(gradient.data, jnp.where(jnp.asarray(LAYOUT.mask("b")), 2 * v.data, 0.0))
    for paths in [("a", "a"), ("b", "b.c"), ("b.c", "b")]:
        with pytest.raises(ValueError, match="do not overlap, found 'b?"):
            v.pick(*paths)
    with pytest.raises(KeyError, match="nearest: b.c|no name 'cc'; the nearest: c"):
        v.pick("b.cc")
    with pytest.raises(TypeError, match=r'v.pick\("a", "b"\)'):
        v[["a", "b"]]


def test_parts_of_stacks_and_ties_are_picked():
    blocks = fl.Layout({"w": (2,), "b": ()}).stack(3)
    layout = fl.Layout({"blocks": blocks, "x": (), "y": (), "z": ()}).tie({"y": "x", "z": "x"})
    v = fl.ComponentVector(jnp.arange(10.0), layout)
    some = v.pick("z", "blocks.b", "y")
    assert some.layout == fl.Layout({"z": (), "blocks": fl.Layout({"b": ()}).stack(3), "y": ()}).tie(
        {"y": "z"}
    )
    assert_same((some.z, some.blocks.b, some.y), (v.z, v.blocks.b, v.y))


def test_a_truth_value_is_that_of_one_number():
    assert bool(fl.ComponentVector.of({"a": 1.0}) > 0)
    with pytest.raises(ValueError, match=r"found 10: use `jnp.all\(v\)`"):
        bool(vector() > 0)


def test_a_reduction_by_a_tree_map_is_no_vector():
    norms = jax.tree.map(jnp.linalg.norm, vector())
    assert "float64[], not the 10 numbers of its layout" in repr(norms)
    with pytest.raises(ValueError, match=r"expected data of shape \(..., 10\), found shape \(\)"):
        _ = norms.a


def test_unknown_names():
    with pytest.raises(AttributeError, match="nearest: c"):
        _ = vector().b.cc
    with pytest.raises(KeyError, match="nearest: c"):
        vector()["b.cc"]
    assert not hasattr(vector(), "x")
    assert not hasattr(vector(), "_x")
    assert "b.c" in vector()
    assert {"a", "b", "data"} <= set(dir(vector()))


# New vectors


def test_at_and_replace():
    v = vector()
    assert_same(v.at["b.c"].set(jnp.arange(3.0)).b.c, jnp.arange(3.0))
    assert_same(v.at["a"].add(1.0).a, v.a + 1)
    assert_same(v.at["a"].multiply(jnp.arange(3.0)[None]).a, v.a * jnp.arange(3.0)[None])
    assert_same(v.at["b"].get().data, v.b.data)
    assert_same(v.at["b"].multiply(0.0).b.data, jnp.zeros(4))
    assert_same(v.at["b"].set({"c": [1, 2, 3], "d": 4}).b.data, jnp.arange(1.0, 5.0))
    assert_same(v.at["b"].add(v.b).b.data, 2 * v.b.data)
    assert_same(v.at[2:4].set(0).data, v.data.at[2:4].set(0.0))
    assert_same(v.at[LAYOUT.mask("b")].get(), v.data[6:])
    new = v.replace(a=0.0, b={"c": 1.0, "d": 2.0})
    assert_same(new.data, jnp.array([0.0] * 6 + [1.0] * 3 + [2.0]))
    assert new.layout == v.layout
    assert_same(v.replace(a=0.0).b.data, v.b.data)


def test_at_with_leading_axes_stacks_and_ties():
    many = vector(lead=(4,))
    assert_same(many.at["b.c"].set(jnp.ones(3)).b.c, jnp.ones((4, 3)))
    layout = fl.Layout({"s": fl.Layout({"w": (2,), "b": ()}).stack(3), "t": (3, 2)}).tie({"t": "s.w"})
    v = fl.ComponentVector.zeros(layout)
    assert_same(v.at["s.w"].set(1.0).t, jnp.ones((3, 2)))
    assert_same(v.at["t"].add(2.0).s.w, 2 * jnp.ones((3, 2)))
    assert_same(v.at["s"].set({"w": 1.0, "b": jnp.arange(3.0)}).s.b, jnp.arange(3.0))


def test_at_says_what_is_wrong():
    v = vector()
    with pytest.raises(ValueError, match=r"\(2, 3\) for 'a', found shape \(4,\)"):
        v.at["a"].set(jnp.ones(4))
    with pytest.raises(KeyError, match="'b.d'"):
        v.at["b"].set({"c": 1.0})
    with pytest.raises(KeyError, match="'b.e'"):
        v.at["b"].set({"c": 1.0, "d": 1.0, "e": 1.0})
    with pytest.raises(TypeError, match="'b' is a group"):
        v.at["b"].set(jnp.ones(4))
    with pytest.raises(TypeError, match="same layout"):
        v.at["b"].set(v)
    with pytest.raises(KeyError, match="nearest: a"):
        v.replace(aa=1.0)
    with pytest.raises(AttributeError, match="replace"):
        v.a = 3


def test_map():
    v = vector()
    assert_same(v.map(jnp.sin).data, jnp.sin(v.data))
    assert v.map(lambda x: x > 0).dtype == bool
    with pytest.raises(ValueError, match="elementwise"):
        v.map(jnp.sum)


# A pytree with one leaf


def test_one_leaf():
    v = vector()
    assert len(jax.tree.leaves(v)) == 1
    assert_same(jax.tree.map(lambda x: 2 * x, v).a, 2 * v.a)
    ((path, _),) = jax.tree_util.tree_leaves_with_path(v)
    assert jax.tree_util.keystr(path) == ".data"


def test_equal_layouts_built_twice_compile_once():
    traces = []

    @jax.jit
    def f(v):
        traces.append(v)
        return v.a.sum()

    for _ in range(2):
        f(fl.ComponentVector.zeros(fl.Layout({"a": (2, 3), "b": {"c": (3,), "d": ()}})))
    assert len(traces) == 1


def test_transformations():
    v = vector()
    jitted = jax.jit(lambda v: v.replace(a=0.0), donate_argnums=0)(vector())
    assert_same(jitted.b.data, v.b.data)
    carried, _ = jax.lax.scan(lambda v, _: (v + v.map(jnp.cos), None), v, None, length=3)
    assert carried.layout == v.layout
    assert_same(jax.grad(jax.checkpoint(by_unpacking))(v), jax.grad(by_unpacking)(v))
    assert jax.vmap(lambda v, x: v * x, (None, 0))(v, jnp.arange(3.0)).shape == (3, 10)
    assert jax.eval_shape(lambda v: v.b, v).shape == (4,)
    assert "b" in repr(jax.eval_shape(lambda v: v, v))
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda v: 2 * v,
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
    )
    assert_same(mapped(v).data, 2 * v.data)


def test_no_leaks():
    with jax.checking_leaks():
        v = vector()
        jax.jit(jax.grad(by_unpacking))(v)
        jax.jit(jax.vmap(jax.grad(by_views)))(vector(lead=(3,)))
        jax.lax.scan(lambda v, _: (v + jax.grad(by_unpacking)(v), v.b.d), v, None, length=2)


def test_copies_and_pickles():
    v = vector()
    for other in (pickle.loads(pickle.dumps(v)), copy.copy(v), copy.deepcopy(v)):
        assert_same(other, v)
        assert other.layout == v.layout


def test_a_float32_vector_stays_float32():
    v = vector(dtype=jnp.float32)
    for w in (
        v + 1,
        2.0 * v,
        v**2,
        -v,
        v.at["a"].set(1.0),
        v.replace(a=[[1, 2, 3], [4, 5, 6]]),
        v.map(jnp.sin),
    ):
        assert w.dtype == jnp.float32
    assert v.unpack().a.dtype == jnp.float32


# What once went wrong


def test_vectors_cannot_be_taken_apart_by_hand():
    v = vector()
    with pytest.raises(AttributeError, match="immutable"):
        del v.data
    with pytest.raises(TypeError, match=r"fl\.hessian"):
        _ = jax.hessian(by_views)(v).a
    assert fl.ComponentVector.zeros(fl.Layout({"self": ()})).replace(self=3.0).data == 3
    assert_same(LAYOUT.unpack(v), v.unpack())


# Abstract vectors


@pytest.mark.parametrize("lead", [(), (5, 2)])
def test_views_of_an_abstract_vector_are_shapes(lead):
    v = vector(lead=lead)
    a = jax.eval_shape(lambda: v)
    for path in ("a", "b", "b.c", "b.d"):
        assert jax.tree.leaves(a[path]) == jax.tree.leaves(jax.eval_shape(lambda path=path: v[path]))
    assert a.b.c == jax.ShapeDtypeStruct((*lead, 3), v.dtype)
    assert a.b.layout == LAYOUT["b"]
    assert a.unpack().b.d.shape == a.to_dict()["b"]["d"].shape == lead
    assert a.pick("b.d", "a").data.shape == (*lead, 7)
    assert a.pick("b.d", "a").layout == v.pick("b.d", "a").layout
    assert a[..., 2:5].shape == (*lead, 3)
    assert a[LAYOUT.mask("b")].shape == (*lead, 4)
    assert (a.shape, a.dtype, a.size, a.ndim) == (v.shape, v.dtype, v.size, v.ndim)
    if lead:
        assert a.lead[0].data.shape == (2, 10)
        assert a.lead[1:, 0].b.d.shape == (4,)
    with pytest.raises(AttributeError, match="no name 'e'"):
        _ = a.e


@pytest.mark.parametrize(
    "compute",
    [
        lambda v: v + 1,
        lambda v: 2.0 ** abs(-v) // v,
        lambda v: (v == v) & ~(v < v.data.dtype.type(0)),
        lambda v: np.ones(10) - v,
        lambda v: v @ v,
        lambda v: v @ np.ones((10, 3)),
        lambda v: round(v, 1),
        lambda v: v.map(jnp.sin),
        lambda v: v.at["b.c"].set(1.0).at[2:4].add(1.0).replace(a=0.0),
        lambda v: v.at["b"].multiply({"c": np.ones(3), "d": 2.0}),
    ],
)
def test_operations_on_an_abstract_vector_are_those_of_the_numbers(compute):
    v = vector()
    found, expected = compute(jax.eval_shape(lambda: v)), compute(v)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("call", [float, int, complex, bool])
def test_an_abstract_number_is_not_known(call):
    one = jax.eval_shape(lambda: fl.ComponentVector.of({"a": 1.0}))
    with pytest.raises(TypeError, match="expected a number that is known, found ShapeDtypeStruct"):
        call(one)


def test_an_abstract_model_has_views_and_computes_nothing(key):
    model = fl.Chain(encoder=fl.Dense(3, 2), blocks=fl.Repeated(fl.Dense(2, 2), 4))
    ps, _ = jax.eval_shape(lambda: fl.setup(key, model))
    assert ps.encoder.weight.shape == (2, 3)
    real = fl.setup(key, model)[0]
    for path, _ in ps.layout.slots():
        assert (ps[path].shape, ps[path].dtype) == (real[path].shape, real[path].dtype)
    assert jax.tree.structure(ps.encoder) == jax.tree.structure(real.encoder)
