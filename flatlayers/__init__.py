"""flatlayers: neural-network layers for scientific machine learning, their parameters in one vector."""

from . import activations as activations, initializers as initializers
from .core.layer import (
    Container as Container,
    Layer as Layer,
    Param as Param,
    WrappedFunction as WrappedFunction,
    Wrapper as Wrapper,
    apply as apply,
    contains_layer as contains_layer,
    display_name as display_name,
)
from .core.layout import Layout as Layout
from .core.matrix import ComponentMatrix as ComponentMatrix, hessian as hessian, jacobian as jacobian
from .core.plan import Slot as Slot
from .core.record import Record as Record
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
from .core.vector import ComponentVector as ComponentVector
from .display import pformat as pformat
from .layers.containers import (
    BranchLayer as BranchLayer,
    Chain as Chain,
    PairwiseFusion as PairwiseFusion,
    Parallel as Parallel,
    SkipConnection as SkipConnection,
)
from .layers.dense import Dense as Dense, Diagonal as Diagonal
from .layers.dropout import Dropout as Dropout
from .layers.reshape import (
    FlattenLayer as FlattenLayer,
    NoOpLayer as NoOpLayer,
    ReshapeLayer as ReshapeLayer,
    SelectDim as SelectDim,
)
from .solve.ode import NeuralODE as NeuralODE


__version__ = "0.1.0"
