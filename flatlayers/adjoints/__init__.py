"""Gradients of any solve by diffrax."""
