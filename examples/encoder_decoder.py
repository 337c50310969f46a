"""Two years of carbon dioxide from the five before: a recurrent encoder and decoder that share a carry.

An LSTM reads 60 months of carbon dioxide at Mauna Loa; months without a measurement are marked. With
`return_carry=True` it gives its carry, and a second LSTM starts from it and runs over what is known of the
next 24 months, which is their place in the year. So neither needs a scan of one's own. Both see the series
less the mean of the last year that was read. All months to the end of 1985 are learned, from random starts.

The script prints the model, the errors of its forecasts from all later starts in parts per million, and those
of two rules: the last twelve months again, and these with the mean growth of the five years; and it draws a
picture. If the model does not have the least error, the exit code is 1. It takes about 20 seconds on two
cores.
"""

import sys
import time
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import flatlayers as fl


DATA = Path(__file__).parent / "data" / "co2.csv"
LAST_LEARNED = 1986.0
PAST, AHEAD = 60, 24  # months
HIDDEN, BATCH = 24, 64
SCALE = 3.0  # parts per million


class Forecast(fl.Container):
    """From `(past, months)` with shapes `(..., PAST, 4)` and `(..., AHEAD, 3)` to `(..., AHEAD)`."""

    encoder: fl.Layer
    decoder: fl.Layer
    readout: fl.Layer

    def forward(self, x: Any, ps: Any, st: Any) -> tuple[Any, Any]:
        past, months = x
        (_, carry), _ = self.encoder(past, ps.encoder, st.encoder)
        hidden, _ = self.decoder((months, carry), ps.decoder, st.decoder)
        ys, _ = self.readout(hidden, ps.readout, st.readout)
        return ys[..., 0], st


def forecast() -> Forecast:
    return Forecast(
        fl.LSTM(4, HIDDEN, return_carry=True),
        fl.LSTM(3, HIDDEN, return_sequence=True),
        fl.Dense(HIDDEN, 1),
    )


def read() -> tuple[np.ndarray, np.ndarray]:
    """The middles of all months as years, and their means; NaN where there is none."""
    year, month, co2 = np.loadtxt(DATA, delimiter=",", skiprows=1, unpack=True)
    place = np.round(12 * (year - year[0]) + month - month[0]).astype(int)
    series = np.full(place[-1] + 1, np.nan)
    series[place] = co2
    return year[0] + (month[0] - 0.5 + np.arange(len(series))) / 12, series


def pieces(times: np.ndarray, series: np.ndarray) -> tuple[tuple[Any, Any], Any, Any]:
    """All pieces: the model's input, what it should give, NaN where that is not known, and the level."""
    windows = np.lib.stride_tricks.sliding_window_view
    ys, ts = windows(series, PAST + AHEAD), windows(times, PAST + AHEAD)
    level = np.nanmean(ys[:, PAST - 12 : PAST], axis=1, keepdims=True)
    ys = (ys - level) / SCALE
    season = [np.sin(2 * np.pi * ts), np.cos(2 * np.pi * ts)]
    ahead = np.broadcast_to(np.arange(1 - PAST, AHEAD + 1) / AHEAD, ts.shape)
    x = np.stack([*season, ahead, np.nan_to_num(ys), np.isfinite(ys)], axis=-1).astype(np.float32)
    return (x[:, :PAST, [0, 1, 3, 4]], x[:, PAST:, :3]), ys[:, PAST:].astype(np.float32), level


def train(model: Forecast, x: Any, ys: Any, steps: int, seed: int) -> fl.TrainResult:
    """AdamW on the mean square of the months that are known."""
    ps, st = fl.setup(jax.random.key(seed), model)
    x, ys = jax.tree.map(jnp.asarray, (x, ys))

    def loss(ps: Any, st: Any, batch: Any) -> tuple[Any, Any]:
        found, st = model(jax.tree.map(lambda part: part[batch], x), ps, st)
        known = jnp.isfinite(ys[batch])
        return jnp.sum(jnp.where(known, found - ys[batch], 0.0) ** 2) / jnp.sum(known), st

    schedule = optax.cosine_decay_schedule(1e-2, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3))
    batches = np.random.default_rng(seed).integers(len(ys), size=(steps, BATCH))
    return fl.train_loop(loss, ps, st, optimizer, iter(batches), steps=steps, chunk=50)


def others(series: np.ndarray) -> dict[str, np.ndarray]:
    """The forecasts of two rules from the same past."""
    past = np.lib.stride_tricks.sliding_window_view(series, PAST + AHEAD)[:, :PAST]
    years = past.reshape(-1, PAST // 12, 12)
    growth = np.nanmean(years[:, 1:] - years[:, :-1], axis=(1, 2))[:, None]
    last = np.tile(years[:, -1], 2)
    return {"the last year": last, "that and the mean growth": last + growth * np.repeat([1.0, 2.0], 12)}


def error(found: np.ndarray, ys: np.ndarray, axis: int | None = None) -> Any:
    return np.sqrt(np.nanmean((found - ys) ** 2, axis=axis))


def plot(
    times: np.ndarray, series: np.ndarray, found: dict[str, np.ndarray], ys: np.ndarray, out: Path
) -> None:
    """`found` are forecasts in parts per million from each start, the model's first, `ys` the truth."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplot_mosaic("ss;ke", height_ratios=(1.2, 1), width_ratios=(1.5, 1))
    (name, model), *_ = found.items()
    first = np.arange(len(model)) + PAST
    starts = np.arange(len(model) - 1, -1, -AHEAD)[::-1]
    for axis, some in ((axes["s"], starts), (axes["k"], starts[-2:])):
        low = first[some[0]] - 12
        axis.plot(times[low:], series[low:], "k.", ms=4, label="measured")
        for i in some:
            part = slice(first[i], first[i] + AHEAD)
            label = f"{name}, from the five years before" if i == some[0] else None
            axis.plot(times[part], model[i], color="C0" if (i - some[0]) % (2 * AHEAD) else "C1", label=label)
            axis.axvline(float(times[first[i]]) - 1 / 24, color="0.85", lw=0.8, zorder=0)
        axis.set(xlabel="year", ylabel="carbon dioxide (ppm)")
    axes["s"].legend(loc="upper left")
    for label, values in found.items():
        axes["e"].plot(np.arange(1, AHEAD + 1), error(values, ys, axis=0), label=label)
    axes["e"].set(xlabel="months ahead", ylabel="error (ppm)", ylim=(0, None))
    axes["e"].legend(fontsize="small")
    figure.savefig(out, format="png", dpi=110)


def main() -> None:
    options = command_line.parse(
        "Foretell two years of carbon dioxide by an encoder and a decoder; print the errors and draw some.",
        out="encoder_decoder.png",
        seed="of the first weights and the batches",
        steps=1500,
        steps_of="steps of AdamW",
    )
    start = time.perf_counter()
    times, series = read()
    learned, later = times < LAST_LEARNED, slice(np.searchsorted(times, LAST_LEARNED) - PAST, None)
    model = forecast()
    print(fl.pformat(model), flush=True)
    x, ys, _ = pieces(times[learned], series[learned])
    result = train(model, x, ys, options.steps, options.seed)

    x, ys, level = pieces(times[later], series[later])
    ys = ys * SCALE + level
    predicted, _ = jax.jit(model)(x, result.ps, result.st)
    found = {"the model": np.asarray(predicted) * SCALE + level, **others(series[later])}
    plot(times[later], series[later], found, ys, options.out)
    errors = {name: error(values, ys) for name, values in found.items()}
    text = ", ".join(f"{value:.2f} by {name}" for name, value in errors.items())
    print(
        f"\nErrors in ppm: {text}; with {len(result.ps)} parameters in one vector, "
        f"after {time.perf_counter() - start:.1f} s\nThe picture is in {options.out}"
    )
    if min(errors, key=errors.__getitem__) != "the model":
        sys.exit(f"expected the least error by the model, found {text}")


if __name__ == "__main__":
    main()
