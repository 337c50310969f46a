"""flatlayers: neural-network layers for scientific machine learning, their parameters in one vector."""

from . import activations as activations, initializers as initializers, transforms as transforms
from .adjoints.checkpoint import AdaptiveCheckpointAdjoint as AdaptiveCheckpointAdjoint
from .adjoints.gauss import GaussAdjoint as GaussAdjoint
from .core.composite import Container as Container, Wrapper as Wrapper
from .core.constraints import constrained as constrained, unconstrained as unconstrained
from .core.declaration import (
    Param as Param,
    Stacked as Stacked,
    contains_layer as contains_layer,
)
from .core.layer import (
    Layer as Layer,
    WrappedFunction as WrappedFunction,
    apply as apply,
    display_name as display_name,
)
from .core.setup import (
    initial_parameters as initial_parameters,
    initial_states as initial_states,
    output_shape as output_shape,
    parameter_length as parameter_length,
    preserves_state_type as preserves_state_type,
    setup as setup,
    state_length as state_length,
    stateless_apply as stateless_apply,
    testmode as testmode,
    trainmode as trainmode,
    update_state as update_state,
)
from .derivatives import (
    batched_jacobian as batched_jacobian,
    hessian as hessian,
    hessian_vector_product as hessian_vector_product,
    jacobian as jacobian,
    jacobian_vector_product as jacobian_vector_product,
    vector_jacobian_product as vector_jacobian_product,
)
from .display.model import pformat as pformat
from .display.summary import summary as summary
from .display.tree import tree as tree
from .equations.augmented import AugmentedNDE as AugmentedNDE
from .equations.cde import NeuralCDE as NeuralCDE
from .equations.flow import FFJORD as FFJORD
from .equations.given_times import SolveTimes as SolveTimes
from .equations.mechanics import HamiltonianNN as HamiltonianNN, LagrangianNN as LagrangianNN
from .equations.ode import NeuralODE as NeuralODE, SecondOrderNeuralODE as SecondOrderNeuralODE
from .equations.sde import NeuralSDE as NeuralSDE
from .equations.solving import SolverLayer as SolverLayer
from .equations.start import Start as Start
from .equilibria.accelerated import Anderson as Anderson, Broyden as Broyden
from .equilibria.deq import (
    DeepEquilibriumNetwork as DeepEquilibriumNetwork,
    spectral_radius as spectral_radius,
)
from .equilibria.implicit import PhantomAdjoint as PhantomAdjoint
from .equilibria.multi_scale import MultiScaleDeepEquilibriumNetwork as MultiScaleDeepEquilibriumNetwork
from .equilibria.steady_state import SteadyState as SteadyState
from .fitting.bounds import bounds as bounds
from .fitting.collocation import collocate as collocate
from .fitting.data import Batches as Batches, batches as batches
from .fitting.loop import train_loop as train_loop
from .fitting.minimize import NonFiniteError as NonFiniteError, minimize as minimize
from .fitting.per_leaf import per_leaf as per_leaf
from .fitting.result import (
    Best as Best,
    NonFiniteLossError as NonFiniteLossError,
    TrainResult as TrainResult,
    Validation as Validation,
)
from .fitting.shooting import multiple_shooting as multiple_shooting
from .io.errors import FileFormatError as FileFormatError, LayoutMismatchError as LayoutMismatchError
from .io.files import describe_file as describe_file, load as load, save as save
from .io.transfer import transfer as transfer
from .layers.attention import MultiHeadAttention as MultiHeadAttention
from .layers.basis import (
    Chebyshev as Chebyshev,
    Cosine as Cosine,
    Fourier as Fourier,
    Legendre as Legendre,
    Polynomial as Polynomial,
    Sine as Sine,
    TensorProductLayer as TensorProductLayer,
)
from .layers.cells import GRUCell as GRUCell, LSTMCell as LSTMCell, RNNCell as RNNCell
from .layers.containers import (
    BranchLayer as BranchLayer,
    Chain as Chain,
    Maxout as Maxout,
    PairwiseFusion as PairwiseFusion,
    Parallel as Parallel,
    SkipConnection as SkipConnection,
)
from .layers.convolution import (
    Conv as Conv,
    ConvTranspose as ConvTranspose,
    CrossCor as CrossCor,
    DepthwiseConv as DepthwiseConv,
)
from .layers.dense import Bilinear as Bilinear, Dense as Dense, Diagonal as Diagonal
from .layers.dropout import (
    AlphaDropout as AlphaDropout,
    Dropout as Dropout,
    VariationalHiddenDropout as VariationalHiddenDropout,
    dropout as dropout,
)
from .layers.embedding import (
    Embedding as Embedding,
    PatchEmbedding as PatchEmbedding,
    PeriodicEmbedding as PeriodicEmbedding,
)
from .layers.mlp import MLP as MLP
from .layers.normalization import (
    BatchNorm as BatchNorm,
    GroupNorm as GroupNorm,
    InstanceNorm as InstanceNorm,
    LayerNorm as LayerNorm,
    RMSNorm as RMSNorm,
    normalize as normalize,
)
from .layers.operators import DeepONet as DeepONet, FourierNeuralOperator as FourierNeuralOperator
from .layers.pooling import (
    AdaptiveLPPool as AdaptiveLPPool,
    AdaptiveMaxPool as AdaptiveMaxPool,
    AdaptiveMeanPool as AdaptiveMeanPool,
    GlobalLPPool as GlobalLPPool,
    GlobalMaxPool as GlobalMaxPool,
    GlobalMeanPool as GlobalMeanPool,
    LPPool as LPPool,
    MaxPool as MaxPool,
    MeanPool as MeanPool,
)
from .layers.position import (
    RotaryPositionalEmbedding as RotaryPositionalEmbedding,
    SinusoidalPositionalEmbedding as SinusoidalPositionalEmbedding,
)
from .layers.recurrence import (
    GRU as GRU,
    LSTM as LSTM,
    RNN as RNN,
    BidirectionalRNN as BidirectionalRNN,
    Recurrence as Recurrence,
    StatefulRecurrentCell as StatefulRecurrentCell,
)
from .layers.repeated import Repeated as Repeated
from .layers.reshape import (
    FlattenLayer as FlattenLayer,
    NoOpLayer as NoOpLayer,
    ReshapeLayer as ReshapeLayer,
    ReverseSequence as ReverseSequence,
    SelectDim as SelectDim,
    flatten as flatten,
)
from .layers.spectral import (
    FourierLayer as FourierLayer,
    SpectralConv as SpectralConv,
    SpectralDerivative as SpectralDerivative,
)
from .layers.spline import SplineLayer as SplineLayer
from .layers.upsample import PixelShuffle as PixelShuffle, Upsample as Upsample
from .layers.windows import SamePad as SamePad
from .parallel.gradient import sharded_value_and_grad as sharded_value_and_grad
from .parallel.setup import setup_sharded as setup_sharded
from .parallel.shard import optimizer_state as optimizer_state, shard as shard
from .parallel.synchronize import (
    check_synchronized as check_synchronized,
    synchronize as synchronize,
)
from .vectors.datasets import to_dataset as to_dataset
from .vectors.layout import Layout as Layout
from .vectors.matrix import ComponentMatrix as ComponentMatrix
from .vectors.places import Slot as Slot
from .vectors.record import Record as Record
from .vectors.sharded import ShardedVector as ShardedVector
from .vectors.solutions import solution_frame as solution_frame
from .vectors.vector import ComponentVector as ComponentVector
from .weights.foreign import Foreign as Foreign
from .weights.from_equinox import FromEquinox as FromEquinox
from .weights.modules import from_equinox as from_equinox, from_nnx as from_nnx
from .weights.pytorch import from_torch as from_torch, to_torch as to_torch
from .wrappers.compact import State as State, compact as compact
from .wrappers.debug import DebugLayer as DebugLayer, debug as debug
from .wrappers.freeze import (
    FrozenLayer as FrozenLayer,
    freeze as freeze,
    freeze_parameters as freeze_parameters,
    unfreeze as unfreeze,
    unfreeze_parameters as unfreeze_parameters,
)
from .wrappers.layer_map import layer_map as layer_map, replace_layer as replace_layer, select as select
from .wrappers.precision import (
    AlternatePrecision as AlternatePrecision,
    bf16 as bf16,
    cast as cast,
    f16 as f16,
    f32 as f32,
    f64 as f64,
)
from .wrappers.share import SharedParameters as SharedParameters, share_parameters as share_parameters
from .wrappers.stateful import StatefulLayer as StatefulLayer
from .wrappers.weight_norm import SpectralNorm as SpectralNorm, WeightNorm as WeightNorm


__version__ = "0.2.0"
