"""Handwritten digits: a small convolutional network that reads 8x8 images.

The 1797 images of scikit-learn's `load_digits`, written by people with real pens, are split once and for all
into four fifths to learn from and a fifth to test on, with the same share of every digit in both; of those to
learn from, a fifth is kept for validation. A network after LeNet-5 (LeCun et al., 1998), two convolutions
with batch normalisation and a pooling each and two dense layers, learns them by Adam in shuffled
mini-batches; the weights of the best validation count, and training ends early if there are no better ones.
All weights are one vector, which is what Adam steps; dropout draws its masks with a key in the state, and is
off in the test.

The run is saved as it goes. Kill it at any moment: `python digits.py --resume` goes on, and ends with the
same weights, bit for bit, as if nothing had happened.

The script prints the model and its accuracy on the test images, and draws some of them: the mistakes first,
then images that were read right. With an accuracy below 97 % the exit code is 1. It takes 10 to 20 seconds on
two cores.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flatlayers as fl


CHUNK = 50  # steps in one call of a compiled function, after which there is a validation and a checkpoint
BATCH = 64
PATIENCE = 8  # validations without a better one
REQUIRED = 0.97  # accuracy on the test images
SHOWN = (4, 10)  # rows and columns of the picture


class Digits(NamedTuple):
    """Images of shape `(n, 8, 8, 1)` with values from 0 to 1, and which digits they are."""

    images: np.ndarray
    labels: np.ndarray

    @staticmethod
    def load() -> tuple["Digits", "Digits", "Digits"]:
        """Images to learn from, to validate with and to test on; always the same."""
        images, labels = load_digits(return_X_y=True)
        whole = Digits((images / 16).astype(np.float32).reshape(-1, 8, 8, 1), np.asarray(labels))
        first, tested = whole.split()
        learned, validated = first.split()
        return learned, validated, tested

    def split(self) -> tuple["Digits", "Digits"]:
        """Four fifths and the rest."""
        parts = train_test_split(*self, test_size=0.2, random_state=0, stratify=self.labels)
        images, other_images, labels, other_labels = map(np.asarray, parts)
        return Digits(images, labels), Digits(other_images, other_labels)


def network() -> fl.Chain:
    return fl.Chain(
        fl.Conv((3, 3), 1, 16, pad=fl.SamePad()),
        fl.BatchNorm(16, jax.nn.relu),
        fl.MaxPool((2, 2)),
        fl.Conv((3, 3), 16, 32, pad=fl.SamePad()),
        fl.BatchNorm(32, jax.nn.relu),
        fl.MaxPool((2, 2)),
        fl.FlattenLayer(),
        fl.Dense(2 * 2 * 32, 64, jax.nn.relu),
        fl.Dropout(0.3),
        fl.Dense(64, 10),
    )


def train(model: fl.Chain, learned: Digits, validated: Digits, options: argparse.Namespace) -> fl.TrainResult:
    """Train by Adam, saved and validated after every chunk of steps."""
    setup_key, data_key = jax.random.split(jax.random.key(options.seed))
    ps, st = fl.setup(setup_key, model)
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, options.steps))

    def loss(ps: Any, st: Any, batch: Digits) -> tuple[Any, Any]:
        logits, st = model(batch.images, ps, st)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return value, (st, {"right": (logits.argmax(axis=1) == batch.labels).mean()})

    return fl.train_loop(
        *(loss, ps, st, adam, fl.batches(learned, BATCH, key=data_key)),
        steps=options.steps,
        chunk=CHUNK,
        validate=(loss, validated, CHUNK),
        patience=PATIENCE,
        save=options.file,
        save_every=CHUNK,
        resume=options.file if options.resume else None,
    )


def probabilities(model: fl.Chain, ps: Any, st: Any, images: np.ndarray) -> np.ndarray:
    """Probability of each digit, for each image."""
    read = jax.jit(lambda ps, x: jax.nn.softmax(model(x, ps, fl.testmode(st))[0]))
    return np.asarray(read(ps, images))


def plot(digits: Digits, chances: np.ndarray, out: Path) -> None:
    """Some of the images with the digit that was read and its probability: mistakes first, in red."""
    found = chances.argmax(axis=1)
    order = np.argsort(found == digits.labels, kind="stable")
    figure = Figure(figsize=(1.1 * SHOWN[1], 1.45 * SHOWN[0]), layout="constrained")
    for axis, i in zip(figure.subplots(*SHOWN).flat, order, strict=False):
        wrong = found[i] != digits.labels[i]
        axis.imshow(digits.images[i, :, :, 0], cmap="gray_r")
        title = f"{found[i]}, is {digits.labels[i]}" if wrong else f"{found[i]}"
        axis.set_title(f"{title}\n{chances[i].max():.0%}", fontsize=9, color="tab:red" if wrong else "black")
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Test images, what was read and how sure that is; mistakes first")
    figure.savefig(out, format="png", dpi=120)


def main() -> None:
    options = command_line.parse(
        "Learn to read handwritten digits with a small convolutional network; print the accuracy "
        "on images kept for the test and draw some of them.",
        out="digits.png",
        seed="of the first weights, batches and dropout",
        chunk=CHUNK,
        file="digits.safetensors",
    )
    start = time.perf_counter()
    learned, validated, tested = Digits.load()
    model = network()
    print(fl.pformat(model), flush=True)
    result = train(model, learned, validated, options)
    best = result.best
    assert best is not None
    print(
        f"\nThe best of {result.step} steps is after {best.step}, with a validation loss of {best.value:.3f}"
    )
    chances = probabilities(model, best.ps, best.st, tested.images)
    right = chances.argmax(axis=1) == tested.labels
    plot(tested, chances, options.out)
    print(
        f"{right.sum()} of {len(right)} test images read right: {right.mean():.1%}, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if right.mean() < REQUIRED:
        sys.exit(f"expected an accuracy of at least {REQUIRED:.0%}, found {right.mean():.1%}")


if __name__ == "__main__":
    main()
