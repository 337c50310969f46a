"""A process for each contestant: its memory is its own, and it takes its turn at a word from outside."""

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
from models import numbers
from timing import Call, time_of
from training import Problem, Steps, equinox_step, flat_loss, gradient, jitted_step, tree_loss


MOST_CALLS = 400  # in one turn


class OutOfTime(Exception):
    """The deadline came before the answer."""


class Failure(Exception):
    """A contestant raised an exception, or its process ended."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiling a program: seconds, bytes of temporary memory if the backend tells them, and its loss."""

    trace_seconds: float
    compile_seconds: float
    memory: int | None
    loss: float


class Gradient:
    """A call that gives a loss and its gradient."""

    def __init__(self, problem: Problem, make: Callable[..., Any]):
        made = gradient(problem, make)()
        assert not callable(made)
        self.run, self.args = jax.jit(made[0]), made[1]

    def __call__(self) -> Any:
        return self.run(*self.args)

    def lower(self) -> Any:
        return self.run.lower(*self.args)


Program = Gradient | Steps

# Of each problem. The steps in a scan are written alike for both: no library has a way of its own.
CONTESTANTS: Mapping[str, Mapping[str, Callable[[Problem], Program]]] = {
    "Equinox": {
        "gradient": lambda problem: Gradient(problem, tree_loss),
        "step": equinox_step,
        "scan": lambda problem: jitted_step(problem, tree_loss, scanned=problem.scanned),
    },
    "flat": {
        "gradient": lambda problem: Gradient(problem, flat_loss),
        "step": jitted_step,
        "scan": lambda problem: jitted_step(problem, scanned=problem.scanned),
    },
}


# In the process of the contestant


class Server:
    """Does what it is asked for by the names of its methods."""

    def __init__(self, name: str, problem: Problem):
        self.problem, self.make = problem, CONTESTANTS[name]
        self.calls: dict[str, Program] = {}

    def device(self) -> str:
        device = jax.devices()[0]
        return f"{device.platform} ({device.device_kind})"

    def compile(self, name: str) -> Compiled:
        self.calls.clear()  # and with it the arrays of the program before
        program = self.calls[name] = self.make[name](self.problem)
        start = time.perf_counter()
        lowered = program.lower()
        traced = time.perf_counter()
        executable = lowered.compile()  # the calls take it from the cache of the compiled function
        done = time.perf_counter()
        # Equinox has one of its own around that of JAX.
        memory = getattr(executable, "compiled", executable).memory_analysis()
        temporary = None if memory is None else int(memory.temp_size_in_bytes)
        loss = float(jax.tree.leaves(program())[0])
        return Compiled(traced - start, done - traced, temporary, loss)

    def gradient(self) -> list[np.ndarray]:
        return numbers(self.calls["gradient"]()[1], self.problem.depth + 1)

    def times(self, name: str, seconds: float) -> list[float]:
        call: Call = self.calls[name]
        times: list[float] = []
        while not times or (sum(times) < seconds and len(times) < MOST_CALLS):
            times.append(time_of(call))
        return times

    def peak(self) -> int | None:
        statistics = jax.devices()[0].memory_stats()
        return None if statistics is None else statistics.get("peak_bytes_in_use")


def serve(connection: Connection, name: str, problem: Problem, precision: str) -> None:
    """Answer one question after another, until the other end is closed."""
    jax.config.update("jax_default_matmul_precision", precision)
    server = Server(name, problem)
    while True:
        try:
            word, *args = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(server, word)(*args)
        except Exception as error:
            answer = Failure(f"{type(error).__name__}: {error}")
        connection.send(answer)


# In the process that measures


class Worker:
    """The process of a contestant, from outside. As a context manager it ends the process."""

    def __init__(self, name: str, problem: Problem, precision: str, deadline: float):
        self.name, self.deadline = name, deadline
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, problem, precision), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def ask(self, word: str, *args: Any) -> Any:
        """Wait for the answer. **Raises:** `Failure`, and `OutOfTime` at the deadline."""
        try:
            self.connection.send((word, *args))
            if not self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                raise OutOfTime
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Failure(f"{self.name}: its process ended with code {self.process.exitcode}") from None
        if isinstance(answer, Failure):
            raise Failure(f"{self.name}: {answer}")
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
