"""Layers that solve a differential equation, by diffrax."""
