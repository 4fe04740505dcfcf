"""Times a private step of the VAE on several devices.

    python -m benchmarks.devices --out results.json

On a machine without accelerators the devices are virtual and share its cores. The result then shows
what the distribution costs. Each number of devices runs in its own process.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys

from benchmarks import results
from benchmarks.peers.environments import ROOT, environment

COUNTS = (1, 2, 4, 8)
BATCH = 256


def read(rounds: int) -> list[float]:
    """Seconds of a step on all devices of this process."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from benchmarks.models import workload
    from benchmarks.peers.jax_steps import step_of
    from benchmarks.timing import compiled, interleaved

    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, spread = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data"))
    )
    work = workload("vae", BATCH)
    step, state = step_of("dpoptax", work, BATCH)
    whole = jax.device_put((work.params, state), everywhere)
    program, _ = compiled(step, (*whole, jax.device_put(work.examples, spread)))
    return interleaved({"step": program}, rounds)["step"]


def cells_of(count: int, rounds: int) -> results.Cells:
    """Asks a process that has this number of devices."""
    command = [sys.executable, "-m", "benchmarks.devices", "--rounds", str(rounds), "--here"]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment(count), capture_output=True, text=True, check=False
    )
    if ran.returncode:
        return {"step": {"error": ran.stderr.strip().splitlines()[-1][:200], "seconds": []}}
    return {"step": {"seconds": json.loads(ran.stdout)}}


def main() -> None:
    """Measures, prints a table, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--here", action="store_true", help="on the devices of this process alone")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(read(options.rounds)))
        return
    results.study(
        {
            f"devices: {count}": functools.partial(cells_of, count, options.rounds)
            for count in COUNTS
        },
        options.out,
    )


if __name__ == "__main__":
    main()
