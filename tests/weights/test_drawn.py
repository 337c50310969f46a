"""Round trips of weights over modules of PyTorch that are drawn at random, with the outputs of both."""

import jax
import numpy as np
import pytest

import flatlayers as fl
from tests.weights.drawn import FAMILIES, torch


COUNTER = "num_batches_tracked"


def check(case):
    """Names given and not, the output in test mode, and the way back."""
    module = case.module.eval()
    state_dict = {k: v for k, v in module.state_dict().items() if not k.endswith(COUNTER)}
    ps = fl.ComponentVector.zeros(case.layer.layout, np.float32)
    st = fl.initial_states(jax.random.key(0), case.layer)
    got = fl.from_torch(module.state_dict(), case.layer, ps, st, case.names)
    alone = fl.from_torch(module.state_dict(), case.layer, ps, st)
    assert (alone[0].data == got[0].data).all()
    back = fl.to_torch(case.layer, *got, case.names)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state_dict.items())
    module.load_state_dict(back)
    y, _ = jax.jit(case.layer)(case.x, got[0], fl.testmode(got[1]))
    expected = case.output(module(*case.theirs)).detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("draw", FAMILIES)
def test_one_of_each_family(draw):
    torch.manual_seed(0)
    check(draw(np.random.default_rng(0)))


@pytest.mark.slow
@pytest.mark.parametrize("draw", FAMILIES)
def test_fifteen_of_each_family(draw):
    """225 in all."""
    for seed in range(1, 16):
        torch.manual_seed(seed)
        check(draw(np.random.default_rng(seed)))
