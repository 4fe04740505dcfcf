"""Checks of the arguments of a run that are no data, no loss and no optimizer."""

import os
from typing import Any

from dpoptax import _validate
from dpoptax._plan import Plan


def check_plan(plan: Any) -> None:
    """Raises unless this is a plan, with the remedy for what people pass instead."""
    if isinstance(plan, Plan):
        return
    remedy = "Pass plan=dpoptax.Plan(...), or dpoptax.Plan.calibrate(...) for a budget."
    if isinstance(plan, dict):
        remedy = "Pass plan=dpoptax.Plan(**settings), or dpoptax.Plan.calibrate(**settings)."
    if isinstance(plan, str | os.PathLike):
        remedy = "To read a plan from a file: dpoptax.Plan.from_json(path.read_text())."
    raise TypeError(f"plan must be a dpoptax.Plan; got {_validate.described(plan)}. {remedy}")


def check_microbatch_size(size: Any) -> None:
    """Raises unless this is a number of examples, "auto" or None."""
    if size is None or (isinstance(size, str) and size == "auto"):
        return
    if isinstance(size, str):
        raise TypeError(
            'microbatch_size must be a number of examples, "auto" or None; got '
            f'{_validate.described(size)}. "auto" finds the largest one that fits into memory.'
        )
    _validate.count("microbatch_size", size)


def check_folder(name: str, folder: Any) -> None:
    """Raises unless this is a path."""
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            f"{name} must be a folder where the run is saved; got {_validate.described(folder)}. "
            'Pass for example "runs/mnist", or leave it out.'
        )
