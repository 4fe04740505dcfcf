"""Finished runs: one file for each recipe, with one line of JSON for each run."""

import hashlib
import json
import math
import pathlib
from typing import Any

Record = dict[str, Any]


def path_of(folder: pathlib.Path, recipe: str) -> pathlib.Path:
    """Returns the file of a recipe."""
    return folder / f"{recipe}.jsonl"


def load(folder: pathlib.Path, recipe: str) -> list[Record]:
    """Reads the finished runs of a recipe; the last line counts where a run was repeated."""
    path = path_of(folder, recipe)
    found: dict[tuple[str, int], Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was stopped while it wrote this line
        found[record["run"], record["seed"]] = record
    return list(found.values())


def append(folder: pathlib.Path, recipe: str, record: Record) -> None:
    """Adds a finished run to the file of its recipe."""
    path = path_of(folder, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    # A line that is half written must not swallow the next one.
    broken = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * broken + json.dumps(record, sort_keys=True) + "\n")


def run_name(epsilon: float) -> str:
    """Returns how a run at this epsilon is called in records and on the command line."""
    return f"{epsilon:g}" if math.isfinite(epsilon) else "inf"


def digest(source: str) -> str:
    """Returns a short digest of a recipe's source, to tell that it changed since a run."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]
