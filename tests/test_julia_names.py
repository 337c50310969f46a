"""Each name of Lux.jl, Flux.jl and their kin has a row on the page `Coming from Lux.jl and Flux.jl`."""

import functools
import importlib
import re
from pathlib import Path

import pytest


PAGE = (Path(__file__).parent.parent / "docs" / "from-lux.md").read_text()

# For each source the section of the page, and the names in the `@docs` blocks of the source as of August
# 2026 (its `src` for names that have left the documentation), without the module in front.
SOURCES = {
    "LuxDL/Lux.jl docs/src/api/Building_Blocks/LuxCore.md, docs/src/manual/interface.md": (
        "LuxCore and the interface of Lux.jl",
        """AbstractLuxLayer AbstractLuxWrapperLayer AbstractLuxContainerLayer apply stateless_apply
        check_fmap_condition contains_lux_layer display_name replicate setup initialparameters
        parameterlength initialstates statelength testmode trainmode update_state
        preserves_state_type outputsize StatefulLuxLayer ps st""",
    ),
    "LuxDL/Lux.jl docs/src/api/Lux/layers.md": (
        "Layers of Lux.jl",
        """BranchLayer Chain PairwiseFusion Parallel SkipConnection RepeatedLayer AlternatePrecision Conv
        ConvTranspose AlphaDropout Dropout VariationalHiddenDropout AdaptiveLPPool AdaptiveMaxPool
        AdaptiveMeanPool GlobalLPPool GlobalMaxPool GlobalMeanPool LPPool MaxPool MeanPool GRUCell
        LSTMCell RNNCell Recurrence StatefulRecurrentCell BidirectionalRNN Bilinear Dense Scale
        MultiHeadAttention Embedding RotaryPositionalEmbedding SinusoidalPositionalEmbedding
        apply_rotary_embedding compute_rotary_embedding_params FlattenLayer Maxout NoOpLayer
        ReshapeLayer SelectDim WrappedFunction ReverseSequence BatchNorm GroupNorm InstanceNorm
        LayerNorm WeightNorm RMSNorm PixelShuffle Upsample""",
    ),
    "LuxDL/Lux.jl docs/src/api/Lux: autodiff, contrib, interop, serialization and utilities.md": (
        "The rest of Lux.jl",
        """jacobian_vector_product vector_jacobian_product batched_jacobian FrozenLayer freeze unfreeze
        layer_map @debug_mode DebugLayer share_parameters FromFluxAdaptor FluxLayer
        ToSimpleChainsAdaptor SimpleChainsLayer export_as_tf_saved_model TrainState
        compute_gradients apply_gradients apply_gradients! single_train_step single_train_step!
        GenericLossFunction BinaryCrossEntropyLoss BinaryFocalLoss CrossEntropyLoss DiceCoeffLoss
        FocalLoss HingeLoss HuberLoss KLDivergenceLoss MAELoss MSELoss MSLELoss PoissonLoss
        SiameseContrastiveLoss SquaredHingeLoss LuxOps recursive_map recursive_add!!
        recursive_copyto! recursive_eltype recursive_make_zero recursive_make_zero!! f16 f32 f64
        bf16 match_eltype @compact @init_fn @non_trainable set_dispatch_doctor_preferences!
        cpu_device gpu_device reactant_device MPIBackend NCCLBackend DistributedUtils""",
    ),
    "FluxML/Flux.jl docs/src/reference/models/layers.md, and src/layers/conv.jl, src/deprecations.jl": (
        "Layers of Flux.jl",
        """Dense Bilinear Scale Conv ConvTranspose CrossCor DepthwiseConv SamePad MultiHeadAttention
        AdaptiveMaxPool MaxPool GlobalMaxPool AdaptiveMeanPool MeanPool GlobalMeanPool Upsample
        PixelShuffle Embedding EmbeddingBag Chain activations Maxout SkipConnection Parallel
        PairwiseFusion Recurrence RNNCell RNN LSTMCell LSTM GRUCell GRU GRUv3Cell GRUv3
        initialstates BatchNorm Dropout AlphaDropout LayerNorm InstanceNorm GroupNorm WeightNorm
        remove_weight_norms normalise testmode! trainmode! convfilter depthwiseconvfilter reset!
        unsqueeze flatten""",
    ),
    "FluxML/Flux.jl docs/src/reference: destructure, outputsize, models/functors, training/reference and "
    "callbacks.md; FluxML/Functors.jl docs/src/api.md": (
        "Models of Flux.jl",
        """destructure trainable trainables isnumeric params modules state loadmodel! KeyPath getkeypath
        haskeypath setkeypath! @autosize outputsize @layer @leaf @functor fmap fmap_with_path
        isleaf children fcollect fleaves functor fmapstructure fmapstructure_with_path execute
        AbstractWalk DefaultWalk StructuralWalk ExcludeWalk CachedWalk CollectWalk IterateWalk cpu
        gpu f16 f32 f64 bf16 setup train! trainstep! trainstep_withgradient! update! throttle
        patience early_stopping plateau DataLoader onehot onecold onehotbatch gradient
        withgradient""",
    ),
    "FluxML/Flux.jl docs/src/reference/utilities.md": (
        "Initial values",
        """glorot_uniform glorot_normal kaiming_uniform kaiming_normal truncated_normal lecun_normal
        orthogonal sparse_init identity_init ones32 zeros32 rand32 randn32 create_bias
        rng_from_array nfan""",
    ),
    "FluxML/Optimisers.jl docs/src/api.md": (
        "Optimisers.jl",
        """Descent Momentum Nesterov Rprop RMSProp Adam RAdam AdaMax OAdam AdaGrad AdaDelta AMSGrad NAdam
        AdamW AdaBelief Lion AccumGrad ClipGrad ClipNorm MixedPrecision OptimiserChain SignDecay
        WeightDecay setup update update! adjust! adjust freeze! thaw! make_reactant_compatible
        trainable isnumeric maywrite destructure Restructure trainables apply! init @.. @lazy @def
        KeyPath haskeypath getkeypath setkeypath!""",
    ),
    "avik-pal/FluxMPI.jl docs/src/api.md; LuxDL/Lux.jl docs/src/api/Lux/distributed_utils.md": (
        "Several processes: FluxMPI",
        """DistributedDataContainer Init Initialized fluxmpi_print fluxmpi_println local_rank total_workers
        allreduce! bcast! reduce! Iallreduce! Ibcast! DistributedOptimizer allreduce_gradients
        synchronize! disable_cudampi_support initialize initialized get_distributed_backend
        synchronize!!""",
    ),
}


def rows(heading):
    """Return the pairs of cells of the tables of a section, without their heads."""
    section = re.split(r"^#+ ", PAGE.split(f"# {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    tables = re.findall(r"^\|---\|---\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    return [line.strip("| ").split(" | ") for table in tables for line in table.splitlines()]


def names(cell):
    return {name if name == "@.." else name.split(".")[-1] for name in re.findall("`([^`]+)`", cell)}


@pytest.mark.parametrize("source", SOURCES)
def test_each_name_has_a_row(source):
    heading, wanted = SOURCES[source]
    pairs = rows(heading)
    assert all(len(row) == 2 and row[1].strip() for row in pairs)
    known = set().union(*(names(row[0]) for row in pairs))
    assert set(wanted.split()) <= known


def exists(module, name):
    try:
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize(
    ("prefix", "module"),
    [("fl", "flatlayers"), ("optax", "optax"), ("jax", "jax"), ("jnp", "jax.numpy")],
)
def test_what_the_page_offers_exists(prefix, module):
    offered = set(re.findall(rf"(?<![\w./]){prefix}\.([A-Za-z_][\w.]*\w)", PAGE))
    assert offered
    assert not [name for name in offered if not exists(module, name)]
