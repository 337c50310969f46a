"""The page on weights with its blocks that need PyTorch, which the tests of pages leave out."""

import doctest
import re
from pathlib import Path

import jax
import pytest


PAGE = Path(__file__).parent.parent.parent / "docs" / "weights.md"
BLOCK = re.compile(r"^```(py|python|pycon)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_all_blocks_in_order():
    pytest.importorskip("torch")
    names, runner = {}, doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for kind, code in BLOCK.findall(PAGE.read_text()):
            if kind == "pycon":
                example = doctest.DocTestParser().get_doctest(code, names, "page", str(PAGE), 0)
                assert runner.run(example, clear_globs=False).failed == 0
                names |= example.globs
            else:
                exec(compile(code, PAGE, "exec"), names)
    assert {"module", "theirs", "slope"} <= names.keys()
