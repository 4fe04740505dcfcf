"""Named runs with stored records: a run with a record is not repeated."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

Record = dict[str, Any]


class Run(NamedTuple):
    """One run of a part.

    Attributes:
        name: unique within all parts.
        seconds: what it takes on two cores, about.
        compute: returns numbers, for the page.
    """

    name: str
    seconds: float
    compute: Callable[[], Record]


def load(path: pathlib.Path) -> dict[str, Record]:
    """Reads the records that there are."""
    return json.loads(path.read_text()) if path.exists() else {}


def run_all(runs: Iterable[Run], path: pathlib.Path) -> dict[str, Record]:
    """Runs what has no record yet, and writes the file after each; a bar shows the time left.

    A run whose data are missing is left out, with a line that says what to do.
    """
    records = load(path)
    missing = [run for run in runs if run.name not in records]
    total = sum(run.seconds for run in missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "{desc}{percentage:3.0f} %|{bar}| {elapsed}{postfix}"
    with tqdm(total=total, bar_format=layout, desc="nothing to do") as bar:
        for run in missing:
            bar.set_description(run.name)
            bar.set_postfix_str(f"about {total / 60:.0f} min in all")
            began = time.perf_counter()
            try:
                record = run.compute()
            except SystemExit as missing_data:
                bar.write(f"left out: {run.name}: {missing_data}")
                bar.update(run.seconds)
                continue
            took = time.perf_counter() - began
            records[run.name] = record | {
                "seconds": round(took, 1),
                "jax": jax.__version__,
                "device": jax.devices()[0].device_kind,
            }
            # A file that is half written would lose what took hours.
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
            draft.replace(path)
            bar.update(run.seconds)
    return records
