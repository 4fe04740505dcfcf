"""How batches were drawn: kept beside them, so that `DPSVI.get_epsilon` accounts for what ran.

Poisson batches have a mask, and carry their sampler with it. Batches of a fixed size are plain
arrays, as scripts compute with them; these are recognised by identity, until they are changed.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import PyTree

from dpoptax._masked_examples import MaskedExamples
from dpoptax.samplers import Sampler

_LAWS: dict[int, tuple[weakref.ref[Any], Sampler]] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DrawnExamples(MaskedExamples):
    """`MaskedExamples` that know their sampler; it is static under transformations of JAX."""

    sampler: Sampler = dataclasses.field(metadata={"static": True})

    def __getitem__(self, field: Any) -> "DrawnExamples":
        return DrawnExamples(super().__getitem__(field).examples, self.mask, self.sampler)

    def __iter__(self) -> Iterator["DrawnExamples"]:
        return (DrawnExamples(one.examples, one.mask, self.sampler) for one in super().__iter__())


def record(batch: PyTree, sampler: Sampler) -> None:
    """Notes the sampler of arrays, as long as they exist."""
    for leaf in jax.tree.leaves(batch):
        number = id(leaf)
        # An identity is used again after its array is gone.
        gone = weakref.ref(leaf, lambda _, number=number: _LAWS.pop(number, None))
        _LAWS[number] = gone, sampler


def law_of(batch: PyTree) -> Sampler | None:
    """Returns the sampler of all arrays of a batch, or None if it is unknown or not the same."""
    leaves = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, DrawnExamples))
    found = [_law_of_leaf(leaf) for leaf in leaves]
    return found[0] if found and all(law == found[0] for law in found) else None


def _law_of_leaf(leaf: Any) -> Sampler | None:
    if isinstance(leaf, DrawnExamples):
        return leaf.sampler
    reference, sampler = _LAWS.get(id(leaf), (None, None))
    return sampler if reference is not None and reference() is leaf else None
