"""Runs the benchmarks and writes the page of results.

    python -m benchmarks                                     # everything not yet measured
    python -m benchmarks --only side_by_side -- --models vae --batches 128 512
    python -m benchmarks --out docs/benchmarks               # what the stored results lack
    python -m benchmarks --only page --out docs/benchmarks

Measurements are JSON files in one folder per device under `--out`. The page and its figures are
next to them. Existing measurements are kept, so the same command continues after an interruption,
and a new folder starts from nothing. Options after `--` go to the named benchmark.
"""

import argparse
import pathlib
import subprocess
import sys

import jax

from benchmarks import page
from benchmarks.peers.environments import ROOT, environment

PARTS = {
    "quick": "what the defaults cost",
    "side_by_side": "every system on every model",
    "ablation": "vmap and jit, one by one",
    "layers": "one layer of each kind",
    "growth": "parameters, length and batch",
    "devices": "a step spread over virtual devices",
    "largest_batch": "what fits in 12 GiB",
    "epoch": "epochs of the VAE",
    "samplers": "drawing a batch",
    "randomness": "generators",
    "accounting": "epsilon and calibration",
    "training": "the loop and checkpoints",
    "scale": "steps of language models",
}


def main() -> None:
    """Runs each part in its own process, one after the other."""
    if "--" in sys.argv:
        place = sys.argv.index("--")
        own, passed = sys.argv[1:place], sys.argv[place + 1 :]
    else:
        own, passed = sys.argv[1:], []
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="; ".join(f"{name}: {what}" for name, what in PARTS.items()),
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "page"], metavar="PART",
                        help=", ".join([*PARTS, "page"]))  # fmt: skip
    parser.add_argument("--devices", type=int, default=1, help="virtual ones of the CPU, if many")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "benchmarks",
                        help="a folder for readings and the page [out/benchmarks]")  # fmt: skip
    options = parser.parse_args(own)
    chosen = options.only or list(PARTS)
    if passed and len(chosen) != 1:
        parser.error("options after -- are for one part; name it by --only.")
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    folder = options.out / (kind if options.devices == 1 else f"{kind}-{options.devices}-devices")
    failed = []
    for part in chosen:
        if part == "page":
            continue
        print(f"== {part}: {PARTS[part]}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{part}", *passed]
        if part == "side_by_side":
            command += ["--devices", str(options.devices)]
        command += ["--out", str((folder / f"{part}.json").resolve())]
        ran = subprocess.run(command, cwd=ROOT, env=environment(options.devices))
        if ran.returncode:
            failed.append(part)
    print(f"wrote {page.write(options.out)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what they measured is kept")


if __name__ == "__main__":
    main()
