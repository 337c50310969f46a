"""Layers and solvers for fixed points, by optimistix."""
