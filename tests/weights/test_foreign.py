"""Layers of a user's own say their names; names reach into containers, wrappers and stacks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl


class Scale(fl.Layer):
    dims: int

    def parameters(self):
        return {"scale": fl.Param((self.dims,), fl.initializers.ones)}

    def states(self, key):
        return {"count": jnp.zeros(())}

    def forward(self, x, ps, st):
        return ps.scale * x, st

    def torch_names(self):
        return {"scale": "gamma", "count": "seen"}


class Gated(fl.Container):
    """A container with a parameter of its own, whose layers speak for themselves."""

    encoder: fl.Layer
    experts: tuple[fl.Layer, ...]

    def parameters(self):
        return {**super().parameters(), "gain": fl.Param((), fl.initializers.ones)}

    def torch_names(self):
        return {"gain": "log_gain"}


class Fused(fl.Container):
    """One array there for two layers here."""

    a: fl.Layer
    b: fl.Layer

    def torch_names(self):
        return {
            "a.weight": fl.Foreign("both", part=(0, 2)),
            "b.weight": fl.Foreign("both", np.negative, np.negative, part=(1, 2)),
        }


def taken(layer, state_dict, names=None):
    ps = fl.ComponentVector.zeros(layer.layout, jnp.float32)
    return fl.from_torch(state_dict, layer, ps, fl.initial_states(jax.random.key(0), layer), names)


def test_a_parameter_and_a_state_of_a_layer_of_ones_own():
    given = {"gamma": np.full(2, 3, np.float32), "seen": np.full((), 5, np.float32)}
    ps, st = taken(Scale(2), given)
    assert (ps.scale == 3).all()
    assert float(st.count) == 5


def test_what_a_container_leaves_out_is_asked_of_its_layers():
    layer = Gated(fl.Dense(2, 2), (Scale(2), Scale(3)))
    given = {
        "log_gain": np.full((), 7, np.float32),
        "encoder.weight": np.full((2, 2), 2, np.float32),
        "encoder.bias": np.full(2, 2, np.float32),
    }
    for i, n in enumerate((2, 3)):
        given |= {
            f"experts.{i}.gamma": np.full(n, i, np.float32),
            f"experts.{i}.seen": np.full((), i, np.float32),
        }
    ps, st = taken(layer, given)
    assert (float(ps.gain), float(ps.encoder.bias[0]), float(ps.experts.layer_1.scale[0])) == (7, 2, 1)
    assert float(st.experts.layer_1.count) == 1
    renamed = {name.replace("encoder", "enc").replace("experts.1", "last"): v for name, v in given.items()}
    again, _ = taken(layer, renamed, {"encoder": "enc", "experts.layer_1": "last"})
    assert (again.data == ps.data).all()


def test_parts_of_one_array_with_a_turn():
    layer = Fused(fl.Dense(2, 3, use_bias=False), fl.Dense(2, 3, use_bias=False))
    both = np.arange(12.0, dtype=np.float32).reshape(6, 2)
    ps, _ = taken(layer, {"both": both})
    assert (ps.a.weight == both[:3]).all()
    assert (ps.b.weight == -both[3:]).all()
    # The layers inside have names, too, if one gives them.
    ps, _ = taken(layer, {"x.weight": both[:3], "y.weight": both[3:]}, {"a": "x", "b": "y"})
    assert (ps.b.weight == both[3:]).all()


def test_the_name_of_one_array():
    layer = fl.Chain(fl.Dense(2, 2))
    given = {"w": np.ones((2, 2), np.float32), "0.bias": np.ones(2, np.float32)}
    ps, _ = taken(layer, given, {"layer_0.weight": "w"})
    assert (ps.data == 1).all()


def test_copies_of_a_stack_have_numbers():
    layer = fl.Chain(blocks=fl.Repeated(fl.Chain(fc=fl.Dense(2, 2), scale=Scale(2)), 3))
    given = {}
    for i in range(3):
        given |= {
            f"h.{i}.fc.weight": np.full((2, 2), i, np.float32),
            f"h.{i}.fc.bias": np.full(2, i, np.float32),
            f"h.{i}.scale.gamma": np.full(2, i, np.float32),
            f"h.{i}.scale.seen": np.full((), i, np.float32),
        }
    for name in ("h", "h.{}"):
        ps, st = taken(layer, given, {"blocks.layer": name})
        assert [float(b[0]) for b in ps.blocks.layer.fc.bias] == [0, 1, 2]
        assert list(st.blocks.layer.scale.count) == [0, 1, 2]
    given.pop("h.1.scale.gamma")
    with pytest.raises(fl.LayoutMismatchError) as caught:
        taken(layer, given, {"blocks.layer": "h"})
    assert caught.value.lines == [
        "h.1.scale.gamma: expected (2,) for blocks.layer.scale.scale[1], found none"
    ]


def test_copies_with_a_state_alone():
    layer = fl.Repeated(fl.BatchNorm(2, affine=False), 2)
    given = {f"{i}.running_{name}": np.full(2, i, np.float32) for i in range(2) for name in ("mean", "var")}
    _, st = taken(layer, given, {"layer": ""})
    assert st.layer.running_var.tolist() == [[0, 0], [1, 1]]
    shared = fl.Repeated(fl.BatchNorm(2), 2, shared=True)
    given = {name: np.ones(2, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(
        fl.LayoutMismatchError, match=r"running_mean: expected \(2, 2\) for layer.running_mean"
    ):
        taken(shared, given, {"layer": ""})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: fl.NeuralODE(m),
        lambda m: fl.DebugLayer(m, "here"),
        lambda m: fl.AlternatePrecision(m, jnp.float32),
    ],
)
def test_wrappers_have_the_names_of_what_is_inside(wrap):
    given = {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    assert (taken(wrap(fl.Dense(2, 2)), given)[0].data == 1).all()


def test_a_compact_layer_and_a_frozen_one_afterwards():
    @fl.compact(fc=fl.Dense(2, 2), gain=fl.Param((), fl.initializers.ones))
    def model(m, x):
        return m.gain * m.fc(x)

    given = {"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.ones(2, np.float32)}
    with pytest.raises(fl.LayoutMismatchError, match="gain: .* has no name there"):
        taken(model, given)
    ps, st = fl.setup(jax.random.key(0), model)
    fc, _ = fl.from_torch(given, fl.Dense(2, 2), ps.fc, st.fc)
    tuned, trained, st = fl.freeze_parameters(model, "fc.*", ps.replace(fc=fc), st)
    assert float(tuned(jnp.ones(2, jnp.float32), trained, st)[0][0]) == 3


def test_parameters_without_a_name_there_are_named():
    for layer in (fl.WeightNorm(fl.Dense(2, 2), "weight"), fl.Chain(fl.Diagonal(2), fl.Dense(2, 2))):
        with pytest.raises(fl.LayoutMismatchError, match="expected layers that PyTorch has, too") as caught:
            taken(layer, {})
        assert len(caught.value.lines) == 2
        assert caught.value.lines[0].endswith(
            "has no name there; its layer can give one in a method `torch_names`"
        )
    # Their numbers are those of the weight times another one.
    normed = fl.SpectralNorm(fl.Dense(2, 2), "weight")
    with pytest.raises(fl.LayoutMismatchError, match=r"weight_u: \(2,\) has no name there"):
        taken(normed, {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)})
    learned = fl.GRU(2, 2, learn_initial_state=True)
    with pytest.raises(fl.LayoutMismatchError, match=r"initial_hidden: \(2,\) has no name there"):
        taken(learned, {})


def test_what_is_frozen_is_taken_into_the_state():
    """A tie of which both names are frozen, copies of a stack, and numbers inside of bounds."""
    stack = fl.Chain(head=fl.Dense(2, 1), blocks=fl.Repeated(fl.freeze(fl.Dense(2, 2), "weight"), 2))
    given = {"head.weight": np.full((1, 2), 5, np.float32), "head.bias": np.full(1, 5, np.float32)}
    for i in range(2):
        given |= {
            f"blocks.layer.{i}.weight": np.full((2, 2), i, np.float32),
            f"blocks.layer.{i}.bias": np.full(2, i + 0.5, np.float32),
        }
    ps, st = taken(stack, given)
    assert st.blocks.layer.frozen.weight[:, 0, 0].tolist() == [0, 1]
    assert ps.blocks.layer.bias[:, 0].tolist() == [0.5, 1.5]

    tied = fl.share_parameters(fl.Chain(a=fl.Dense(2, 2), b=fl.Dense(2, 2)), {"b.weight": "a.weight"})
    frozen = fl.freeze(tied, "*.weight")
    given = {f"{name}.bias": np.ones(2, np.float32) for name in "ab"} | {"a.weight": np.eye(2, dtype="f4")}
    _, st = taken(frozen, given)
    assert st.frozen.a.weight.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(fl.LayoutMismatchError, match="b.weight: expected the numbers that it is tied to"):
        taken(frozen, given | {"b.weight": np.ones((2, 2), np.float32)})

    bounded = fl.freeze(Bounded())
    _, st = taken(bounded, {"rate": np.float32(2)})
    assert float(st.frozen.rate) == 2


class Bounded(fl.Layer):
    def parameters(self):
        return {"rate": fl.Param((), fl.initializers.ones, bounds=(0, None))}

    def torch_names(self):
        return {"rate": "rate"}


def test_a_model_with_a_state_inside_of_a_solver_and_of_a_frozen_layer():
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: np.full(2, i + 1, np.float32) for i, name in enumerate(names)}
    solver = fl.NeuralODE(fl.BatchNorm(2))
    ps, st = taken(solver, given)
    assert ps.scale.tolist() == [1, 1]
    assert st.model.running_var.tolist() == [4, 4]
    _, st = taken(fl.freeze(fl.BatchNorm(2), "bias"), given)
    assert (st.layer.running_mean.tolist(), st.frozen.bias.tolist()) == ([3, 3], [2, 2])


def test_a_part_of_an_array_without_a_parameter_is_refused():
    class Half(Scale):
        def torch_names(self):
            return {"scale": fl.Foreign("both", part=(1, 2)), "count": "seen"}

    with pytest.raises(fl.LayoutMismatchError, match="both: part 0 of 2 has no parameter or state here"):
        taken(Half(2), {"both": np.ones(4, np.float32), "seen": np.ones((), np.float32)})
    attention = fl.MultiHeadAttention(4, heads=2)
    with pytest.raises(fl.LayoutMismatchError, match="in_proj_weight: part 0 of 3 has no parameter"):
        taken(attention, {}, {"q_proj": "query"})


def test_a_foreign_array_that_cannot_be_one_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match="Foreign.name: expected a string or a tuple of them, found 3"):
        fl.Foreign(3)
    with pytest.raises(TypeError, match="Foreign.read: expected a function of 2 arrays"):
        fl.Foreign(("a", "b"))
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="Foreign.part: expected"):
            fl.Foreign("a", part=part)

    class Wrong(Scale):
        def torch_names(self):
            return {"scale": 3}

    with pytest.raises(TypeError, match="Wrong.torch_names: expected a string or a Foreign for 'scale', fo"):
        taken(Wrong(2), {})


def test_an_array_that_is_read_in_another_shape_or_dtype_is_shown_as_read():
    class Turned(Scale):
        turn: Callable[[np.ndarray], np.ndarray] = np.negative

        def torch_names(self):
            return {"scale": fl.Foreign("gamma", self.turn), "count": "seen"}

    given = {"gamma": np.ones(2, np.float32), "seen": np.ones((), np.float32)}
    with pytest.raises(fl.LayoutMismatchError, match=r"found \(2,\), read as float32\[1\]"):
        taken(Turned(2, lambda a: a[:1]), given)
    with pytest.raises(fl.LayoutMismatchError, match=r"found float32, read as float64\[2\]"):
        taken(Turned(2, lambda a: a.astype(float)), given)


def test_a_name_that_the_layer_does_not_have_is_refused():
    class Wrong(Scale):
        def torch_names(self):
            return {"scael": "gamma"}

    with pytest.raises(KeyError, match="Wrong.torch_names: no name 'scael'; the nearest: scale"):
        taken(Wrong(2), {})


def test_without_a_way_back_there_is_none():
    class OneWay(Scale):
        def torch_names(self):
            return {"scale": fl.Foreign("gamma", np.negative)}

    ps, st = taken(OneWay(2), {"gamma": np.ones(2, np.float32)})
    assert (ps.scale == -1).all()
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="scale: expected a Foreign with one name and `write`"):
        fl.to_torch(OneWay(2), ps, st)
