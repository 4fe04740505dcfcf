"""Times a training step of every system on every model, in one run.

    python -m benchmarks.side_by_side --models vae mnist --batches 128 --out results.json

Each system runs in its own process and environment, which is made on first use. In each round, each
system makes some steps while the others wait. Results are medians over rounds, and the ratio to the
step without privacy of the same framework. If a system cannot be installed or cannot run a model,
its error is stored. Results are stored after each model, so the same command continues.
"""

import argparse
import json
import pathlib
import select
import subprocess
import sys
from typing import Any

from benchmarks import results
from benchmarks.models import PARAMETER_COUNTS
from benchmarks.peers.environments import PEERS, ROOT, environment, python_of

# A peer that takes longer for one answer is given up on this model.
LONGEST_SECONDS = 300
# A peer is read no further once its steps of this model have taken so long.
ENOUGH_SECONDS = 20


class Worker:
    """One peer's process."""

    def __init__(self, peer: str, devices: int) -> None:
        self._peer, self._devices = peer, devices
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer, or one with an "error"."""
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    [python_of(self._peer), "-m", "benchmarks.peers.worker", self._peer],
                    cwd=ROOT, env=environment(self._devices), text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_SECONDS)
            line = self._process.stdout.readline() if ready else None
        except (RuntimeError, OSError) as error:
            return {"error": " ".join(str(error).split())}
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        if line is None:
            return {"error": f"no answer in {LONGEST_SECONDS} s"}
        return {"error": "its process ended, perhaps for want of memory"}

    def close(self) -> None:
        """Ends the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes its pipes too
            self._process = None


def measure(
    workers: dict[str, Worker], model: str, batch: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns, for each system, the seconds per step in each round, and facts from preparing it."""
    cells = {}
    for peer, worker in workers.items():
        cells[peer] = worker.ask(do="prepare", model=model, batch=batch)
        cells[peer]["seconds"] = []
    for _ in range(rounds):
        for peer, worker in workers.items():
            cell = cells[peer]
            if "error" in cell or sum(cell["seconds"]) > ENOUGH_SECONDS:
                continue
            answer = worker.ask(do="read")
            if "error" in answer:
                cell["error"] = answer["error"]
            else:
                cell["seconds"].append(answer["seconds"])
    return cells


def main() -> None:
    """Measures what is not measured yet, prints a line for each, and writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = list(PARAMETER_COUNTS)
    parser.add_argument("--models", nargs="+", choices=models, metavar="MODEL", default=models,
                        help=", ".join(models))  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 128, 512, 1024])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER",
                        help=", ".join(PEERS))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--devices", type=int, default=1, help="virtual ones of the CPU, if many")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file; what it holds is kept")
    options = parser.parse_args()
    stored = results.load(options.out) if options.out else results.empty()
    workers = {peer: Worker(peer, options.devices) for peer in options.peers}
    try:
        for peer, worker in workers.items():
            versions = worker.ask(do="versions")
            stored["versions"][peer] = versions
            if "error" in versions:
                print(f"{PEERS[peer].title}: {versions['error']}", file=sys.stderr)
        for batch in options.batches:
            for model in options.models:
                name = f"{model}, {batch}"
                if workers.keys() <= stored["cells"].get(name, {}).keys():
                    continue
                # All of them again: only what was read together may be compared.
                results.keep(stored, name, measure(workers, model, batch, options.rounds))
                results.show(name, stored["cells"][name])
                if options.out:
                    results.save(options.out, stored)
    finally:
        for worker in workers.values():
            worker.close()


if __name__ == "__main__":
    main()
