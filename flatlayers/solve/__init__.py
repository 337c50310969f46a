"""Networks inside solvers."""
