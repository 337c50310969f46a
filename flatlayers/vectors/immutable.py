"""`Immutable`: what records, layouts, vectors and matrices have in common."""

from typing import Any, Self


_set = object.__setattr__


class Immutable:
    """A value: its attributes are set once, when it is made, by `_fill` or by `_new`."""

    __slots__ = ()

    @classmethod
    def _new(cls, **attributes: object) -> Self:
        """Make a value without the checks of its constructor, from what the library has checked."""
        new = object.__new__(cls)
        for name, value in attributes.items():
            _set(new, name, value)
        return new

    def _fill(self, **attributes: object) -> Self:
        for name, value in attributes.items():
            _set(self, name, value)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        way_out = f"; use `.replace({name}=...)`" if hasattr(type(self), "replace") else ""
        raise AttributeError(f"a {type(self).__name__} is immutable{way_out}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable")

    def __reduce__(self) -> Any:
        return _again, (type(self), {name: getattr(self, name) for name in self.__slots__})


def _again(kind: type[Immutable], attributes: dict[str, object]) -> Immutable:
    return kind._new(**attributes)
