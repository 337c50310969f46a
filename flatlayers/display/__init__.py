"""Models, vectors and states as text, and as HTML for notebooks."""

from ..core.layer import Layer
from ..vectors.vector import ComponentVector
from .html import model_html, summary_html, tree_html, vector_html
from .model import pformat as pformat
from .summary import Summary
from .tree import Tree


# The core does not know how it is shown: what `print` and notebooks ask for is given to it here.
Layer.__str__ = pformat  # pyright: ignore[reportAttributeAccessIssue]
Layer._repr_html_ = model_html  # pyright: ignore[reportAttributeAccessIssue]
ComponentVector._repr_html_ = vector_html  # pyright: ignore[reportAttributeAccessIssue]
Summary._repr_html_ = summary_html  # pyright: ignore[reportAttributeAccessIssue]
Tree._repr_html_ = tree_html  # pyright: ignore[reportAttributeAccessIssue]
