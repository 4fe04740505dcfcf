"""Checks that samplers of users share: of the user of every example, and of their data."""

from typing import Any

import numpy as np

from dpoptax import _validate
from dpoptax._pytree import PyTree


def checked_user_ids(user_ids: Any) -> np.ndarray:
    """Returns the user of every example as a vector; refuses anything else."""
    user_ids = np.asarray(user_ids)
    if user_ids.ndim != 1 or len(user_ids) == 0:
        raise ValueError(
            "user_ids must name the user of every example, one after the other; got an array "
            f"of shape {user_ids.shape}. Pass a vector with an entry for each row of the data."
        )
    return user_ids


def check_data(data: PyTree, user_ids: Any, sampler: str) -> None:
    """Raises unless the data have one row per entry of `user_ids`, and these are known."""
    if user_ids is None:
        raise ValueError(
            "arrange needs the user of every example; got a sampler that was read from JSON, "
            f"which holds public numbers only. Make the sampler again, {sampler}(user_ids, ...), "
            "and call its arrange."
        )
    num_rows = _validate.leading_axis_size("data", data)
    if num_rows != len(user_ids):
        raise ValueError(
            f"data must have one row per entry of user_ids; got {num_rows} rows and "
            f"{len(user_ids)} entries. Pass the rows that user_ids was made from, in the "
            "same order and once."
        )
