"""Prints what became slower between two results by more than their noise.

    python -m benchmarks.compare docs/benchmarks/cpu new

Each argument is a JSON file, or a folder of them. Machines differ, and so does one machine from day
to day. So this compares the ratio of a private step to the plain step of the same rounds. The noise
of a ratio comes from the spreads of its two parts, in both results.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Iterator

from benchmarks import results

# So many spreads, and at least this share, make a difference.
SPREADS, LEAST = 3.0, 0.1


def slower(before: results.Cells, after: results.Cells) -> Iterator[tuple[str, float, float]]:
    """Gives what got slower: its name, and the ratio to its base then and now."""
    for name in before.keys() & after.keys():
        base = results.base_of(name)
        then, now = (results.ratio(cells, name, base) for cells in (before, after))
        if name == base or then is None or now is None:
            continue
        spreads = [results.spread(cells[one]) for cells in (before, after) for one in (name, base)]
        noise = max(LEAST, SPREADS * math.hypot(*spreads))
        if now > then * (1 + noise):
            yield name, then, now


def files(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The results of a folder by name, or the one that is a file."""
    return {each.name: each for each in path.glob("*.json")} if path.is_dir() else {"": path}


def main() -> None:
    """Prints a line for each that got slower, and exits with 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    options = parser.parse_args()
    before, after = files(options.before), files(options.after)
    found, compared = 0, 0
    for name in sorted(before.keys() & after.keys()):
        old, new = results.load(before[name]), results.load(after[name])
        for title in old["cells"].keys() & new["cells"].keys():
            compared += 1
            for cell, then, now in sorted(slower(old["cells"][title], new["cells"][title])):
                found += 1
                print(f"{name or options.before.name}: {title}: {cell}: {then:.2f}x -> {now:.2f}x")
    print(f"{found} slower, of {compared} rows in both", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
