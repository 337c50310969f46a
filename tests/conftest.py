"""Tests run in float64, with no promotion that was not asked for."""

import gc
import itertools
import os

import jax
import pytest


# Before the first use of a device. Arrays are on the first one, unless a test places them.
flags = ["--xla_force_host_platform_device_count=8"]
# Most of the tests' time goes into machine code for small programs, on which LLVM's expensive passes are
# wasted. XLA's own, and so the programs whose operations and memory tests count, are as users have them.
flags += ["--xla_llvm_disable_expensive_passes=true"]
# XLA of these releases compiles small programs in two thirds of the time without its new emitters of fused
# loops. Later ones, which the tests also run with, have only those.
if jax.__version_info__ < (0, 11):
    flags += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """What is imported by now stays: the collector of garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def key():
    return jax.random.key(0)


_compilations = []


def _note_compilation(event, duration_secs, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


@pytest.fixture
def compilations():
    """A list with an entry for each program that was compiled, eager operations among them."""
    return _compilations


_modules = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def _programs_are_not_kept_to_the_end():
    """In a process that holds thousands of compiled programs each further one takes twice as long."""
    yield
    if next(_modules) % 10 == 0:
        jax.clear_caches()
        gc.collect()
