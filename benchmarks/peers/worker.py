"""Worker process of one system: answers requests from standard input, one line of JSON each.

    {"do": "prepare", "model": "vae", "batch": 128}  ->  {"start_seconds": 1.2, "mib": 3.0, ...}
    {"do": "read"}                                   ->  {"seconds": 0.0031}

Each request and each answer is one line of JSON. If a request fails, the answer is {"error":
"..."}.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.peers.step import Step

# Shorter steps are made several times per reading.
READING_SECONDS = 0.05


def maker(peer: str) -> tuple[Callable[[str, int], Step], dict[str, str]]:
    """Returns what makes a step of a model, and the versions that it runs on."""
    if peer == "torch" or peer.startswith("opacus"):
        from benchmarks.peers import torch_steps

        return torch_steps.maker(peer), torch_steps.versions()
    from benchmarks.peers import jax_steps

    return jax_steps.maker(peer), jax_steps.versions(peer)


def timed(run: Callable[[int], None], repeats: int) -> float:
    """Returns the seconds of a step."""
    began = time.perf_counter()
    run(repeats)
    return (time.perf_counter() - began) / repeats


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    make: Any = None
    step: Any = None
    repeats = 1
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if make is None:
                make, versions = maker(sys.argv[1])
            if request["do"] == "versions":
                answer = {"python": platform.python_version(), **versions}
            elif request["do"] == "prepare":
                step = None  # frees the last one
                step = make(request["model"], request["batch"])
                seconds = timed(step.run, 1)
                if seconds < READING_SECONDS:  # then the overhead of the first run matters
                    seconds = timed(step.run, 1)
                repeats = max(1, int(READING_SECONDS / seconds))
                answer = {key: value for key, value in step._asdict().items() if key != "run"}
            else:
                answer = {"seconds": timed(step.run, repeats)}
        except Exception as error:  # a peer may fail in any way, and is a line in the table
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
