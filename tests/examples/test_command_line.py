"""The options that the examples share, and their list."""

from pathlib import Path

import pytest

from tests.examples.scripts import EXAMPLES, load


def test_the_command_line(tmp_path, capsys):
    parse = load("command_line", needs=()).parse
    texts = {"description": "Do it.", "out": "it.png", "seed": "of it"}
    options = parse(**texts, argv=[])
    assert (options.steps, options.seed, options.out) == (1000, 0, Path("it.png"))
    out = tmp_path / "other.png"
    options = parse(**texts, steps=7, chunk=50, argv=["--seed", "3", "--out", str(out)])
    assert (options.steps, options.seed, options.out) == (50, 3, out)
    for argv, message in (
        (["--steps", "0"], "expected a positive number"),
        (["--out", "no/it.png"], "no directory"),
    ):
        with pytest.raises(SystemExit) as failure:
            parse(**texts, argv=argv)
        assert failure.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(**texts, steps_of="rounds", chunk=50, argv=["--help"])
    assert "rounds, rounded up to 50s (default: 1000)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_example_is_in_the_readme(path):
    if path.stem != "command_line":
        assert f"[`{path.name}`]({path.name})" in (EXAMPLES / "README.md").read_text()
