"""Exported programs: their signature is read in another process, which knows the layouts."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import flatlayers as fl
from tests.helpers import assert_close, assert_same
from tests.vectors.layouts import autoencoder


pytest.importorskip("flatbuffers", reason="jax.export writes with it")

READER = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.export, jax.numpy as jnp, numpy as np
import flatlayers as fl

exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
ps = fl.load(sys.argv[2])["ps"]
y, st = exported.call(ps, fl.Record(training=True, count=jnp.zeros(())), jnp.ones((5, 3)))
gradient = jax.grad(lambda ps: jnp.sum(exported.call(ps, st, jnp.ones((5, 3)))[0]))(ps)
fl.save(sys.argv[2], y=y, st=st, gradient=gradient)
"""


@pytest.mark.slow
def test_an_exported_model_runs_in_another_process(tmp_path):
    model = fl.Chain(fl.Dense(3, 4, jnp.tanh), head=fl.Dense(4, 2))
    ps, st = fl.setup(jax.random.key(0), model, dtype=float)

    def predict(ps, counter, x):
        y, _ = model(x, ps, st)
        return y, counter.replace(count=counter.count + 1)

    counter, x = fl.Record(training=True, count=jnp.zeros(())), jnp.ones((5, 3))
    exported = jax.export.export(jax.jit(predict))(ps, counter, x)
    program, numbers = tmp_path / "program", tmp_path / "numbers"
    program.write_bytes(exported.serialize(vjp_order=1))
    fl.save(numbers, ps=ps)
    subprocess.run([sys.executable, "-c", READER, program, numbers], check=True)
    found = fl.load(numbers)
    assert_close(found["y"], predict(ps, counter, x)[0])
    assert_same(found["st"], counter.replace(count=jnp.ones(())))
    assert_close(found["gradient"], jax.grad(lambda ps: jnp.sum(predict(ps, counter, x)[0]))(ps))


@pytest.mark.parametrize("lead", [(), (2,)])
def test_layouts_come_back_equal(lead):
    tied = autoencoder().tie({"decoder.weight": "encoder.weight"})
    layout = fl.Layout({"µ".upper(): (2,), "blocks": tied.stack(3), "empty": {}})
    v = fl.ComponentVector(jnp.ones((*lead, layout.length)), layout)
    record = fl.Record(inner={"flag": False, "mode": "train", "nothing": None, "x": jnp.ones(2)})
    tree = {"v": v, "record": record, "H": fl.ComponentMatrix(jnp.ones((3, 2)), *_two_layouts())}
    exported = jax.export.export(jax.jit(lambda tree: tree))(tree)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == jax.tree.structure(((tree,), {}))
    assert again.out_tree == jax.tree.structure(tree)
    found = again.call(tree)
    assert found["v"].layout == layout
    assert found["record"] == record
    assert found["H"].rows == _two_layouts()[0]
    np.testing.assert_array_equal(found["H"].data, 1.0)


def test_another_layout_is_refused():
    v = fl.ComponentVector(jnp.ones(3), fl.Layout({"a": (3,)}))
    again = jax.export.deserialize(jax.export.export(jax.jit(lambda v: v))(v).serialize())
    with pytest.raises(ValueError, match=r"(?s)a=\(3,\).*b=\(3,\)|b=\(3,\).*a=\(3,\)"):
        again.call(fl.ComponentVector(jnp.ones(3), fl.Layout({"b": (3,)})))


def _two_layouts():
    return fl.Layout({"a": (3,)}), fl.Layout({"b": (), "c": (1,)})
