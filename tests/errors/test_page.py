"""The page of errors and their cures: each message on it is one that the library raises.

A section has a module, whose functions raise its messages, one each, in the order of the page.
"""

import inspect

import pytest

from . import derivatives, devices, equations, files, layers, precision, solves, training, vectors
from .page import SECTIONS, messages_for


MODULES = {
    "A solve that fails": solves,
    "Vectors and names": vectors,
    "Layers and state": layers,
    "Differential equations and fixed points": equations,
    "Training": training,
    "Several devices": devices,
    "Derivatives": derivatives,
    "Files and other libraries": files,
    "Precision and times": precision,
}

# With an underscore in front: what several of them share.
RAISING = {
    section: [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    for section, module in MODULES.items()
}

KINDS = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, UserWarning)


def test_the_page_has_all_of_them():
    assert list(SECTIONS) == list(MODULES)
    assert {section: len(messages) for section, messages in SECTIONS.items()} == {
        section: len(raising) for section, raising in RAISING.items()
    }


PAIRS = [
    pytest.param(message, raising, id=f"{MODULES[section].__name__.rpartition('.')[2]}-{raising.__name__}")
    for section, messages in SECTIONS.items()
    for message, raising in zip(messages, RAISING.get(section, []), strict=False)
]


@pytest.mark.parametrize(("message", "raising"), PAIRS)
def test_what_is_raised_is_one_message_of_the_page(message, raising, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KINDS) as caught:
        raising()
    assert messages_for(caught.value) == [message], caught.value
