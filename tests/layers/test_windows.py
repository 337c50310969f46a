import math

import jax
import numpy as np
import pytest

import flatlayers as fl
from flatlayers.layers.windows import Windows, paddings
from tests.helpers import assert_close
from tests.layers.test_convolution import example


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_pad(stride, kernel, dilation):
    options = {"stride": stride, "pad": fl.SamePad(), "dilation": dilation}
    for size in (6, 7):
        x = jax.ShapeDtypeStruct((size, 1), "float32")
        for layer in (fl.Conv, fl.CrossCor, fl.DepthwiseConv):
            assert fl.output_shape(layer((kernel,), 1, 1, **options), x) == (math.ceil(size / stride), 1)
        assert fl.output_shape(fl.ConvTranspose((kernel,), 1, 1, **options), x) == (size * stride, 1)


def test_same_pad_rounds_the_low_half_up(key):
    for kernel, dilation, pad in ((4, 1, (2, 1)), (2, 3, (2, 1)), (3, 1, (1, 1))):
        same = fl.CrossCor((kernel,), 1, 1, dilation=dilation, pad=fl.SamePad())
        ps, st, x = example(same, (6,))
        given = fl.CrossCor((kernel,), 1, 1, dilation=dilation, pad=pad)
        assert_close(same(x, ps, st)[0], given(x, ps, st)[0])
    # A total of dilation * (kernel - 1) + 1 - stride = 3.
    same = fl.ConvTranspose((5,), 1, 1, stride=2, pad=fl.SamePad())
    ps, st, x = example(same, (6,))
    given = fl.ConvTranspose((5,), 1, 1, stride=2, pad=(2, 1))
    assert_close(same(x, ps, st)[0], given(x, ps, st)[0])


def test_same_pad_of_a_stride_longer_than_the_kernel_adds_zeros():
    layer = fl.ConvTranspose((1,), 1, 1, stride=3, pad=fl.SamePad(), use_bias=False)
    ps, st, x = example(layer, (2,))
    (y,) = layer(x, ps, st)[0].T
    a, b = (ps.weight[0, 0, 0] * x[:, 0]).tolist()
    # A total of -2: one zero at the low end, one at the high end.
    np.testing.assert_allclose(y, [0, a, 0, 0, b, 0])


def test_where_windows_end():
    windows = Windows((3, 2), (1, 1), (2, 3), ((1, 0), (0, 0)))
    assert windows.span == (5, 4)
    windows.check((4, 4), "kernel")
    with pytest.raises(ValueError, match=r"as long as the kernel, which spans \(5, 4\), found \(4, 4\)"):
        windows.check((3, 4), "kernel")


@pytest.mark.parametrize(
    ("pad", "expected"),
    [
        (1, ((1, 1), (1, 1))),
        ((1, 2), ((1, 1), (2, 2))),
        ((1, 2, 3, 4), ((1, 2), (3, 4))),
        (fl.SamePad(), ((2, 1), (1, 1))),
    ],
)
def test_paddings(pad, expected):
    assert paddings(pad, (3, 2), "pad") == expected
