"""Stored measurements, as JSON: place, time, versions, and each reading."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Callable
from typing import Any, TypeAlias

from benchmarks.peers.environments import PEERS, PLAIN, ROOT

FORMAT = "dpoptax benchmark 1"
# By name: "seconds", a list of readings, "start_seconds" and "mib"; or "batch"; or "error".
Cells: TypeAlias = dict[str, dict[str, Any]]

# In studies where there is no "plain" one.
BASES = {
    "private": "not private",
    "defaults": "not private",
    "private, fixed size": "not private",
    "same batches": "not private",
    "fit": "bare step in a loop",
    "chacha8": "threefry",
    "chacha12": "threefry",
    "chacha20": "threefry",
}


def empty() -> dict[str, Any]:
    """Returns a record of this machine without readings."""
    return {
        "format": FORMAT,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {},
        "read": {},
        "cells": {},
    }


def load(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a file holds, or an empty record if there is none.

    Raises:
        ValueError: a file of another kind.
    """
    if not path.exists():
        return empty()
    record: dict[str, Any] = json.loads(path.read_text())
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} holds {record.get('format')!r}, not {FORMAT!r}; move it away.")
    return record


def save(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes the record to a new file, then replaces the old file with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    new.replace(path)


def keep(record: dict[str, Any], name: str, cells: Cells) -> None:
    """Puts what was read into a record, with the date and the state of the code."""
    asked = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    record["cells"][name] = cells
    record.setdefault("read", {})[name] = {
        "date": datetime.date.today().isoformat(),
        "code": found or "unknown",
    }


def median(cell: dict[str, Any] | None) -> float | None:
    """Returns the median of a cell's readings in seconds, or None if it has none."""
    if not cell or "error" in cell or not cell.get("seconds"):
        return None
    return statistics.median(cell["seconds"])


def spread(cell: dict[str, Any]) -> float:
    """Returns half the distance between the quartiles, over the median."""
    if len(cell["seconds"]) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(cell["seconds"], n=4)
    return (high - low) / 2 / middle


def base_of(name: str) -> str:
    """Returns the name of the cell that another is compared to: the step without privacy."""
    if name in PEERS:
        return PLAIN[PEERS[name].framework]
    return BASES.get(name, "plain")


def ratio(cells: Cells, name: str, base: str) -> float | None:
    """Returns the median of the ratios, round by round, of one cell to another."""
    if median(cells.get(name)) is None or median(cells.get(base)) is None:
        return None
    # What is slow has fewer readings: those of the first rounds.
    pairs = zip(cells[name]["seconds"], cells[base]["seconds"], strict=False)
    return statistics.median(one / other for one, other in pairs)


def show(title: str, cells: Cells) -> None:
    """Prints a line for each cell, with its ratio to the step without privacy."""
    print(title)
    for name, cell in cells.items():
        if "batch" in cell:
            print(f"  {name:20} batch {cell['batch']:,}", flush=True)
            continue
        seconds = median(cell)
        if seconds is None:
            print(f"  {name:20} {cell.get('error', 'no reading')[:90]}")
            continue
        over = ratio(cells, name, base_of(name))
        ratio_text = " " * 10 if over is None else f"{over:9.2f}x"
        starting, memory = cell.get("start_seconds"), cell.get("mib")
        print(
            f"  {name:20} {1e3 * seconds:10.3f} ms +- {spread(cell):4.0%} {ratio_text}"
            + ("" if starting is None else f"   started in {starting:5.1f} s")
            + ("" if memory is None else f"   {memory:7.1f} MiB"),
            flush=True,
        )


def study(measurements: dict[str, Callable[[], Cells]], out: pathlib.Path | None) -> dict[str, Any]:
    """Measures what a file does not hold yet, one after the other, and returns all."""
    import jax

    record = load(out) if out else empty()
    record["versions"]["dpoptax"] = {
        "jax": jax.__version__,
        "dpoptax": importlib.metadata.version("dpoptax"),
        "device": jax.devices()[0].device_kind,
    }
    for name, measure in measurements.items():
        if name in record["cells"]:
            continue
        keep(record, name, measure())
        show(name, record["cells"][name])
        if out:
            save(out, record)
    return record
