"""Vectors, states and optimisers as files, and vectors from one model into another."""
