"""What a run that ends otherwise leaves: errors that carry a result, NaN and Ctrl-C."""

import os
import pickle
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flatlayers as fl
from flatlayers.fitting import run as running
from tests.helpers import assert_same


def falling(ps, st, batch):
    """Each step of `optax.sgd(1.0)` takes 1 from the parameter."""
    return ps.a, {"count": st.count + 1}


def start():
    return fl.ComponentVector.of({"a": 10.0}, dtype=float), fl.Record(count=0)


def train(loss=falling, data=None, **options):
    options = {"steps": 6, "chunk": 2, "progress": False, **options}
    return fl.train_loop(loss, *start(), optax.sgd(1.0), data, **options)


@pytest.fixture(params=[False, True], ids=["beside", "in place"])
def _large(request, monkeypatch):
    """Both ways, as small and large vectors are trained."""
    monkeypatch.setattr(running, "_SMALL_BYTES", -1 if request.param else 2**26)


@pytest.fixture
def _at_ctrl_c():
    """As at a terminal: a process that a shell starts in the background does not hear of it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


pytestmark = pytest.mark.usefixtures("_large", "_standard")


def check(result, step, stopped):
    assert (result.step, result.stopped) == (step, stopped)
    assert float(result.ps.a) == 10.0 - step
    assert int(result.st.count) == step
    np.testing.assert_array_equal(result.losses, 10.0 - np.arange(step))


def test_an_exception_of_the_callback_carries_the_result():
    def callback(step, *_):
        if step == 4:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full") as info:
        train(callback=callback)
    check(info.value.result, 4, "error")
    assert info.value.__notes__ == ["train_loop: `error.result` of this exception has what 4 steps reached"]


def test_an_exception_of_the_data_carries_the_result_with_the_chunk_in_flight():
    def batches():
        yield from np.zeros(5)
        raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged") as info:
        train(data=batches())
    check(info.value.result, 4, "error")


def test_data_that_end_early_carry_the_result_of_all_their_batches():
    with pytest.raises(ValueError, match="found none for step 5") as info:
        train(data=iter(np.zeros(5)))
    check(info.value.result, 5, "error")


def test_an_exception_of_the_validation_carries_the_result():
    def broken(ps, st, batch):
        raise OSError("no")

    with pytest.raises(OSError, match="no") as info:
        train(validate=(broken, None, 3))
    check(info.value.result, 3, "error")


def test_an_exception_at_run_time_in_the_loss(request):
    def fails(x):
        if x < 7:
            raise OSError("solver")
        return np.asarray(x)

    def loss(ps, st, batch):
        value = jax.pure_callback(fails, jax.ShapeDtypeStruct((), ps.dtype), jax.lax.stop_gradient(ps.a))
        return ps.a + 0 * value, {"count": st.count + 1}

    with pytest.raises(Exception, match="solver") as info:
        train(loss)
    if "beside" in request.node.name:  # the steps up to the chunk
        check(info.value.result, 4, "error")
    else:
        assert not hasattr(info.value, "result")
        assert "the parameters were lost, since a large vector is trained in place" in info.value.__notes__[0]


def stiff(a):
    """Solve an equation whose rate is ten times larger with each step of training."""
    layer = fl.NeuralODE(
        fl.WrappedFunction(lambda y: jnp.array([0.0, -1.0]) * y[0] * y), t1=1.0, max_steps=64
    )
    rate = 10.0 ** (10.0 - jax.lax.stop_gradient(a))
    ps, st = fl.setup(jax.random.key(0), layer, float)
    return layer(jnp.stack([rate, jnp.ones_like(rate)]), ps, st)[0].sum()


def check_plain(error, place):
    lines = str(error).splitlines()
    assert type(error) is RuntimeError
    assert lines[0].startswith("NeuralODE: The maximum number of solver steps was reached")
    assert lines[1].startswith("Here max_steps=64: raise it")
    assert lines[2:] == [f"train_loop: this was raised in {place}"]
    assert lines[1] in str(error.__cause__)


@pytest.mark.long
def test_a_solve_that_fails_is_told_plainly(request):
    def loss(ps, st, batch):
        return ps.a + 0 * stiff(ps.a), {"count": st.count + 1}

    with pytest.raises(RuntimeError) as info:
        train(loss)
    check_plain(info.value, "one of the steps 2 to 3")
    if "beside" in request.node.name:
        check(info.value.result, 2, "error")
    else:
        assert "the parameters were lost" in info.value.__notes__[0]


@pytest.mark.long
def test_a_solve_that_fails_in_the_validation_is_told_plainly():
    with pytest.raises(RuntimeError) as info:
        train(validate=(lambda ps, st, batch: (stiff(ps.a), st), None, 3))
    check_plain(info.value, "the validation after 3 steps")
    check(info.value.result, 3, "error")


def test_an_interrupt_returns_the_result_so_far():
    def callback(step, *_):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after step 4 of 6; this is the result so far") as seen:
        result = train(callback=callback)
    check(result, 4, "interrupt")
    assert seen[0].filename == __file__


def test_an_interrupt_in_the_data_ends_after_the_chunk_in_flight():
    def batches():
        yield from np.zeros(3)
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after step 2"):
        result = train(data=batches())
    check(result, 2, "interrupt")


@pytest.mark.usefixtures("_at_ctrl_c")
def test_ctrl_c_while_a_chunk_runs():
    def loss(ps, st, batch):
        def kill(x):
            if x == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return np.asarray(x)

        value = jax.pure_callback(kill, jax.ShapeDtypeStruct((), ps.dtype), jax.lax.stop_gradient(ps.a))
        return ps.a + 0 * value, {"count": st.count + 1}

    with pytest.warns(UserWarning, match="interrupted after step 4"):
        result = train(loss)
    check(result, 4, "interrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone():
    found = []
    thread = threading.Thread(target=lambda: found.append(train()))
    thread.start()
    thread.join()
    check(found[0], 6, "steps")


@pytest.mark.parametrize(
    ("answer", "stops"),
    [
        (True, True),
        (np.True_, True),
        (np.array(True), True),
        (jnp.array(True), True),
        (False, False),
        (np.False_, False),
        (jnp.array(False), False),
        (None, False),
        (1, False),
        (jnp.array(1.0), False),
        ("yes", False),
    ],
)
def test_answers_of_a_callback(answer, stops):
    check(train(callback=lambda *_: answer), 2 if stops else 6, "callback" if stops else "steps")


# NaN


def test_parameters_that_are_not_finite_are_found_in_the_step_that_made_them():
    # The loss is finite where its derivative is not: that of the root at 0.
    def loss(ps, st, batch):
        return jnp.sqrt(jnp.abs(ps.a)) + ps.a, {"count": st.count + 1}

    ps, st = fl.ComponentVector.of({"a": 0.0}, dtype=float), fl.Record(count=0)
    with pytest.raises(
        fl.NonFiniteLossError, match=r"finite parameters, found NaN or infinity after step 0, .* finite: 0"
    ) as info:
        fl.train_loop(loss, ps, st, optax.sgd(1.0), steps=1, progress=False)
    assert_same(info.value.ps, ps)
    assert info.value.losses.tolist() == [0.0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("last", [False, True])
def test_no_callback_gets_nan(chunk, last):
    # The rate of step 3 is infinite.
    optimizer, seen = optax.sgd(lambda step: jnp.where(step == 3, jnp.inf, 1.0)), []
    with pytest.raises(fl.NonFiniteLossError, match="after step 3, whose loss is finite: 7") as info:
        fl.train_loop(
            *(falling, *start(), optimizer),
            steps=4 if last else 9,
            chunk=chunk,
            progress=False,
            callback=lambda step, value, ps, st: seen.append(float(ps.a)),
        )
    assert np.isfinite(seen).all()
    error = info.value
    assert (error.step, float(error.ps.a), int(error.st.count)) == (3, 7.0, 3)
    assert error.losses.tolist() == [10.0, 9.0, 8.0, 7.0]
    assert error.result.step == 3


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_a_loss_that_is_not_finite(chunk):
    def loss(ps, st, batch):
        return jnp.where(ps.a < 7, jnp.nan, ps.a), {"count": st.count + 1}

    optimizer = optax.sgd(lambda count: 1.0)
    with pytest.raises(fl.NonFiniteLossError, match="expected a finite loss, found nan in step 4") as info:
        fl.train_loop(loss, *start(), optimizer, steps=10, chunk=chunk, progress=False)
    error = info.value
    assert (error.step, float(error.ps.a), int(error.st.count)) == (4, 7.0, 3)
    # The optimiser's state is that after the step.
    assert [int(x) for x in jax.tree.leaves(error.opt_state)] == [5]
    assert error.losses.tolist() == [10.0, 9.0, 8.0, 7.0]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.step, float(again.ps.a)) == (str(error), 4, 7.0)


def test_steps_are_counted_from_the_start():
    def loss(ps, st, batch):
        return jnp.where(ps.a < 7, jnp.nan, ps.a), {"count": st.count + 1}

    with pytest.raises(fl.NonFiniteLossError, match="in step 104") as info:
        train(loss, start=100)
    assert (info.value.step, info.value.result.step) == (104, 103)
    with pytest.raises(ValueError, match="found none for step 103"):
        train(data=iter(np.zeros(3)), start=100)


def test_what_was_given_stays():
    ps, st = start()
    opt = optax.adam(0.1)
    opt_state = opt.init(ps)
    fl.train_loop(falling, ps, st, opt, steps=4, chunk=2, opt_state=opt_state, progress=False)
    assert float(ps.a) == 10.0
    assert [float(x.sum()) for x in jax.tree.leaves(opt_state)] == [0.0, 0.0, 0.0]


def test_what_a_callback_got_stays():
    seen = []
    train(callback=lambda step, value, ps, st: seen.append((ps, st)))
    assert [float(ps.a) for ps, _ in seen] == [8.0, 6.0, 4.0]
    assert [int(st.count) for _, st in seen] == [2, 4, 6]


def test_an_optimizer_that_keeps_the_parameters_it_is_given():
    ps, st = start()
    optimizer = optax.contrib.schedule_free_sgd(1.0)
    result = fl.train_loop(falling, ps, st, optimizer, steps=3, chunk=1, progress=False)
    assert float(result.ps.a) < 10.0
    assert float(ps.a) == 10.0


def test_the_text_is_one_line():
    result = train(steps=600)
    assert repr(result) == "TrainResult(step=600, last loss -589, 1 parameter, stopped='steps')"
