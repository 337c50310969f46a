"""Weights by the names of PyTorch, with NumPy's arrays for tensors."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


def arrays(shapes, dtype=np.float32):
    """Different numbers for each name."""
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.5, 1.5, shape).astype(dtype) for name, shape in shapes.items()}


def taken(layer, state_dict, names=None, dtype=jnp.float32):
    ps = fl.ComponentVector.zeros(layer.layout, dtype)
    return fl.from_torch(state_dict, layer, ps, fl.initial_states(jax.random.key(0), layer), names)


def lines(layer, state_dict, names=None, dtype=jnp.float32):
    with pytest.raises(fl.LayoutMismatchError) as caught:
        taken(layer, state_dict, names, dtype)
    assert all(line in str(caught.value) for line in caught.value.lines)
    return caught.value.lines


TWO = fl.Chain(fl.Dense(3, 2, jnp.tanh), fl.Dense(2, 1))
SHAPES = {"0.weight": (2, 3), "0.bias": (2,), "2.weight": (1, 2), "2.bias": (1,)}
NAMES = {"layer_0": "0", "layer_1": "2"}


@pytest.mark.parametrize("names", [None, NAMES])
def test_the_formula_of_two_dense_layers(names):
    given, x = arrays(SHAPES), np.ones((5, 3), np.float32)
    ps, st = taken(TWO, given, names)
    hidden = np.tanh(x @ given["0.weight"].T + given["0.bias"])
    expected = hidden @ given["2.weight"].T + given["2.bias"]
    np.testing.assert_allclose(TWO(x, ps, st)[0], expected, rtol=1e-6)


def test_the_formula_of_a_cross_correlation_and_of_running_values():
    """One axis, channels first there; a counter is no number of ours."""
    layer = fl.Chain(conv=fl.Conv((3,), 2, 4), norm=fl.BatchNorm(4))
    shapes = {"conv.weight": (4, 2, 3), "conv.bias": (4,)}
    given = arrays(
        shapes | {f"norm.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
    )
    ps, st = taken(layer, given | {"norm.num_batches_tracked": np.array(7)})
    x = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    windows = np.stack([x[i : i + 3].T for i in range(4)])
    y = np.einsum("tik,oik->to", windows, given["conv.weight"]) + given["conv.bias"]
    z = (y - given["norm.running_mean"]) / np.sqrt(given["norm.running_var"] + 1e-5)
    expected = z * given["norm.weight"] + given["norm.bias"]
    np.testing.assert_allclose(layer(x, ps, fl.testmode(st))[0], expected, rtol=1e-5)


def test_each_wrong_name_has_a_line():
    given = arrays(SHAPES)
    wrong = {**given, "2.weight": np.ones((1, 3), np.float32), "3.weight": np.ones(2, np.float32)}
    del wrong["0.bias"]
    assert lines(TWO, wrong, NAMES) == [
        "0.bias: expected (2,) for layer_0.bias, found none",
        "2.weight: expected (1, 2) for layer_1.weight, found (1, 3)",
        "3.weight: (2,) is left over",
    ]


def test_one_of_two_hundred_names_is_missing():
    layer = fl.Chain(*[fl.Dense(3, 3)] * 100)
    given = arrays(
        {f"{i}.{n}": (3, 3) if n == "weight" else (3,) for i in range(100) for n in ("weight", "bias")}
    )
    assert taken(layer, given)[0].size == 1200
    del given["57.bias"]
    names = {f"layer_{i}": str(i) for i in range(100)}
    assert lines(layer, given, names) == ["57.bias: expected (3,) for layer_57.bias, found none"]
    (line,) = lines(layer, given)
    assert line.startswith("layer_57 (Dense): expected weight: (3, 3), bias: (3,) next, found 57.weight")


def test_a_kernel_is_expected_in_the_shape_it_has_there():
    given = arrays({"weight": (4, 3, 2, 3), "bias": (4,)})
    assert lines(fl.Conv((2, 3), 5, 4), given, {}) == [
        "weight: expected (4, 5, 2, 3) for weight, found (4, 3, 2, 3)"
    ]
    assert lines(
        fl.MultiHeadAttention(4, heads=2), arrays({"in_proj_weight": (8, 4), "out_proj.weight": (4, 4)}), {}
    ) == [f"in_proj_weight: expected (12, 4) for {name}_proj.weight, found (8, 4)" for name in "qkv"]


def test_numbers_are_never_rounded():
    assert lines(TWO, arrays(SHAPES, np.float64), NAMES)[0] == (
        "0.weight: expected float32 or less for layer_0.weight, found float64"
    )
    assert len(lines(TWO, arrays(SHAPES, np.int32), NAMES)) == 4
    given = arrays(SHAPES, np.float32)
    ps, _ = taken(TWO, given, NAMES, jnp.float64)
    assert ps.dtype == jnp.float64
    assert (np.asarray(ps.layer_0.weight) == given["0.weight"]).all()


def test_a_path_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(KeyError, match="names: no name 'layer_2'; the nearest: layer_"):
        taken(TWO, arrays(SHAPES), {"layer_0": "0", "layer_2": "2"})


def test_what_is_no_vector_or_no_array_is_refused():
    given, (ps, st) = arrays(SHAPES), fl.setup(jax.random.key(0), TWO)
    with pytest.raises(TypeError, match="expected the parameters of the model, a ComponentVector"):
        fl.from_torch(given, TWO, ps.unpack(), st)
    with pytest.raises(TypeError, match="expected the same layout"):
        fl.from_torch(given, fl.Dense(3, 2), ps, st)
    with pytest.raises(ValueError, match="without leading axes"):
        fl.from_torch(given, TWO, fl.ComponentVector(ps.data[None], ps.layout), st)
    with pytest.raises(TypeError, match="0.weight: expected a tensor or an array, found 'x'"):
        fl.from_torch({**given, "0.weight": "x"}, TWO, ps, st)
    with pytest.raises(TypeError, match="expected names of arrays, found 0"):
        fl.from_torch({0: given["0.weight"]}, TWO, ps, st)
    with pytest.raises(TypeError, match="expected a layer, found {a: Dense"):
        fl.from_torch(given, {"a": fl.Dense(3, 2)}, ps, st)
    for wrong in ({0: "0"}, {"layer_0": None}, ["0", "2"]):
        with pytest.raises(TypeError, match="names: expected a mapping of paths to names, all strings"):
            fl.from_torch(given, TWO, ps, st, wrong)
    with pytest.raises(TypeError, match="expected a mapping of names to arrays, found Taken, whose method"):
        fl.from_torch(Taken(), TWO, ps, st)
    with pytest.raises(TypeError, match="0.bias: expected a tensor or an array, .* known only when it runs"):
        jax.jit(lambda given: fl.from_torch(given, TWO, ps, st)[0])(given)
    norm = fl.BatchNorm(2)
    with pytest.raises(ValueError, match="expected the state of the model, with 'running_mean'"):
        fl.from_torch({}, norm, fl.ComponentVector.zeros(norm.layout, jnp.float32), fl.Record())


class Taken:
    """A module in the place of its `state_dict`."""

    def state_dict(self):
        return {}


def test_tensors_without_numbers_that_numpy_can_hold():
    torch = pytest.importorskip("torch")
    dense = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    layer = fl.Dense(3, 2)
    for tensor in (torch.ones(2, 3, device="meta"), torch.ones(2, 3).to_sparse()):
        with pytest.raises(TypeError, match="weight: expected a tensor that NumPy can hold"):
            taken(layer, {**dense, "weight": tensor})
    negative = torch.full((2, 3), 1j).conj().imag
    assert (taken(layer, {**dense, "weight": negative})[0].weight == -1).all()
    ps, st = taken(layer, dense)
    with pytest.raises(TypeError, match="expected parameters whose numbers are known"):
        fl.to_torch(layer, jax.eval_shape(lambda: ps), st)
    with pytest.raises(TypeError, match="expected parameters whose numbers are known"):
        jax.jit(lambda ps: fl.to_torch(layer, ps, st))(ps)


def test_a_part_alone():
    """The vector of a part is a view, and goes back by its name."""
    model = fl.Chain(encoder=TWO, head=fl.SplineLayer((0.0, 1.0), 1))
    ps, st = fl.setup(jax.random.key(0), model)
    given = arrays(SHAPES)
    assert lines(model, given)[0].startswith("head.points: ")
    encoder, _ = fl.from_torch(given, model.encoder, ps.encoder, st.encoder)
    new = ps.replace(encoder=encoder)
    assert (new.encoder.layer_1.weight == given["2.weight"]).all()
    assert (new.head.data == ps.head.data).all()


def test_values_inside_of_bounds_become_free_numbers():
    class Decay(fl.Layer):
        def parameters(self):
            return {"rate": fl.Param((), fl.initializers.ones, bounds=(0, None))}

        def torch_names(self):
            return {"rate": "rate"}

    ps, _ = taken(Decay(), {"rate": np.full((), 2, np.float32)}, {})
    np.testing.assert_allclose(fl.constrained(Decay(), ps).rate, 2.0, rtol=1e-6)


def test_tied_names_need_one_of_two():
    model = fl.share_parameters(fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)), {"b.weight": "a.weight"})
    given = arrays({"a.weight": (2, 2), "a.bias": (2,), "b.bias": (2,)})
    other = {("b.weight" if k == "a.weight" else k): v for k, v in given.items()}
    for alone, names in ((given, {}), (given, None), (other, {}), (other, None)):
        ps, _ = taken(model, alone, names)
        assert (ps.a.weight == given["a.weight"]).all()
        assert (ps.b.weight == given["a.weight"]).all()
    with pytest.raises(ValueError, match="have one place: expected equal values"):
        taken(model, given | {"b.weight": given["a.weight"] + 1}, {})


def test_to_torch_without_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="expected PyTorch, found none; `pip install torch`"):
        fl.to_torch(TWO, *fl.setup(jax.random.key(0), TWO))


def test_tensors_of_half_precisions_come_and_go():
    torch = pytest.importorskip("torch")
    for theirs, ours in ((torch.bfloat16, jnp.bfloat16), (torch.float16, jnp.float16)):
        module = torch.nn.Linear(3, 2).to(theirs)
        layer = fl.Dense(3, 2)
        ps, st = taken(layer, module.state_dict(), {}, ours)
        back = fl.to_torch(layer, ps, st)
        assert all(
            torch.equal(back[k], v) and back[k].dtype == theirs for k, v in module.state_dict().items()
        )


def test_every_bit_comes_back():
    """Signs of zeros, numbers below the normal ones and the bits of a NaN among them."""
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 24, np.uint32)
    bits[:4] = 0x80000000, 0x00000001, 0x7FC00123, 0xFF800000
    layer = fl.Conv((2, 3), 2, 2, use_bias=False)
    given = {"weight": torch.from_numpy(bits.view(np.float32).reshape(2, 2, 2, 3))}
    back = fl.to_torch(layer, *taken(layer, given))
    assert (back["weight"].numpy().view(np.uint32).ravel() == bits).all()


def test_a_new_module_takes_what_to_torch_gives():
    """Names of a `Sequential` with modules for functions; in memory of its own; copies have numbers."""
    torch = pytest.importorskip("torch")
    layer = fl.Chain(fl.Dense(3, 4), jnp.tanh, fl.BatchNorm(4), fl.Dense(4, 2))
    ps, st = fl.setup(jax.random.key(0), layer)
    nn = torch.nn
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    state_dict = fl.to_torch(layer, ps, st)
    module.load_state_dict(state_dict)
    x = np.ones((5, 3), np.float32)
    y, _ = layer(x, ps, fl.testmode(st))
    np.testing.assert_allclose(module.eval()(torch.from_numpy(x)).detach(), y, rtol=1e-6, atol=1e-6)
    before = np.asarray(ps.data).copy()
    state_dict["0.weight"].zero_()
    assert (np.asarray(ps.data) == before).all()
    layer = fl.Repeated(fl.Dense(2, 2), 3)
    blocks = fl.to_torch(layer, *fl.setup(jax.random.key(0), layer))
    assert list(blocks) == [f"layer.{i}.{name}" for i in range(3) for name in ("weight", "bias")]


def test_two_parameters_for_one_name_are_refused():
    pytest.importorskip("torch")
    ps, st = fl.setup(jax.random.key(0), layer := fl.Chain(fl.Dense(2, 2), fl.Dense(2, 2)))
    with pytest.raises(
        ValueError, match=r"one.weight: expected one parameter, or equal ones, found layer_1.w"
    ):
        fl.to_torch(layer, ps, st, {"layer_0": "one", "layer_1": "one"})
