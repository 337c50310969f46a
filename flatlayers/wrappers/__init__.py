"""Layers around layers, and functions that change a model."""
