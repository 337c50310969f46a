"""Interleaved timing: contestants take turns, so that what the machine does else hits all alike."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


Call = Callable[[], Any]
# Makes a call that has yet to be compiled, or gives a function to be compiled and its arguments.
Contestant = Callable[[], Call | tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Result:
    """Median seconds a call, and seconds to trace and compile, by contestant."""

    seconds: dict[str, float]
    compile_seconds: dict[str, float]

    def ratio(self, name: str, to: str) -> float:
        return self.seconds[name] / self.seconds[to]

    def compile_ratio(self, name: str, to: str) -> float:
        return self.compile_seconds[name] / self.compile_seconds[to]


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled function takes: bytes of temporary memory, and instructions of its HLO."""

    memory: int
    instructions: int


def race(
    contestants: Mapping[str, Contestant],
    *,
    compilations: int = 3,
    seconds: float = 1.0,
    carry: bool = False,
    same: Sequence[str] = (),
    per_call: Mapping[str, int] | None = None,
) -> Result:
    """Time contestants against each other.

    Each contestant is a function that returns a call, or `(f, args)`, where `f` is compiled. All are made
    and compiled afresh `compilations` times. In each the contestants are called in turn for about `seconds`
    a contestant. With `carry` the result of a call is the next one's arguments and the arguments are
    donated, as in a training step. Those named in `same` have to return the same loss, a number or the
    first of what they return. `per_call`: how many steps one call of a contestant makes, if not one.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    compiling: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(compilations):
        jax.clear_caches()
        calls, losses = {}, {}
        # In the opposite order every other time: what comes first also traces what all of them use.
        for name in list(contestants)[:: 1 if i % 2 == 0 else -1]:
            made = contestants[name]()
            calls[name] = made if callable(made) else compiled(*made, carry=carry)
            compiling[name].append(time_of(calls[name]))
        for name in same:
            losses[name] = float(jax.tree.leaves(calls[name]())[0])
        np.testing.assert_allclose(list(losses.values()), [*losses.values()][:1] * len(losses), rtol=1e-3)
        slowest = max(time_of(call) for call in calls.values())
        rounds = max(3, min(400, int(seconds / slowest)))
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(time_of(call))
    steps = dict.fromkeys(contestants, 1) | dict(per_call or {})
    return Result(
        {name: statistics.median(t) / steps[name] for name, t in times.items()},
        {name: statistics.median(t) for name, t in compiling.items()},
    )


def compiled(f: Callable[..., Any], args: tuple[Any, ...], *, carry: bool = False) -> Call:
    """A call of `jax.jit(f)`, whose arguments are, with `carry`, what the last call returned."""
    jitted = jax.jit(f, donate_argnums=tuple(range(len(args))) if carry else ())

    def call() -> Any:
        nonlocal args
        out = jitted(*args)
        if carry:
            args = out
        return out

    return call


def program(make: Contestant) -> Program:
    """Compile what a contestant gives, and look at it."""
    made = make()
    assert not callable(made)
    f, args = made
    executable = jax.jit(f).lower(*args).compile()
    memory, text = executable.memory_analysis(), executable.as_text()
    assert memory is not None
    assert text is not None
    return Program(memory.temp_size_in_bytes, text.count(" = "))


def time_of(call: Call) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
