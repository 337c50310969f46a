"""Real processes for a test: each runs a function of the test's module; they talk by gloo on 127.0.0.1."""

import dataclasses
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of one process: what the function returned, the exit code, all that it printed, seconds.

    A code of `None` says that the process was still running and was ended.
    """

    result: Any
    code: int | None
    output: str
    seconds: float


def run_processes(function: Callable[..., Any], *args: object, **options: Any) -> list[Any]:
    """Run `function(*args)` in processes that see each other's devices, and return what each of them returns.

    `function` is one of the top level of a test module, which each process imports after
    `jax.distributed.initialize`, in float64 and with the strict promotion of the tests. Arguments and results
    are pickled: paths, numbers and NumPy arrays. In there `jax.process_index()` tells which process it is,
    and `jax.devices()` has the devices of all.

        def losses(folder):
            mesh = jax.make_mesh((4,), ("data",))
            ...
            return [float(value) for value in values]

        def test_two_processes_are_as_one(tmp_path):
            first, second = run_processes(losses, tmp_path)

    **Arguments:** those of `outcomes`.

    **Raises:** `AssertionError`, with all that was printed, if one of them fails or is not done in time. The
    others are ended a few seconds after that.
    """
    found = outcomes(function, *args, **{"patience": 2.0, **options})
    if any(one.code != 0 for one in found):
        texts = [f"--- process {i}: code {one.code}\n{one.output}" for i, one in enumerate(found)]
        raise AssertionError("\n".join(["expected all processes to succeed", *texts]))
    return [one.result for one in found]


def outcomes(
    function: Callable[..., Any],
    *args: object,
    processes: int = 2,
    devices: int = 2,
    timeout: float = 240.0,
    heartbeat: int = 100,
    patience: float | None = None,
) -> list[Outcome]:
    """Run `function(*args)` in processes, as `run_processes` does, and say how each ended.

    **Arguments:**

    - `processes`, `devices`: their number, and the number of devices of each.
    - `timeout`: the seconds after which those that still run are ended, with the code `None`.
    - `heartbeat`: the seconds without a sign of life after which JAX takes another process for dead.
    - `patience`: the seconds after the first failure of one after which the others are ended; `None` waits
        until they end or the time is over.
    """
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(index)) for index in range(processes)]
        address = f"127.0.0.1:{_free_port()}"
        for index, place in enumerate(places):
            call = (address, processes, index, heartbeat, function.__module__, function.__name__, args)
            place.with_suffix(".call").write_bytes(pickle.dumps(call))
        start = time.monotonic()
        running = [_start(place, devices) for place in places]
        codes: dict[int, tuple[int | None, float]] = {}
        try:
            end = start + timeout
            while len(codes) < processes and time.monotonic() < end:
                for index, process in enumerate(running):
                    if index not in codes and process.poll() is not None:
                        codes[index] = (process.returncode, time.monotonic() - start)
                        if process.returncode != 0 and patience is not None:
                            end = min(end, time.monotonic() + patience)
                time.sleep(0.02)
        finally:
            for process in running:
                process.kill()
                process.wait()
        late = (None, time.monotonic() - start)
        return [_outcome(place, *codes.get(i, late)) for i, place in enumerate(places)]


def _start(place: Path, devices: int) -> subprocess.Popen[bytes]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    with place.with_suffix(".out").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.processes", str(place)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _outcome(place: Path, code: int | None, seconds: float) -> Outcome:
    file = place.with_suffix(".result")
    result = pickle.loads(file.read_bytes()) if file.exists() else None
    return Outcome(result, code, place.with_suffix(".out").read_text(errors="replace"), seconds)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _main(place: Path) -> None:
    address, processes, index, heartbeat, module, name, args = pickle.loads(
        place.with_suffix(".call").read_bytes()
    )
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        processes,
        index,
        initialization_timeout=60,
        heartbeat_timeout_seconds=heartbeat,
        # A process that ends waits so long for the others.
        shutdown_timeout_seconds=heartbeat,
    )
    # Now, since at its top level a module may use the devices.
    function = getattr(importlib.import_module(module), name)
    try:
        result = function(*args)
    except BaseException:
        # At once: while the interpreter ends, JAX waits for the other processes.
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    place.with_suffix(".result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
