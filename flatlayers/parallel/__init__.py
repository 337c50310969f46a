"""Several devices and processes, by JAX's own SPMD: a vector in even parts, and gradients of it."""
