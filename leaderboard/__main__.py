"""Trains the recipes of the leaderboard, and writes the page of results.

    python -m leaderboard --list                             # all runs, and which are done
    python -m leaderboard --only digits_linear --seeds 1     # recipes or tasks, one seed
    python -m leaderboard --only mnist --epsilon 2.93 --mnist FOLDER
    python -m leaderboard --only mnist --validate            # to choose settings; no page
    python -m leaderboard --out docs                         # what the stored results lack
    python -m leaderboard --only page --out docs             # the page again, without a run

Each finished run is a line in a file of the folder `leaderboard` in `--out`, and is not repeated.
So you can stop at any time and continue later. Recipes without data are left out.
"""

import argparse
import os
import pathlib

from leaderboard import page, registry, run
from leaderboard.recipe import StoppedEarlyError

ROOT = pathlib.Path(__file__).parents[1]


def main() -> None:
    """Parses the command line, runs, and writes the page."""
    recipes = registry.all_recipes()
    names = sorted({*recipes, *(recipe.task for recipe in recipes.values())})
    parser = argparse.ArgumentParser(
        prog="leaderboard", description=__doc__.splitlines()[0], epilog=f"Names: {', '.join(names)}"
    )
    parser.add_argument("--only", nargs="+", choices=[*names, "page"], metavar="NAME",
                        help="recipes or tasks; page: no run at all")  # fmt: skip
    parser.add_argument("--epsilon", nargs="+", type=float, help="of these only; inf: not private")
    parser.add_argument("--seeds", type=int, default=3, help="how many of each run [3]")
    parser.add_argument("--mnist", type=pathlib.Path, metavar="FOLDER",
                        help="of TensorFlow Datasets, with MNIST [TFDS_DATA_DIR]")  # fmt: skip
    parser.add_argument("--adult", type=pathlib.Path, metavar="FOLDER",
                        help="with adult.data and adult.test [DPOPTAX_ADULT_DIR]")  # fmt: skip
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out",
                        help="a folder for records and the page [out]")  # fmt: skip
    parser.add_argument("--validate", action="store_true",
                        help="score on held-out training examples, in OUT/validation")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="repeat runs that are done")
    parser.add_argument("--list", action="store_true", help="print the runs and stop")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    for variable, folder in (
        ("TFDS_DATA_DIR", options.mnist),
        ("DPOPTAX_ADULT_DIR", options.adult),
    ):
        if folder is not None:
            os.environ[variable] = str(folder.resolve())
    chosen = [
        recipe
        for recipe in recipes.values()
        if options.only is None or {recipe.name, recipe.task} & set(options.only)
    ]
    epsilons = None if options.epsilon is None else tuple(options.epsilon)
    runs = list(run.planned(chosen, epsilons, options.seeds))
    if not runs and options.only != ["page"]:
        known = sorted({each.epsilon for each in run.planned(chosen, None, 1)})
        parser.error(
            f"these recipes have runs at --epsilon {' '.join(f'{each:g}' for each in known)}; got "
            f"{' '.join(f'{each:g}' for each in epsilons or ())}"
        )
    records = options.out / ("validation" if options.validate else "leaderboard")
    if options.list:
        for each in runs:
            record = run.record_of(each, records)
            state = "" if record is None else "done"
            if record is not None and record["digest"] != registry.digest(each.recipe.name):
                state = "done, recipe changed since"
            print(f"{each.recipe.seconds:6.0f} s  {each}  {state}")
        return
    try:
        run.run_all(runs, records, validate=options.validate, again=options.again)
    except StoppedEarlyError as stopped:
        raise SystemExit(f"error: {stopped}") from None
    if not options.validate:
        print(f"the page is {page.write(options.out)}")


if __name__ == "__main__":
    main()
