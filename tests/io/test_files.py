import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict, namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings

import flatlayers as fl
from tests.helpers import assert_same, counting_jit
from tests.io.helpers import assert_round, small_run
from tests.vectors.layouts import layouts


ROOT = Path(__file__).parent.parent.parent
DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
    "complex64", "complex128",
]  # fmt: skip


def round_trip(path, **parts):
    fl.save(path, **parts)
    return fl.load(path)


# Round trips


def test_a_run_comes_back(tmp_path):
    run = small_run()
    loaded = round_trip(tmp_path / "run", **run)
    assert list(loaded) == list(run)
    assert_round(loaded, run)
    assert loaded["ps"].layout == run["ps"].layout
    assert loaded["flags"] == run["flags"]
    fitted = fl.load(tmp_path / "run", **run)
    assert_round(fitted, run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    size = jnp.dtype(dtype).itemsize
    numbers = np.random.default_rng(0).integers(0, 256, (3, 2, 32 * size), np.uint8)
    numbers = numbers % 2 == 0 if dtype == "bool" else numbers.view(jnp.dtype(dtype))
    array = jnp.asarray(numbers)
    layout = fl.Layout({"a": (3, 5), "b": (), "s": fl.Layout({"w": (4, 2)}).stack(2)})
    parts = {"array": array, "numpy": numbers, "one": numbers[0, 0, 0], "none": array[:, :0]}
    parts["vector"] = fl.ComponentVector(array[0, 0], layout)
    parts["ensemble"] = fl.ComponentVector(array, layout)
    loaded = round_trip(tmp_path / "x", **parts)
    assert_round(loaded, parts)
    assert loaded["ensemble"].layout == layout
    for name, value in parts.items():
        assert loaded[name].dtype == jnp.dtype(dtype), name
        if hasattr(value, "shape"):
            assert loaded[name].shape == value.shape


def test_all_bits_of_floats_stay(tmp_path):
    numbers = np.array([0x7FF8000000000001, 0xFFF0000000000000, 0x8000000000000000, 1], np.uint64)
    loaded = round_trip(tmp_path / "x", a=numbers.view(np.float64), b=jnp.asarray(numbers.view(np.float64)))
    assert loaded["a"].tobytes() == np.asarray(loaded["b"]).tobytes() == numbers.tobytes()


@pytest.mark.long
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layouts)
def test_any_layout_comes_back(tmp_path, layout):
    scalars = [path for path, shape in layout.view_shapes.items() if shape == ()]
    layout = layout.tie(dict.fromkeys(scalars[1:], scalars[0])) if scalars else layout
    v = fl.ComponentVector(jnp.arange(float(layout.length)), layout)
    loaded = round_trip(tmp_path / "x", v=v, more=fl.ComponentVector(jnp.stack([v.data, -v.data]), layout))
    assert loaded["v"].layout == loaded["more"].layout == layout
    assert_same(loaded["v"].data, v.data)
    assert_same(loaded["more"].data[1], -v.data)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_go_on_as_they_were(implementation, tmp_path):
    key = jax.random.key(3, impl=implementation)
    loaded = round_trip(tmp_path / "x", key=key, keys=jax.random.split(key, (2, 3)))
    assert loaded["key"].dtype == key.dtype
    assert loaded["keys"].shape == (2, 3)
    assert_same(jax.random.normal(loaded["key"], (3,)), jax.random.normal(key, (3,)))
    assert_same(loaded["keys"], jax.random.split(key, (2, 3)))


def test_numbers_and_text_come_back_as_what_they_were(tmp_path):
    numbers = [
        0,
        -1,
        2**80,
        0.1,
        -0.0,
        5e-324,
        float("inf"),
        -float("inf"),
        True,
        None,
        "",
        "ü\n\0\u2028",
        1.0,
    ]
    loaded = round_trip(tmp_path / "x", numbers=numbers, nan=float("nan"))
    assert repr(loaded["numbers"]) == repr(numbers)
    assert repr(loaded["nan"]) == "nan"


def test_nothing_at_all(tmp_path):
    assert round_trip(tmp_path / "x") == {}
    parts = {"a": {}, "b": (), "c": [], "d": fl.Record(), "e": fl.ComponentVector.zeros(fl.Layout({}))}
    loaded = round_trip(tmp_path / "x", **parts)
    assert_round(loaded, parts)


def test_names_of_mappings_can_be_any_text(tmp_path):
    parts = {"": jnp.ones(1), "a b": {"__metadata__": jnp.zeros(2)}, "ü.x": 1, "data": jnp.ones(3)}
    loaded = round_trip(tmp_path / "x", m=parts)
    assert list(loaded["m"]) == list(parts)
    assert_round(loaded["m"], parts)


def test_the_order_of_mappings_stays(tmp_path):
    assert list(round_trip(tmp_path / "x", m={"z": 1, "a": 2})["m"]) == ["z", "a"]
    like = OrderedDict(z=0, a=0)
    loaded = fl.load(tmp_path / "x", m=like)["m"]
    assert type(loaded) is OrderedDict
    assert loaded == {"z": 1, "a": 2}


def test_the_order_of_bytes_and_of_axes_does_not_matter(tmp_path):
    numbers = np.arange(6.0).reshape(2, 3)
    loaded = round_trip(tmp_path / "x", big=numbers.astype(">f8"), turned=np.asfortranarray(numbers))
    for value in loaded.values():
        assert value.dtype == np.float64
        np.testing.assert_array_equal(value, numbers)


def optimizers():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 10)
    return {
        "adamw": optax.adamw(schedule),
        "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(schedule), optax.ema(0.9)),
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "lbfgs": optax.lbfgs(),
        "steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        "injected": optax.inject_hyperparams(optax.adam)(learning_rate=schedule),
        "per_leaf": fl.per_leaf(optax.lamb(0.1)),
        "adafactor": optax.adafactor(0.1),
        "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", optimizers())
def test_states_of_optimisers_go_on(name, tmp_path):
    """A step from the loaded state is the step that comes without saving."""
    optimizer = optax.with_extra_args_support(optimizers()[name])
    ps = fl.ComponentVector.of({"w": jnp.arange(4.0, dtype=jnp.float32).reshape(2, 2), "b": jnp.float32(1.0)})

    def value(ps):
        return jnp.sum((ps.data - jnp.float32(3.0)) ** 2)

    def step(ps, state):
        v, g = jax.value_and_grad(value)(ps)
        updates, state = optimizer.update(g, state, ps, value=v, grad=g, value_fn=value)
        return optax.apply_updates(ps, updates), state

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        start = optimizer.init(ps)
        ps, state = step(*step(ps, start))
        fl.save(tmp_path / "x", ps=ps, opt_state=state)
        loaded = fl.load(tmp_path / "x", ps=ps, opt_state=jax.eval_shape(optimizer.init, ps))
        assert_round(loaded["opt_state"], state)
        assert_same(step(loaded["ps"], loaded["opt_state"]), step(ps, state))


@pytest.mark.long
def test_ten_steps_a_file_and_ten_more_are_twenty(tmp_path):
    """With dropout, batch statistics, a schedule and shuffled batches."""
    model = fl.Chain(fl.Dense(2, 8, jnp.tanh), fl.BatchNorm(8), fl.Dropout(0.3), fl.Dense(8, 1))
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.05, 20))
    x = jax.random.normal(jax.random.key(1), (32, 2), jnp.float32)

    def step(ps, st, opt_state, key):
        key, shuffle = jax.random.split(key)
        batch = x[jax.random.permutation(shuffle, 32)[:8]]

        def loss(ps):
            y, new = model(batch, ps, st)
            return jnp.mean((y - batch[:, :1]) ** 2), new

        (_, new), gradient = jax.value_and_grad(loss, has_aux=True)(ps)
        updates, opt_state = optimizer.update(gradient, opt_state, ps)
        return optax.apply_updates(ps, updates), new, opt_state, key

    step, traced = counting_jit(step)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        ps, st = fl.setup(jax.random.key(0), model)
        names = ("ps", "st", "opt_state", "key")
        run = start = dict(zip(names, (ps, st, optimizer.init(ps), jax.random.key(2)), strict=True))
        for number in range(20):
            if number == 10:
                fl.save(tmp_path / "x", **run)
            run = dict(zip(names, step(**run), strict=True))
        resumed = fl.load(tmp_path / "x", **start)
        for _ in range(10):
            resumed = dict(zip(names, step(**resumed), strict=True))
        assert_round(resumed, run)
        assert len(traced) == 1


def test_without_like_named_tuples_are_records(tmp_path):
    ps = fl.ComponentVector.of({"w": jnp.ones(2)})
    state = round_trip(tmp_path / "x", opt=optax.adam(0.1).init(ps))["opt"]
    assert isinstance(state[0], fl.Record)
    assert tuple(state[0]) == ("count", "mu", "nu")
    assert_same(state[0].nu.w, jnp.zeros(2))
    # Names of fields that a record would refuse.
    Odd = namedtuple("Odd", ["data", "values"])
    assert round_trip(tmp_path / "x", odd=Odd(1, 2))["odd"]["values"] == 2
    assert fl.load(tmp_path / "x", odd=Odd(0, 0))["odd"] == Odd(1, 2)


def test_loaded_numbers_can_be_donated_and_written_to(tmp_path):
    fl.save(tmp_path / "x", a=jnp.arange(1000.0), b=np.arange(3.0))
    loaded = fl.load(tmp_path / "x")
    doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(loaded["a"])
    np.testing.assert_array_equal(doubled, 2 * np.arange(1000.0))
    loaded["b"][0] = 5.0
    assert fl.load(tmp_path / "x")["b"][0] == 0.0


# With `like`


def expect_lines(path, lines, ending, **like):
    with pytest.raises(fl.LayoutMismatchError) as info:
        fl.load(path, **like)
    assert info.value.lines == lines
    assert ending in str(info.value)
    assert all(line in str(info.value) for line in lines[:20])


def test_another_layout_is_told_line_by_line(tmp_path):
    path = tmp_path / "x"
    ps = fl.ComponentVector.of({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})
    other = fl.ComponentVector.of({"w": jnp.ones((3, 2)), "gain": jnp.ones(2)})
    fl.save(path, ps=ps, many=[ps] * 30)
    lines = ["ps.w: (2, 3) became (3, 2)", "ps.b: (2,) is gone", "ps.gain: (2,) is new"]
    expect_lines(path, lines, "'ps' in the file is not like the one given:", ps=other)
    with pytest.raises(fl.LayoutMismatchError, match="and 70 more") as info:
        fl.load(path, many=[other] * 30)
    assert len(info.value.lines) == 90
    # The same length and another dtype or other leading axes.
    line = "ps: ComponentVector(float64[8]) became ComponentVector(float32[8])"
    expect_lines(path, [line], "", ps=fl.ComponentVector(ps.data.astype("float32"), ps.layout))
    line = "ps: ComponentVector(float64[8]) became ComponentVector(float64[2,8])"
    expect_lines(path, [line], "", ps=fl.ComponentVector(jnp.ones((2, 8)), ps.layout))
    expect_lines(path, ["ps: ComponentVector(float64[8]) became float64[8]"], "", ps=ps.data)


def test_another_optimiser(tmp_path):
    path = tmp_path / "x"
    ps = fl.ComponentVector.of({"w": jnp.ones(2)})
    fl.save(path, opt=optax.adam(0.1).init(ps))
    lines = ["opt.0: count, mu, nu became trace"]
    expect_lines(path, lines, "another optimiser?", opt=optax.sgd(0.1, momentum=0.9).init(ps))
    chain = optax.chain(optax.clip(1.0), optax.adam(0.1)).init(ps)
    expect_lines(
        path,
        ["opt.0: count, mu, nu became no names", "opt.1: {} became tuple of 2 parts"],
        "another optimiser?",
        opt=chain,
    )


def test_each_kind_is_compared(tmp_path):
    path = tmp_path / "x"
    fl.save(path, **small_run(), n=np.arange(3), k=jax.random.key(0))
    expect_lines(path, ["step: 41 became 0.0"], "", step=0.0)
    expect_lines(path, ["rate: 0.1 became 1"], "", rate=1)
    expect_lines(path, ["note: 'fit' became None"], "", note=None)
    lines = ["flags.0: True became 1", "flags.2: 1 became list of 0 parts"]
    expect_lines(path, lines, "", flags=(1, None, []))
    expect_lines(path, ["n: int64[3] became int64[4]"], "", n=np.arange(4))
    expect_lines(path, ["k: key<fry>[] became key<rbg>[]"], "", k=jax.random.key(0, impl="rbg"))
    expect_lines(path, ["st: key, training, mean, inner became key"], "", st=fl.Record(key=jax.random.key(0)))
    loaded = fl.load(path, n=jnp.arange(3), step=0, note="", k=jax.random.key(1))
    assert isinstance(loaded["n"], jax.Array)
    assert loaded["step"] == 41
    assert isinstance(fl.load(path, st={**small_run()["st"]})["st"], dict)
    with pytest.raises(TypeError, match="'n': expected parts that a file can have, found set"):
        fl.load(path, n={1})


def test_a_part_that_is_not_there(tmp_path):
    fl.save(tmp_path / "x", ps=jnp.ones(2), step=1)
    with pytest.raises(KeyError) as info:
        fl.load(tmp_path / "x", st=fl.Record())
    assert str(info.value) == "no part 'st' in the file; there are: ps, step"


def test_dtypes_are_not_converted(tmp_path):
    v = fl.ComponentVector.of({"w": jnp.ones(2)})
    fl.save(tmp_path / "x", ps=v)
    fl.save(tmp_path / "y", n=np.ones(2), one=np.int64(3))
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match="'ps' has numbers of dtype float64, which JAX has only with"):
            fl.load(tmp_path / "x")
        assert fl.describe_file(tmp_path / "x")["ps"].dtype == np.float64
        # NumPy's arrays stay NumPy's.
        loaded = fl.load(tmp_path / "y")
        assert loaded["n"].dtype == np.float64
        assert type(loaded["one"]) is np.int64


def test_numbers_that_are_not_finite(tmp_path):
    v = fl.ComponentVector(jnp.asarray([1.0, jnp.nan, 2.0]), fl.Layout({"a": (), "b": (2,)}))
    fl.save(tmp_path / "x", n=jnp.arange(2), ps=v, e=jnp.ones(0))
    assert np.isnan(fl.load(tmp_path / "x")["ps"].b[0])
    with pytest.raises(ValueError, match="'ps.b': expected finite numbers"):
        fl.load(tmp_path / "x", finite=True)
    fl.save(tmp_path / "x", n=jnp.arange(2), ps=v.a)
    assert_same(fl.load(tmp_path / "x", finite=True)["ps"], v.a)
    fl.save(tmp_path / "x", best={"value": float("inf")})
    with pytest.raises(ValueError, match=r"'best\.value': expected a finite number, found inf"):
        fl.load(tmp_path / "x", finite=True)


# What cannot be saved


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"a": [jnp.ones(1), fl.Dense(1, 1)]}, r"'x\.a\.1': expected vectors, records, .* found Dense"),
        ({"f": jnp.tanh}, r"'x\.f'"),
        (1j, "found complex"),
        (b"abc", "found bytes"),
        (np.array(["a"]), "no numbers of dtype <U1"),
        (np.array([None]), "no numbers of dtype object"),
        (np.ma.array([1.0, 2.0], mask=[False, True]), "found a masked array"),
        (jnp.ones(2, "int4"), "no numbers of dtype int4"),
        ({1: 2}, "names that are text, found 1"),
        (fl.ComponentVector._new(data=None, layout=fl.Layout({"a": ()})), "a vector of numbers"),
    ],
)
def test_what_cannot_be_saved_is_named(part, text, tmp_path):
    with pytest.raises(TypeError, match=f"cannot save .*{text}"):
        fl.save(tmp_path / "x", x=part)
    assert list(tmp_path.iterdir()) == []


def test_inside_a_compiled_function(tmp_path):
    with pytest.raises(TypeError, match="cannot save 'x': .*compiled function"):
        jax.jit(lambda x: fl.save(tmp_path / "x", x=x))(jnp.ones(1))


def test_bad_names(tmp_path):
    for name in ("finite", "_x", "a.b", "__metadata__", ""):
        with pytest.raises(ValueError, match="names, found"):
            fl.save(tmp_path / "x", **{name: 1})
    with pytest.raises(ValueError, match="'x.a.b' twice"):
        fl.save(tmp_path / "x", x={"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    deep = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ValueError, match="at most 100 parts inside each other"):
        fl.save(tmp_path / "x", x=deep)
    bomb = fl.ComponentVector.zeros(fl.Layout({"a": fl.Layout({"b": (0,)}).stack(10**7)}))
    with pytest.raises(ValueError, match="at most 1000000 names"):
        fl.save(tmp_path / "x", x=bomb)


# What is in a file


def test_describing_reads_no_numbers(tmp_path):
    run = small_run()
    fl.save(tmp_path / "x", **run)
    whole = (tmp_path / "x").read_bytes()
    arrays = (run["ps"].data, run["st"].mean, run["st"].inner.count, jax.random.key_data(run["st"].key))
    numbers = sum(np.asarray(array).nbytes for array in arrays)
    (tmp_path / "x").write_bytes(whole[:-numbers] + b"\xff" * numbers)
    described = fl.describe_file(tmp_path / "x")
    assert described["ps"].layout == run["ps"].layout
    assert (described["ps"].shape, described["ps"].dtype) == ((8,), np.float32)
    assert described["st"].key.dtype == jax.random.key(0).dtype
    assert described["st"].mean == jax.ShapeDtypeStruct((2,), np.float64)
    assert described["step"] == 41
    with pytest.raises(fl.FileFormatError, match="checksum"):
        fl.load(tmp_path / "x")
    # It serves as what a part has to be like.
    (tmp_path / "x").write_bytes(whole)
    assert_round(fl.load(tmp_path / "x", **described), run)


def test_describing_takes_no_memory_for_numbers(tmp_path):
    fl.save(tmp_path / "x", ps=fl.ComponentVector(jnp.zeros(4_000_000), fl.Layout({"a": (4_000_000,)})))
    fl.describe_file(tmp_path / "x")
    tracemalloc.start()
    fl.describe_file(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


# A process that is killed

KILLED = """
import sys, jax.numpy as jnp, flatlayers as fl
print("ready", flush=True)
n = 0
while True:
    n += 1
    fl.save(sys.argv[1], v=fl.ComponentVector(jnp.full(200_000, float(n)), fl.Layout({"a": (200_000,)})), n=n)
"""


@pytest.mark.long
def test_a_process_that_is_killed_leaves_a_whole_file(tmp_path):
    path = tmp_path / "x"
    for pause in (0.3, 0.37):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
        )
        assert process.stdout.readline() == "ready\n"
        while not path.exists():
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
        process.communicate()
        loaded = fl.load(path)
        np.testing.assert_array_equal(loaded["v"].data, float(loaded["n"]))
        assert {file.name for file in tmp_path.iterdir()} <= {"x", "x.tmp"}
    fl.save(path, n=0)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
