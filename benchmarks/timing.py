"""Interleaved timing: each round runs every program, one after the other."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

# Shorter programs are run several times per reading.
READING_SECONDS = 0.02
# Shorter ones run once more before it: what ran last has taken the caches and the memory.
WARMED_SECONDS = 1.0
Name = TypeVar("Name", bound=Hashable)
Program = tuple[Callable[..., Any], tuple[Any, ...]]


def compiled(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Program, dict[str, Any]]:
    """Returns what `interleaved` takes, the seconds of tracing and compiling it, and its MiB."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    found = program.memory_analysis()
    mib = None if found is None else found.temp_size_in_bytes / 2**20
    return (program, arguments), {"start_seconds": seconds, "mib": mib}


def read(function: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """Returns the seconds of one run, averaged over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def interleaved(programs: Mapping[Name, Program], rounds: int) -> dict[Name, list[float]]:
    """Returns the seconds of a run of each program, a reading per round, after a warm-up."""
    once = {}
    for name, (function, arguments) in programs.items():
        jax.block_until_ready(function(*arguments))
        once[name] = read(function, arguments, 1)
    readings: dict[Name, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (function, arguments) in programs.items():
            if once[name] < WARMED_SECONDS:
                jax.block_until_ready(function(*arguments))
            repeats = max(1, int(READING_SECONDS / once[name]))
            readings[name].append(read(function, arguments, repeats))
    return readings
