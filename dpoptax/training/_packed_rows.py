"""Refuses rows that pack several sequences, as language models are often trained.

The plan protects a row. If a row holds the sequences of several persons, or if rows were filled one
after the other, then removing one person changes rows that the plan counts as unchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax._pytree import PyTree
from dpoptax.samplers import Sampler
from dpoptax.training._data import DeviceData, HostData


def refuse_packed_rows(data: DeviceData | HostData, sampler: Sampler) -> None:
    """Raises if a column of segment numbers says that a row holds several sequences.

    Of data on the host, the first row is read.
    """
    if sampler.unit != "example":  # arranged by unit: several sequences in a row have one owner
        return
    rows = data.arrays if isinstance(data, DeviceData) else data.first_example()
    refuse_packed(rows)


def refuse_packed(rows: PyTree) -> None:
    """Raises if a leaf named as segments holds several segments in one row."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(rows):
        name = jax.tree_util.keystr(path)
        if "segment" in name.lower() and _has_several(leaf):
            raise ValueError(
                f"data{name} must have one sequence in each row; got a row with several. The plan "
                "protects one row, not each person in it. Give each sequence a row of its own, or "
                "pack by person: samplers.UserPoisson, and sampler.arrange(data). If all sequences "
                "of each row belong to one person, rename the column, for example to 'parts'."
            )


def _has_several(leaf: Any) -> bool:
    """Whether a row has two different numbers besides 0, which marks padding."""
    if not (jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.ndim > 1 and leaf.size):
        return False
    numpy = jnp if isinstance(leaf, jax.Array) else np
    limits = jnp.iinfo(leaf.dtype)
    rows = leaf.reshape(len(leaf), -1)
    # As `where=` and not as selected copies: 8 bits hold no number outside of the limits.
    most = numpy.max(rows, axis=1, where=rows != 0, initial=limits.min)
    least = numpy.min(rows, axis=1, where=rows != 0, initial=limits.max)
    return bool(numpy.any(most > least))
