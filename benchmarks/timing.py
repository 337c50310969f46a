"""Interleaved timing: contestants take turns, so that what the machine does else hits all alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """Median seconds a call, and seconds to trace and compile, by contestant."""

    seconds: dict[str, float]
    compile_seconds: dict[str, float]

    def ratio(self, name: str, to: str) -> float:
        return self.seconds[name] / self.seconds[to]


def race(
    contestants: Mapping[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]],
    *,
    compilations: int = 3,
    seconds: float = 1.0,
    carry: bool = False,
) -> Result:
    """Time contestants against each other.

    Each contestant is a function that returns `(f, args)`; `f` is compiled afresh `compilations` times.
    In each the contestants are called in turn for about `seconds` a contestant. With `carry` the result
    of a call is the next one's arguments and the arguments are donated, as in a training step.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    compiling: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(compilations):
        calls = {}
        for name, make in contestants.items():
            jax.clear_caches()
            f, args = make()
            donate = tuple(range(len(args))) if carry else ()
            calls[name] = _Caller(jax.jit(f, donate_argnums=donate), args, carry)
            compiling[name].append(_time(calls[name]))
        slowest = max(_time(call) for call in calls.values())
        rounds = max(5, min(400, int(seconds / slowest)))
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(_time(call))
    return Result(
        {name: statistics.median(t) for name, t in times.items()},
        {name: statistics.median(t) for name, t in compiling.items()},
    )


class _Caller:
    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...], carry: bool):
        self.f, self.args, self.carry = f, args, carry

    def __call__(self) -> None:
        out = jax.block_until_ready(self.f(*self.args))
        if self.carry:
            self.args = out


def _time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
