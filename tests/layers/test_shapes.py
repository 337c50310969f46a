import jax.numpy as jnp
import numpy as np
import pytest

from flatlayers.layers.shapes import along_last, as_dims, broadcasts_to, check_count, check_trailing, per_axis


def test_the_last_axes_are_checked():
    check_trailing(jnp.ones((5, 3, 2)), (3, 2))
    check_trailing(1.0, ())
    for x in (jnp.ones((3, 5)), jnp.ones(2), 1.0):
        with pytest.raises(ValueError, match=r"expected x of shape \(..., 3, 2\), found shape"):
            check_trailing(x, (3, 2))


def test_a_parameter_is_the_same_over_leading_axes():
    assert along_last(jnp.ones((3, 2)), 4).shape == (1, 1, 3, 2)
    assert along_last(jnp.ones(2), 1).shape == (2,)


def test_one_size_or_several():
    assert (as_dims(3), as_dims([3, np.int64(2)]), as_dims(())) == ((3,), (3, 2), ())
    assert (per_axis(2, 3, "stride"), per_axis((1, 2), 2, "stride")) == ((2, 2, 2), (1, 2))
    with pytest.raises(ValueError, match=r"stride: expected an integer or 3 of them, found \(1, 2\)"):
        per_axis((1, 2), 3, "stride")


def test_what_broadcasts():
    for shape in ((), (1,), (4,), (3, 1), (2, 3, 4)):
        assert broadcasts_to(shape, (2, 3, 4))
    for shape in ((3,), (2, 4), (1, 2, 3, 4)):
        assert not broadcasts_to(shape, (2, 3, 4))


def test_the_number_of_inputs_is_checked():
    check_count(2, 2, "layer")
    with pytest.raises(ValueError, match="a tuple of 2 inputs, one for each layer, found 3"):
        check_count(3, 2, "layer")
