"""Models, vectors and states as text, and as HTML for notebooks."""

from ..core.layer import Layer
from ..vectors.text import as_html, as_text
from ..vectors.vector import ComponentVector
from .html import model_html, summary_html, tree_html, vector_html
from .model import pformat as pformat
from .summary import Summary
from .tree import Tree


as_text.register(Layer, pformat)
as_html.register(Layer, model_html)
as_html.register(ComponentVector, vector_html)
as_html.register(Summary, summary_html)
as_html.register(Tree, tree_html)
