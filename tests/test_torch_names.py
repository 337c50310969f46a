"""Each name of PyTorch, torchdiffeq and their kin has its row on the page `Coming from PyTorch`, and what the
page says of PyTorch's numbers is so.
"""

import functools
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl


PAGE = (Path(__file__).parent.parent / "docs" / "from-torch.md").read_text()
REASON = "is an optional package"

# For each section of the page: the modules and classes that have the names, and the names. Of layers these
# are all that the reference of `torch.nn` lists, without its base classes.
SOURCES = {
    "Modules and containers": (
        "torch.nn",
        """Module Parameter Buffer Sequential ModuleList ModuleDict ParameterList ParameterDict Identity
        LazyLinear LazyConv1d LazyConv2d LazyConv3d LazyConvTranspose1d LazyConvTranspose2d
        LazyConvTranspose3d LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d LazyInstanceNorm1d
        LazyInstanceNorm2d LazyInstanceNorm3d""",
    ),
    "Linear layers, convolutions and pooling": (
        "torch.nn",
        """Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Unfold Fold
        MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
        AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d
        AdaptiveAvgPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d FractionalMaxPool2d FractionalMaxPool3d""",
    ),
    "Normalisation and dropout": (
        "torch.nn",
        """BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LayerNorm GroupNorm InstanceNorm1d
        InstanceNorm2d InstanceNorm3d RMSNorm LocalResponseNorm CrossMapLRN2d Dropout Dropout1d Dropout2d
        Dropout3d AlphaDropout FeatureAlphaDropout""",
    ),
    "Sequences and attention": (
        "torch.nn",
        """Embedding EmbeddingBag RNN LSTM GRU RNNCell LSTMCell GRUCell MultiheadAttention
        TransformerEncoderLayer TransformerEncoder TransformerDecoderLayer TransformerDecoder Transformer""",
    ),
    "Shapes and padding": (
        "torch.nn",
        """Flatten Unflatten Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle
        ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d
        ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
        CircularPad1d CircularPad2d CircularPad3d""",
    ),
    "Activations": (
        "torch.nn",
        """ReLU ReLU6 LeakyReLU ELU CELU SELU GELU SiLU Mish Hardswish Sigmoid Hardsigmoid LogSigmoid Tanh
        Hardtanh Softplus Softsign Softmax LogSoftmax Softmin Softmax2d GLU PReLU Tanhshrink Hardshrink
        Softshrink Threshold RReLU""",
    ),
    "Losses": (
        "torch.nn",
        """MSELoss L1Loss HuberLoss SmoothL1Loss CrossEntropyLoss NLLLoss BCEWithLogitsLoss BCELoss
        KLDivLoss GaussianNLLLoss PoissonNLLLoss CosineSimilarity PairwiseDistance TripletMarginLoss
        CTCLoss HingeEmbeddingLoss CosineEmbeddingLoss MarginRankingLoss SoftMarginLoss MultiMarginLoss
        MultiLabelMarginLoss MultiLabelSoftMarginLoss TripletMarginWithDistanceLoss
        AdaptiveLogSoftmaxWithLoss""",
    ),
    "Parametrisations, vectors and gradients": (
        "torch.nn.utils torch.nn.utils.parametrizations torch.nn.utils.parametrize torch.nn.utils.rnn "
        "torch.func",
        """weight_norm spectral_norm orthogonal register_parametrization remove_weight_norm
        remove_spectral_norm parameters_to_vector vector_to_parameters clip_grad_norm_ clip_grad_value_
        pad_sequence pack_padded_sequence pad_packed_sequence fuse_conv_bn_eval fuse_linear_bn_eval
        skip_init functional_call stack_module_state""",
    ),
    "Initialisation": (
        "torch.nn.init",
        """xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_ calculate_gain uniform_ normal_
        trunc_normal_ constant_ ones_ zeros_ eye_ dirac_ orthogonal_ sparse_""",
    ),
    "Models and tensors": (
        "torch.nn.Module torch.Tensor torch",
        """parameters named_parameters buffers named_buffers children modules named_modules get_submodule
        apply train eval state_dict load_state_dict save load requires_grad_ register_buffer
        register_parameter register_module register_forward_hook register_forward_pre_hook
        register_full_backward_hook to cuda cpu half bfloat16 float double zero_grad detach numpy item
        copy_ add_ manual_seed set_default_dtype""",
    ),
    "Derivatives and compilation": (
        "torch torch.Tensor torch.autograd torch.func torch.jit torch.export torch.amp torch.profiler "
        "torch.utils.checkpoint",
        """backward no_grad inference_mode enable_grad grad Function gradcheck grad_and_value vjp jvp
        linearize jacrev jacfwd hessian vmap checkpoint compile script trace export autocast GradScaler
        profile""",
    ),
    "Optimisers": (
        "torch.optim torch.optim.Optimizer torch.optim.swa_utils",
        """step zero_grad SGD Adam AdamW Adamax RAdam Adadelta Rprop NAdam RMSprop Adagrad LBFGS Adafactor
        ASGD SparseAdam AveragedModel""",
    ),
    "Learning rates": (
        "torch.optim.lr_scheduler",
        """LambdaLR MultiplicativeLR StepLR ExponentialLR MultiStepLR ConstantLR LinearLR PolynomialLR
        CosineAnnealingLR CosineAnnealingWarmRestarts OneCycleLR CyclicLR SequentialLR ChainedScheduler
        ReduceLROnPlateau""",
    ),
    "Data and devices": (
        "torch.utils.data torch.nn torch.nn.parallel torch.utils.data.distributed torch.distributed",
        """DataLoader TensorDataset random_split DataParallel DistributedDataParallel DistributedSampler
        init_process_group get_rank get_world_size all_reduce broadcast""",
    ),
    "Differential equations": (
        "torchdiffeq",
        """odeint odeint_adjoint odeint_event odeint_dense""",
    ),
}
# Names whose packages the tests do not have, or that only newer versions of PyTorch have.
ALSO = {
    "Losses": "LinearCrossEntropyLoss",
    "Parametrisations, vectors and gradients": "get_total_norm prune",
    "Models and tensors": "deepcopy print",
    "Optimisers": "Muon param_groups",
    "Data and devices": "FullyShardedDataParallel fully_shard SummaryWriter",
    "Differential equations": """dopri5 dopri8 bosh3 adaptive_heun euler midpoint rk4 fehlberg2
        explicit_adams implicit_adams scipy_solver sdeint sdeint_adjoint diagonal general scalar additive
        sde_type BrownianInterval BrownianTree cdeint CubicSpline LinearInterpolation
        hermite_cubic_coefficients_with_backward_differences linear_interpolation_coeffs
        natural_cubic_coeffs logsig_windows""",
}


def rows(heading):
    """Return the pairs of cells of the tables of a section, without their heads."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"^\|---\|---\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [line.strip("| \n").split(" | ") for table in tables for line in table.splitlines()]


def names(cell):
    """Return the names in a cell: `model.train()` has `train`, and `method="rk4"` has `rk4`."""
    spans = [re.sub(r'^\w+="(\w+)"$', r"\1", span) for span in re.findall("`([^`]+)`", cell)]
    return {span.split("(")[0].split(".")[-1] for span in spans}


@pytest.mark.parametrize("heading", SOURCES)
def test_each_name_has_a_row(heading):
    pairs = rows(heading)
    assert all(len(row) == 2 and row[1].strip() for row in pairs)
    listed = [name for row in pairs for name in names(row[0])]
    assert set(listed) == {*SOURCES[heading][1].split(), *ALSO.get(heading, "").split()}


def exists(path):
    try:
        pkgutil.resolve_name(path)
    except (AttributeError, ImportError):
        return False
    return True


@pytest.mark.parametrize(
    ("prefix", "module"),
    [("optax", "optax"), ("jax", "jax"), ("jnp", "jax.numpy"), ("diffrax", "diffrax")],
)
def test_what_the_page_offers_exists(prefix, module):
    """Names of `fl` are those of all pages: see `test_site.py`."""
    offered = set(re.findall(rf"(?<![\w./]){prefix}\.([A-Za-z_][\w.]*\w)", PAGE))
    assert offered
    assert not [name for name in offered if not exists(f"{module}.{name}")]


@pytest.mark.parametrize("heading", SOURCES)
def test_the_names_are_those_of_pytorch(heading):
    modules, wanted = (text.split() for text in SOURCES[heading])
    for name in {module.split(".")[0] for module in modules}:
        pytest.importorskip(name, reason=f"{name} {REASON}")
    assert not [name for name in wanted if not any(exists(f"{module}.{name}") for module in modules)]


# What the page says of PyTorch's numbers


@pytest.fixture
def torch():
    """PyTorch, in the same precision; optax mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield pytest.importorskip("torch", reason=f"torch {REASON}")


def assert_equal(ours, theirs, rtol=1e-10):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=rtol, atol=1e-12)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_initial_values_of_a_linear_map_are_within_the_root_of_the_fan(torch):
    torch.manual_seed(0)
    for module, fan_in in ((torch.nn.Linear(4, 2000), 4), (torch.nn.Conv2d(6, 500, 3, groups=2), 27)):
        for values in (module.weight, module.bias):
            assert 0.95 < float(values.detach().abs().max()) * fan_in**0.5 < 1 + 1e-6


def test_activations_are_those_of_pytorch(torch):
    nn, x = torch.nn, np.linspace(-8.0, 8.0, 64).reshape(4, 16)
    pairs = [
        (functools.partial(jax.nn.gelu, approximate=False), nn.GELU()),
        (jax.nn.gelu, nn.GELU("tanh")),
        *((jax.nn.relu, nn.ReLU()), (jax.nn.relu6, nn.ReLU6()), (jax.nn.leaky_relu, nn.LeakyReLU())),
        *((jax.nn.elu, nn.ELU()), (jax.nn.celu, nn.CELU()), (jax.nn.selu, nn.SELU())),
        *((jax.nn.silu, nn.SiLU()), (jax.nn.mish, nn.Mish()), (jax.nn.hard_swish, nn.Hardswish())),
        *((jax.nn.sigmoid, nn.Sigmoid()), (jax.nn.hard_sigmoid, nn.Hardsigmoid())),
        *((jax.nn.log_sigmoid, nn.LogSigmoid()), (jnp.tanh, nn.Tanh()), (jax.nn.hard_tanh, nn.Hardtanh())),
        *((jax.nn.softplus, nn.Softplus()), (jax.nn.soft_sign, nn.Softsign()), (jax.nn.glu, nn.GLU())),
        *((jax.nn.softmax, nn.Softmax(-1)), (jax.nn.log_softmax, nn.LogSoftmax(-1))),
    ]
    ours = jax.jit(lambda x: [function(x) for function, _ in pairs])(x)
    for y, (_, module) in zip(ours, pairs, strict=True):
        assert_equal(y, module(torch.from_numpy(x)), rtol=1e-6)


def test_losses_are_those_of_pytorch(torch):
    nn, losses = torch.nn, optax.losses
    y, target, third = draw(3, 5, 4)
    labels, p = np.array([0, 3, 1, 2, 3]), np.array(jax.nn.softmax(target))
    log_p = np.array(jax.nn.log_softmax(y))

    def smooth(y, target):
        return losses.huber_loss(y, target, delta=0.5) / 0.5

    def of_logarithms(y, labels):
        return -jnp.take_along_axis(y, labels[..., None], -1)

    def normal(y, target, var):
        return -jax.scipy.stats.norm.logpdf(target, y, jnp.sqrt(var))

    cases = [
        (losses.huber_loss, nn.HuberLoss(), (y, target)),
        (smooth, nn.SmoothL1Loss(beta=0.5), (y, target)),
        (losses.softmax_cross_entropy_with_integer_labels, nn.CrossEntropyLoss(), (y, labels)),
        (losses.softmax_cross_entropy, nn.CrossEntropyLoss(), (y, p)),
        (of_logarithms, nn.NLLLoss(), (log_p, labels)),
        (losses.sigmoid_binary_cross_entropy, nn.BCEWithLogitsLoss(), (y, p)),
        (losses.kl_divergence, nn.KLDivLoss(reduction="batchmean"), (log_p, p)),
        (lambda y, target: jnp.exp(y) - target * y, nn.PoissonNLLLoss(), (y, target)),
        (normal, nn.GaussianNLLLoss(full=True), (y, target, p)),
        (losses.triplet_margin_loss, nn.TripletMarginLoss(), (y, target, third)),
        (losses.cosine_similarity, nn.CosineSimilarity(dim=-1), (y, target)),
    ]
    ours = jax.jit(lambda given: [jnp.mean(f(*x)) for (f, *_), x in zip(cases, given, strict=True)])(
        [arguments for *_, arguments in cases]
    )
    for value, (_, module, arguments) in zip(ours, cases, strict=True):
        assert_equal(value, module(*map(torch.from_numpy, arguments)).mean(), rtol=1e-5)


def optimisers(optim):
    """Yield an optimiser of optax with what the page calls the same in PyTorch."""
    rate = 0.1
    yield optax.sgd(rate, momentum=0.9, nesterov=True), optim.SGD, {"momentum": 0.9, "nesterov": True}
    yield optax.chain(optax.add_decayed_weights(0.3), optax.adam(rate)), optim.Adam, {"weight_decay": 0.3}
    yield optax.adamw(rate, weight_decay=1e-2), optim.AdamW, {}
    yield optax.rmsprop(rate, decay=0.99, eps_in_sqrt=False), optim.RMSprop, {}
    yield optax.adagrad(rate, initial_accumulator_value=0.0), optim.Adagrad, {}


def test_optimisers_take_the_steps_of_pytorch(torch):
    start, gradients = draw(4), draw(8, 4) + 0.5
    for ours, theirs, options in optimisers(torch.optim):
        parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimiser = theirs([parameter], lr=0.1, **options)
        x = jnp.asarray(start)
        state, update = ours.init(x), jax.jit(ours.update)
        for gradient in gradients:
            parameter.grad = torch.from_numpy(gradient)
            optimiser.step()
            updates, state = update(gradient, state, x)
            x = optax.apply_updates(x, updates)
        assert_equal(x, parameter, rtol=1e-5)


def test_schedules_are_those_of_pytorch(torch):
    schedulers = torch.optim.lr_scheduler
    pairs = [
        (
            optax.exponential_decay(0.1, 4, 0.5, staircase=True),
            schedulers.StepLR,
            {"step_size": 4, "gamma": 0.5},
        ),
        (optax.exponential_decay(0.1, 1, 0.9), schedulers.ExponentialLR, {"gamma": 0.9}),
        (
            optax.piecewise_constant_schedule(0.1, {3: 0.1, 7: 0.1}),
            schedulers.MultiStepLR,
            {"milestones": [3, 7]},
        ),
        (
            optax.piecewise_constant_schedule(0.05, {5: 2.0}),
            schedulers.ConstantLR,
            {"factor": 0.5, "total_iters": 5},
        ),
        (optax.linear_schedule(0.05, 0.1, 5), schedulers.LinearLR, {"start_factor": 0.5, "total_iters": 5}),
        (optax.polynomial_schedule(0.1, 0.0, 2, 5), schedulers.PolynomialLR, {"power": 2, "total_iters": 5}),
        (
            optax.cosine_decay_schedule(0.1, 9, 0.2),
            schedulers.CosineAnnealingLR,
            {"T_max": 9, "eta_min": 0.02},
        ),
    ]
    for ours, theirs, options in pairs:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, rates = theirs(optimiser, **options), []
        for _ in range(9):
            rates.append(scheduler.get_last_lr()[0])
            optimiser.step()
            scheduler.step()
        np.testing.assert_allclose([ours(step) for step in range(9)], rates, rtol=1e-6, atol=1e-9)


def block(name):
    """Return the names that the block of the page defines which defines this one."""
    (code,) = re.findall(rf"^```python\n((?:(?!```).)*^{name} = .*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names = {"fl": fl, "jax": jax, "jnp": jnp}
    exec(code, names)
    return names


def taken_over(layer, module, names):
    """Return the parameters and the state of a layer with the numbers of a module, in test mode."""
    ps = fl.ComponentVector.zeros(layer.layout, jnp.float64)
    st = fl.initial_states(jax.random.key(0), layer)
    ps, st = fl.from_torch(module.double().eval().state_dict(), layer, ps, st, names)
    return ps, fl.testmode(st)


def test_the_encoder_layer_of_the_page_is_that_of_pytorch(torch):
    layer = block("encoder_layer")["encoder_layer"]
    options = {"activation": "gelu", "batch_first": True, "norm_first": True}
    theirs = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, **options)
    names = {
        "layer_0.layer.layer_0": "norm1",
        "layer_0.layer.layer_1": "self_attn",
        "layer_1.layer.layer_0": "norm2",
        "layer_1.layer.layer_1.layer_0": "linear1",
        "layer_1.layer.layer_1.layer_2": "linear2",
    }
    ps, st = taken_over(layer, theirs, names)
    x = draw(2, 5, 64)
    assert_equal(jax.jit(layer)(x, ps, st)[0], theirs(torch.from_numpy(x)), rtol=1e-9)


def test_the_images_of_the_page_are_those_of_pytorch(torch):
    nn, found = torch.nn, block("periodic")
    x = draw(2, 8, 8, 2)
    theirs = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    layer = found["periodic"]
    y = jax.jit(layer)(x, *taken_over(layer, theirs, {"layer_1": ""}))[0]
    assert_equal(jnp.moveaxis(y, -1, 1), theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy())))
    theirs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    layer = found["classifier"]
    y = jax.jit(layer)(x[..., :1], *taken_over(layer, theirs, {"layer_0": "0", "layer_3": "3"}))[0]
    assert_equal(y, theirs(torch.from_numpy(np.moveaxis(x[..., :1], -1, 1).copy())))


def test_what_a_mask_hides_is_what_pytorch_keeps(torch):
    layer = fl.MultiHeadAttention(8, heads=2, use_bias=True)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    ps, st = taken_over(layer, theirs, {"": ""})
    x, seen = draw(2, 5, 8), np.arange(5) < np.array([[5], [3]])
    y, _ = jax.jit(layer)((x, x, x, seen[:, None, None, :]), ps, st)
    queries = torch.from_numpy(x)
    assert_equal(y, theirs(*(queries,) * 3, key_padding_mask=torch.from_numpy(~seen))[0])


def padding(mode):
    return fl.WrappedFunction(lambda x: jnp.pad(x, ((0, 0), (1, 2), (3, 0), (0, 0)), mode=mode))


def test_shapes_and_pools_are_those_of_pytorch(torch):
    nn, x = torch.nn, draw(2, 6, 6, 4)
    images = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    pairs = [
        (fl.AdaptiveMeanPool((3, 2)), nn.AdaptiveAvgPool2d((3, 2))),
        (fl.AdaptiveMaxPool((1, 6)), nn.AdaptiveMaxPool2d((1, 6))),
        (fl.MeanPool((3, 3), stride=2, pad=1), nn.AvgPool2d(3, 2, 1)),
        (fl.LPPool((2, 2)), nn.LPPool2d(2, 2)),
        (fl.Upsample(scale=2), nn.UpsamplingNearest2d(scale_factor=2)),
        (fl.Upsample("bilinear", scale=2, align_corners=True), nn.UpsamplingBilinear2d(scale_factor=2)),
        (fl.PixelShuffle(2), nn.PixelShuffle(2)),
        (padding("reflect"), nn.ReflectionPad2d((3, 0, 1, 2))),
        (padding("edge"), nn.ReplicationPad2d((3, 0, 1, 2))),
    ]
    ours = jax.jit(lambda x: [layer(x, {}, {})[0] for layer, _ in pairs])(x)
    for y, (_, module) in zip(ours, pairs, strict=True):
        assert_equal(jnp.moveaxis(y, -1, 1), module(images))
    uneven = fl.AdaptiveMeanPool((4, 4))(x, {}, {})[0]
    assert np.abs(np.moveaxis(uneven, -1, 1) - nn.AdaptiveAvgPool2d(4)(images).numpy()).max() > 0.1
