"""The words that annotations share: what layers take and return, and what solvers do.

`PyTree` is any nest of tuples, lists, mappings and registered classes with arrays as its leaves.
"""

from typing import Any, TypeAlias

import jax
import numpy as np


# To a type checker anything, since a class becomes one at run time.
PyTree: TypeAlias = Any
Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray[Any, Any] | np.number[Any] | np.bool_ | complex
DType: TypeAlias = np.dtype[Any] | type[Any] | str
Shape: TypeAlias = tuple[int, ...]
# A typed PRNG key, such as `jax.random.key(0)`.
Key: TypeAlias = jax.Array

# A `jax.sharding.Mesh`, devices along named axes, and a `jax.sharding.NamedSharding`, how an array lies on
# them. What they are, JAX does not tell a type checker.
DeviceMesh: TypeAlias = Any
Sharding: TypeAlias = Any

# A call of a layer: `layer(x, ps, st)` is `(y, st)`.
Input: TypeAlias = PyTree
Output: TypeAlias = PyTree
# A `ComponentVector`, a `Record`, a mapping, or any object with the parameters as its attributes.
Params: TypeAlias = PyTree
# A `Record` or a mapping.
State: TypeAlias = PyTree

# A solve of `dy/dt = f(t, y, args)`.
Time: TypeAlias = ArrayLike
Y: TypeAlias = PyTree
Args: TypeAlias = PyTree
# A derivative of a loss, like what it is taken by; `None` or a zero-sized array where there is none.
Cotangent: TypeAlias = PyTree
