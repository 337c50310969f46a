"""Vectors in exported programs: `jax.export` writes a signature with the layouts in it."""

import json
from collections.abc import Callable
from typing import Any

import jax.export

from .layout import Layout
from .record import Structure


def register(kind: type, to_text: Callable[[Any], str], from_text: Callable[[str], Any]) -> None:
    """Let `jax.export` serialise a class of pytrees, whose structure is written as a text."""
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"flatlayers.{kind.__name__}",
        serialize_auxdata=lambda structure: to_text(structure).encode(),
        deserialize_auxdata=lambda data: from_text(bytes(data).decode()),
    )


def layouts_to_text(layouts: tuple[Layout, ...]) -> str:
    """Return several layouts as JSON text."""
    return json.dumps([layout.to_json() for layout in layouts])


def layouts_from_text(text: str) -> tuple[Layout, ...]:
    """Return the layouts that `layouts_to_text` wrote."""
    return tuple(map(Layout.from_json, json.loads(text)))


def structure_to_text(structure: Structure) -> str:
    """Return the structure of a record as JSON text."""
    return json.dumps(structure)


def structure_from_text(text: str) -> Structure:
    """Return the structure that `structure_to_text` wrote, equal to that of a record that was not written."""
    names, children, static = json.loads(text)
    return tuple(names), tuple(children), tuple((name, value) for name, value in static)
