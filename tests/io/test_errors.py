import pickle

import flatlayers as fl


def test_both_are_value_errors():
    assert issubclass(fl.FileFormatError, ValueError)
    assert issubclass(fl.LayoutMismatchError, ValueError)


def test_lines_are_kept_and_the_first_are_shown():
    lines = [f"w{i}: (2,) is gone" for i in range(25)]
    error = fl.LayoutMismatchError("other:", lines)
    assert error.lines == lines
    assert str(error).split("\n  ") == ["other:", *lines[:20], "... and 5 more"]
    assert pickle.loads(pickle.dumps(error)).lines == lines
