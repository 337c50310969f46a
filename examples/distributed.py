"""Handwritten digits on several devices and in several processes: the same script, the same losses.

A network of three dense layers reads the 1797 images of scikit-learn's `load_digits`, by AdamW with clipped
gradients in float64. It is trained three times: on one device; over all devices as one, with `mesh=`; and
with `per_device=True`, where each device evaluates the loss for its part of the batch. Parameters and moments
are vectors in even parts, a part on each device.

    python distributed.py                  # on the devices that there are
    python distributed.py --devices 8      # on 8 devices, which are threads of the processor
    python distributed.py --processes 2    # in 2 processes, which this one starts; with --devices for each

The script prints a table: the losses, the bytes that a device holds of parameters and moments, and the
collective operations in a step, counted in the compiled program. If the losses are not the same or fewer than
95 % of the held-out images are read right, the exit code is 1. It takes about 15 seconds on two cores, 30 in
two processes.
"""

import argparse
import re
import socket
import subprocess
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from sklearn.datasets import load_digits

import flatlayers as fl


BATCH = 64
TESTED = 360  # images that are held out
SAME, REQUIRED = 1e-9, 0.95  # relative difference of losses, accuracy
MODEL = fl.MLP(64, (64, 64), 10, jnp.tanh)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train on several devices.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--devices", type=int, help="devices on the processor, in each process")
    parser.add_argument("--processes", type=int, default=1, help="processes to start")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def start_processes(count: int, argv: list[str]) -> int:
    """Start this script `count` times; return the largest exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *argv, "--port", str(port), "--process"]
    running = [subprocess.Popen([*command, str(number)]) for number in range(count)]
    return max(abs(process.wait()) for process in running)


def loss(ps: Any, st: Any, batch: Any) -> tuple[Any, Any]:
    images, labels = batch
    logits, st = MODEL(images, ps, st)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), st


def collectives(value_and_grad: Any, ps: Any, st: Any, batch: Any) -> str:
    """Count the collective operations in the compiled program of a step."""

    def step(ps: Any, opt_state: Any, batch: Any) -> Any:
        (value, _), gradient = value_and_grad(ps, st, batch)
        updates, opt_state = OPTIMIZER.update(gradient, opt_state, ps)
        return value, optax.apply_updates(ps, updates), opt_state

    program = jax.jit(step).lower(ps, fl.optimizer_state(OPTIMIZER, ps), batch).compile().as_text()
    found = Counter(re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", program or ""))
    return ", ".join(f"{found[kind]} {kind}" for kind in KINDS if found[kind]) or "none"


def bytes_per_device(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def compare(options: argparse.Namespace) -> tuple[list[np.ndarray], list[str], float]:
    """Train in three ways. Return the losses, the lines of the table and the least accuracy."""
    digits, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    images, labels = digits[order] / 16, labels[order].astype(np.int32)
    setup_key, data_key = jax.random.split(jax.random.key(options.seed))
    batches = fl.batches((images[TESTED:], labels[TESTED:]), BATCH, key=data_key)
    ps, st = fl.setup(setup_key, MODEL, float)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    shards = fl.shard(ps, mesh)
    batch = jax.device_put(jax.tree.map(np.asarray, batches.at(0)), shards.sharding())

    def of_whole(shards: Any, st: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda shards: loss(shards.gather(), st, batch), has_aux=True)(shards)

    ways = {
        "one device": ({}, ps, "none"),
        "mesh=": ({"mesh": mesh}, shards, collectives(of_whole, shards, st, batch)),
        "per_device=True": (
            {"mesh": mesh, "per_device": True},
            shards,
            collectives(fl.sharded_value_and_grad(loss, mesh), shards, st, batch),
        ),
    }
    losses, lines, accuracies = [], [], []
    for name, (where, start, counted) in ways.items():
        result = fl.train_loop(
            loss, start, st, OPTIMIZER, batches, steps=options.steps, progress=False, **where
        )
        held, end = bytes_per_device((result.ps, result.opt_state)), result.ps
        whole = end.gather() if isinstance(end, fl.ShardedVector) else end
        read = np.asarray(MODEL(images[:TESTED], whole, fl.testmode(st))[0]).argmax(axis=1)
        accuracies.append((read == labels[:TESTED]).mean())
        losses.append(result.losses)
        lines.append(f"{name:16} {losses[-1][0]:10.6f} {losses[-1][-1]:10.6f} {held:10,}  {counted}")
    return losses, lines, min(accuracies)


def main(argv: list[str] | None = None) -> int:
    options = options_of(argv)
    if options.processes > 1 and options.process is None:
        return start_processes(options.processes, sys.argv[1:] if argv is None else argv)
    jax.config.update("jax_enable_x64", True)  # so that losses can be compared
    if options.devices:  # before the first use of a device
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.process is not None:
        jax.distributed.initialize(f"127.0.0.1:{options.port}", options.processes, options.process)
    losses, lines, accuracy = compare(options)
    difference = max(np.abs(other / losses[0] - 1).max() for other in losses[1:])
    if jax.process_index() == 0:
        length = MODEL.layout.length
        print(f"Devices: {jax.device_count()}, processes: {jax.process_count()}, numbers: {length}")
        print(f"{'':16} {'first loss':>10} {'last loss':>10} {'bytes':>10}  collectives per step")
        print("\n".join(lines))
        print(f"Losses differ by at most {difference:.1e}; {accuracy:.1%} of the held-out images read right")
    return int(not (difference < SAME and accuracy >= REQUIRED))


if __name__ == "__main__":
    sys.exit(main())
