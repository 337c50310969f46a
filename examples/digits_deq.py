"""Handwritten digits by a deep equilibrium: a layer that is applied until nothing changes.

The 1797 images of scikit-learn's `load_digits` are split once and for all into four fifths to learn from and
a fifth to test on, with the same share of every digit in both. A convolution sees strokes `x`; from them the
equilibrium (Bai, Kolter and Koltun, "Deep Equilibrium Models", NeurIPS 2019) makes the features `z` for which
`z = tanh(A z + B x)`, and a dense layer reads them. They are found by Anderson acceleration, for each image
by itself, and differentiated implicitly: a step of training takes the memory of one application, however many
the solver makes. A weight on the Jacobian keeps the equation easy to solve (Bai, Koltun and Kolter, 2021).

The script prints the model, its accuracy on the test images and how the equation was solved, and draws how
the residual falls by plain iteration, Anderson and Broyden, and what the solver needed in training. With an
accuracy below 97 % the exit code is 1. It takes about 20 seconds on two cores.
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flatlayers as fl


BATCH = 64
FEATURES = 64
JACOBIAN = 5.0  # the weight of its mean square in the loss
TOLERANCE = 1e-3
REQUIRED = 0.97  # accuracy on the test images
APPLICATIONS = 20  # in the picture


class Digits(NamedTuple):
    """Images of shape `(n, 8, 8, 1)` with values from 0 to 1, and which digits they are."""

    images: np.ndarray
    labels: np.ndarray

    @staticmethod
    def load() -> tuple["Digits", "Digits"]:
        """Images to learn from and images to test on; always the same."""
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
        parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
        learned_images, tested_images, learned_labels, tested_labels = map(np.asarray, parts)
        return Digits(learned_images, learned_labels), Digits(tested_images, tested_labels)


def network() -> fl.Chain:
    cell = fl.Parallel(
        lambda z, x: jnp.tanh(z + x),
        fl.Dense(FEATURES, FEATURES, use_bias=False, init_weight=half),
        fl.Dense(4 * 4 * 16, FEATURES),
    )
    solver = fl.Anderson(TOLERANCE, TOLERANCE, batch_axes=1)
    return fl.Chain(
        strokes=fl.Conv((3, 3), 1, 16, jax.nn.relu, pad=fl.SamePad()),
        pool=fl.MaxPool((2, 2)),
        flat=fl.FlattenLayer(),
        features=fl.DeepEquilibriumNetwork(
            cell, solver, init=fl.WrappedFunction(nothing), max_steps=30, jacobian_regularization=1
        ),
        drop=fl.Dropout(0.3),
        head=fl.Dense(FEATURES, 10),
    )


def nothing(x: jax.Array) -> jax.Array:
    """The start of the solver: zeros."""
    return jnp.zeros((*x.shape[:-1], FEATURES), x.dtype)


def half(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Weights with a spectral radius of about a half, for which the equation is easy to solve."""
    return 0.5 * jax.random.normal(key, shape, dtype) / shape[1] ** 0.5


def train(model: fl.Chain, digits: Digits, steps: int, seed: int) -> fl.TrainResult:
    """Train by `steps` steps of Adam in shuffled mini-batches."""
    setup_key, data_key = jax.random.split(jax.random.key(seed))
    ps, st = fl.setup(setup_key, model)

    def loss(ps: Any, st: Any, batch: Digits) -> tuple[Any, Any]:
        logits, st = model(batch.images, ps, st)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        stats = st.features.stats
        metrics = {"entropy": entropy, "solver_steps": stats.num_steps}
        return entropy + JACOBIAN * stats.jacobian_loss, (st, metrics)

    # An equation that is nearly singular for one image gives a large gradient.
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(3e-3, steps)))
    return fl.train_loop(loss, ps, st, adam, fl.batches(digits, BATCH, key=data_key), steps=steps)


def residuals(solver: Any, model: fl.Chain, trained: fl.TrainResult, digits: Digits) -> np.ndarray:
    """The largest residual of a test image, averaged over all, after 0, 1, 2, ... applications.

    The solver takes its steps one by one, as optimistix has them taken.
    """
    ps, st = trained.ps.unpack(), fl.testmode(trained.st)
    x, _ = model[:3](jnp.asarray(digits.images), ps, st)
    layer: Any = model["features"]

    def fn(z: Any, args: Any) -> Any:
        return fl.stateless_apply(layer.model, (z, x), ps.features.model), None

    def step(carry: Any, _: Any) -> Any:
        z, state = carry
        residual = jnp.abs(fn(z, None)[0] - z).max(-1).mean()
        z, state, _ = solver.step(fn, z, None, {}, state, frozenset())
        return (z, state), residual

    def run() -> Any:
        z = jnp.zeros((len(x), FEATURES))
        state = solver.init(fn, z, None, {}, jax.eval_shape(lambda: z), None, frozenset())
        return jax.lax.scan(step, (z, state), length=APPLICATIONS + 1)[1]

    return np.asarray(jax.jit(run)())


def plot(found: dict[str, np.ndarray], trained: fl.TrainResult, out: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, values), style in zip(found.items(), ("o-", "s-", "^-"), strict=True):
        left.semilogy(values, style, ms=4, label=name)
    left.axhline(TOLERANCE, color="black", lw=1, ls=":", label="tolerance in training")
    left.set(
        title="Residual of z = tanh(A z + B x)", xlabel="applications", xticks=range(0, APPLICATIONS + 1, 4)
    )
    left.set_ylabel("largest of an image, mean over test images")
    left.legend()
    names, mean = ("entropy", "solver_steps"), np.full(20, 1 / 20)
    entropy, steps = (np.convolve(trained.metrics[name], mean, "valid") for name in names)
    at = np.arange(len(steps)) + len(mean) / 2
    right.semilogy(at, entropy, color="tab:blue")
    right.set(title="Training, running means of 20 steps", xlabel="step of Adam")
    right.set_ylabel("cross-entropy", color="tab:blue")
    other = right.twinx()
    other.plot(at, steps, color="tab:orange")
    other.set_ylim(0)
    other.set_ylabel("steps of Anderson", color="tab:orange")
    figure.savefig(out, format="png", dpi=120)


def report(model: fl.Chain, trained: fl.TrainResult, tested: Digits) -> float:
    """Print how the equation is solved for the test images, and return the accuracy."""
    ps, st = trained.ps, fl.testmode(trained.st)
    cell: Any = model["features"]
    x, _ = model[:3](jnp.asarray(tested.images), ps, st)
    z, features = jax.jit(cell)(x, ps.features, st.features)
    radius = jax.jit(lambda z, x: fl.spectral_radius(cell.model, z, x, ps.features.model, {}))
    right = np.asarray(model[4:](z, ps, st)[0].argmax(-1) == tested.labels)
    print(
        f"\n{right.sum()} of {len(right)} test images read right: {right.mean():.1%}\n"
        f"Anderson took {features.stats.num_steps} steps to a residual of {features.stats.residual:.1e}; in "
        f"training {trained.metrics['solver_steps'].mean():.1f} on average.\n"
        f"The spectral radius of the Jacobian is {radius(z, x):.2f}: the largest of all test images."
    )
    return float(right.mean())


def main() -> None:
    options = command_line.parse(
        "Learn to read handwritten digits with a deep equilibrium network; print the accuracy on "
        "images kept for the test and draw how three solvers find the equilibrium.",
        out="digits_deq.png",
        seed="of the first weights and the batches",
    )
    start = time.perf_counter()
    learned, tested = Digits.load()
    model = network()
    print(fl.pformat(model), flush=True)
    trained = train(model, learned, options.steps, options.seed)
    accuracy = report(model, trained, tested)
    never = 1e-9  # so that nothing stops
    solvers = {
        "plain iteration": optx.FixedPointIteration(never, never),
        "Anderson": fl.Anderson(never, never, batch_axes=1),
        "Broyden": fl.Broyden(never, never, batch_axes=1),
    }
    found = {name: residuals(solver, model, trained, tested) for name, solver in solvers.items()}
    plot(found, trained, options.out)
    print(f"The picture is in {options.out}, after {time.perf_counter() - start:.1f} s")
    if accuracy < REQUIRED:
        sys.exit(f"expected an accuracy of at least {REQUIRED:.0%}, found {accuracy:.1%}")


if __name__ == "__main__":
    main()
