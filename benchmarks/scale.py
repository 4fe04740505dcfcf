"""Compares private and plain steps of language models: memory, arithmetic, communication and time.

    python -m benchmarks.scale --out results.json

The decoder is that of `benchmarks.decoder`. Rows with "compiled" in their name run nothing: XLA
reports the memory, and arithmetic and communication are counted in its program for this device.
The TPU rows need `libtpu` from PyPI, but no TPU, and take minutes. Without it they say so. The row
"decoder, run" has the sizes of "decoder, compiled", and takes minutes on a CPU.
"""

import argparse
import functools
import importlib.util
import os
import pathlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from benchmarks.decoder import Sizes, param_specs, sharded, step_of, token_specs
from benchmarks.models import workload
from benchmarks.peers.jax_steps import step_of as step_of_peer
from benchmarks.program_costs import costs
from benchmarks.timing import compiled, interleaved

DEEP = Sizes(width=512, layers=8, heads=8, vocabulary=8192, tokens=256, batch=32)
SHALLOW = DEEP._replace(layers=2, batch=8)
# 1.1e9 parameters.
LARGE = Sizes(width=2048, layers=16, heads=16, vocabulary=32768, tokens=1024, batch=16)
POD = "v5e:4x4"
LORA_BATCH = 128
# Private / plain, as this project aims for.
GOALS = {
    "decoder, compiled": {"mib": 1.25, "flop": 1.8},
    "decoder, factored, compiled": {"flop": 1.4},
    "decoder of 2 layers, run": {"seconds": 1.6},
    f"decoder of 1.1e9 parameters, compiled for TPU {POD}": {
        **{"mib": 1.25, "flop": 1.8},
        "all-gather": 2.0,
    },
    "adapters (LoRA), run": {"seconds": 1.05, "mib": 1.05},
    "decoder, run": {"seconds": 1.6},
}
UNITS = {"mib": "MiB of temporaries", "flop": "FLOP", "all-gather": "all-gathers",
         "seconds": "seconds"}  # fmt: skip


def here(sizes: Sizes, form: str) -> results.Cells:
    """Compiles a plain and a private step for this device."""
    arguments = param_specs(sizes), token_specs(sizes), jax.random.key(0)
    return {
        name: _compile(step_of(kind, sizes), arguments)
        for name, kind in (("plain", "plain"), ("private", form))
    }


def on_pod(sizes: Sizes) -> results.Cells:
    """Compiles both steps for a TPU pod; parameters and batch are sharded over one axis (FSDP)."""
    if importlib.util.find_spec("libtpu") is None:
        return {"private": {"error": "needs libtpu: pip install libtpu"}}
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no pod is asked for
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(POD, platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    params, tokens = sharded(mesh, param_specs(sizes), token_specs(sizes))
    nowhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=nowhere)
    options = {"donate_argnums": 0, "out_shardings": {n: p.sharding for n, p in params.items()}}
    # The library asks JAX which devices it compiles for.
    with (
        mock.patch.object(jax, "default_backend", return_value="tpu"),
        mock.patch.object(jax, "device_count", return_value=len(devices)),
    ):
        return {
            name: _compile(step_of(kind, sizes), (params, tokens, key), **options)
            for name, kind in (("plain", "plain"), ("private", "auto"))
        }


def _compile(step: Any, arguments: tuple[Any, ...], **options: Any) -> dict[str, Any]:
    program = jax.jit(step, **options).lower(*arguments).compile()
    memory = program.memory_analysis()
    return {"mib": memory.temp_size_in_bytes / 2**20, **costs(program.as_text())}


def timed(sizes: Sizes, rounds: int) -> results.Cells:
    """Runs both steps in turn."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        name: jnp.ones(spec.shape) if name.endswith("scale") else 0.02 * _normal(keys[0], spec)
        for name, spec in param_specs(sizes).items()
    }
    spec = token_specs(sizes)
    tokens = jax.random.randint(keys[1], spec.shape, 0, sizes.vocabulary)
    arguments = params, tokens, keys[0]
    programs, cells = {}, {}
    for name, kind in (("plain", "plain"), ("private", "auto")):
        programs[name], cells[name] = compiled(step_of(kind, sizes), arguments)
    return _read(programs, cells, rounds)


def adapters(rounds: int) -> results.Cells:
    """Runs a plain and a private step of a frozen transformer with low-rank adapters, in turn."""
    work = workload("lora", LORA_BATCH)
    programs, cells = {}, {}
    for name, peer in (("plain", "jax"), ("private", "dpoptax")):
        step, state = step_of_peer(peer, work, LORA_BATCH)
        programs[name], cells[name] = compiled(step, (work.params, state, work.examples))
    return _read(programs, cells, rounds)


def _normal(key: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.normal(key, spec.shape)


def _read(programs: Any, cells: results.Cells, rounds: int) -> results.Cells:
    for name, seconds in interleaved(programs, rounds).items():
        cells[name]["seconds"] = seconds
    return cells


def table(cells: dict[str, results.Cells]) -> list[list[str]]:
    """Returns a line for each row and goal: the two steps, their ratio, and the goal."""
    lines = []
    for row, goals in GOALS.items():
        found = cells.get(row, {})
        for field, goal in goals.items():
            title = [row, UNITS[field]]
            if "plain" not in found:
                error = found.get("private", {}).get("error", "not measured")
                lines.append([*title, error, "", "", f"{goal}"])
                continue
            if field == "seconds":
                plain, private = (results.median(found[name]) for name in ("plain", "private"))
                over = results.ratio(found, "private", "plain")
            else:
                plain, private = (found[name].get(field, 0.0) for name in ("plain", "private"))
                over = private / plain if plain else None
            numbers = [f"{number:.4g}" for number in (plain or 0.0, private or 0.0)]
            lines.append([*title, *numbers, "" if over is None else f"{over:.2f}", f"{goal}"])
    return lines


def main() -> None:
    """Measures what is not measured yet, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows with one of these words")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    measurements = dict(
        zip(
            GOALS,
            (
                functools.partial(here, DEEP, "auto"),
                functools.partial(here, DEEP, "factored"),
                functools.partial(timed, SHALLOW, options.rounds),
                functools.partial(on_pod, LARGE),
                functools.partial(adapters, options.rounds),
                functools.partial(timed, DEEP, options.rounds),
            ),
            strict=True,
        )
    )
    words = options.only or [""]
    record = results.load(options.out) if options.out else results.empty()
    record["versions"]["dpoptax"] = {"jax": jax.__version__}
    for row, measure in measurements.items():
        if row not in record["cells"] and any(word in row for word in words):
            results.keep(record, row, measure())
            if options.out:
                results.save(options.out, record)
    for line in table(record["cells"]):
        print(" | ".join(line))


if __name__ == "__main__":
    main()
