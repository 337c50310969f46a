import pytest

from flatlayers.display.table import WIDTH, bytes_text, counted, filled, scaled, table
from tests.helpers import text


def test_numbers_with_their_nouns():
    assert counted(1, "state") == "1 state"
    assert counted(0, "state") == "0 states"
    assert counted(1056, "parameter") == "1_056 parameters"


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, "1 byte"), (999, "999 bytes"), (3524, "3.52 kB"), (999_600, "1 MB"), (5e15, "5e+03 TB")],
)
def test_bytes(n, expected):
    assert bytes_text(n) == expected


def test_a_number_with_its_unit():
    assert scaled(999.4, ("k", "M")) == "999 k"
    assert scaled(999.6, ("k", "M")) == "1 M"


def test_exact_text():
    assert table(("name", "n"), [("first", 1), ("b", 100)], ("all", 101), right="n") == text("""
        name     n
        ──────────
        first    1
        b      100
        ──────────
        all    101
    """)


def test_heads_break_before_texts():
    head = ("name", "a head of many words" * 4)
    found = table(head, [("x" * 60, "1")]).splitlines()
    assert max(map(len, found)) <= WIDTH
    assert any("x" * 60 in line for line in found)


def test_a_text_without_spaces_is_cut():
    found = table(("name", "other"), [("x" * 150, "y")]).splitlines()
    assert max(map(len, found)) <= WIDTH
    assert sum(line.count("x") for line in found) == 150


def test_a_document_breaks_between_its_pieces():
    path = filled([f"part_{i}." for i in range(30)], "")
    found = table(("path",), [(path,)]).splitlines()[2:]
    assert len(found) > 1
    assert all(line.endswith(".") for line in found)
