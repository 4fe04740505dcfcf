"""Repeats published experiments, and writes a page that compares the results.

    python -m reproduce                            # everything; takes hours on two cores
    python -m reproduce --only vae --seeds 1       # one part, one seed
    python -m reproduce --match "vae: private"     # runs with this text in their name
    python -m reproduce --out docs                 # missing records only, and the page

A run with a record in the folder `--out` is not repeated, so you can stop at any time and continue
later. MNIST and Fashion-MNIST come from TensorFlow Datasets, from the folder in TFDS_DATA_DIR.
Adult comes from the folder in DPOPTAX_ADULT_DIR. Runs without data are left out.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
# The examples' data sets are read by the examples' own module.
sys.path.append(str(ROOT / "examples"))

import jax  # noqa: E402

from reproduce import adult, batches, hierarchical, mixture, page, runs, vae  # noqa: E402

PARTS = {
    "vae": vae,
    "hierarchical": hierarchical,
    "mixture": mixture,
    "adult": adult,
    "batches": batches,
}


def main() -> None:
    """Parses the command line, runs, and writes the page."""
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seeds", type=int, default=3, help="how many of each run [3]")
    parser.add_argument("--match", default="", metavar="TEXT", help="runs with this in their names")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out",
                        help="a folder for records and the page [out]")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    seeds = tuple(range(options.seeds))
    chosen = [
        run for name in options.only for run in PARTS[name].runs(seeds) if options.match in run.name
    ]
    place = options.out / "reproduction.json"
    known = runs.load(place)
    if options.list:
        for run in chosen:
            print(f"{run.seconds:6.0f} s  {'done' if run.name in known else '    '}  {run.name}")
        return
    # NumPyro and Optax mix integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        records = runs.run_all(chosen, place)
    written = place.with_suffix(".md")
    page.write(records, written)
    print(f"the page is {written}")


if __name__ == "__main__":
    main()
