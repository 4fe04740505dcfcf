"""How batches were drawn: kept beside them, so that `DPSVI.get_epsilon` accounts for what ran.

Poisson batches have a mask, and carry their sampler with it. Batches of a fixed size are plain
arrays, as scripts compute with them; these are recognised by identity, until they are changed.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dpoptax import _validate
from dpoptax._masked_examples import MaskedExamples
from dpoptax._pytree import PyTree
from dpoptax.samplers import Poisson, Sampler, Shuffled

# With each array its sampler, and an object that the arrays of one draw share.
_LAWS: dict[int, tuple[weakref.ref[Any], Sampler, object]] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class DrawnExamples(MaskedExamples):
    """`MaskedExamples` that know their sampler; it is static under transformations of JAX."""

    sampler: Sampler = dataclasses.field(metadata={"static": True})

    def __getitem__(self, field: Any) -> "DrawnExamples":
        return DrawnExamples(super().__getitem__(field).examples, self.mask, self.sampler)

    def __iter__(self) -> Iterator["DrawnExamples"]:
        return (DrawnExamples(one.examples, one.mask, self.sampler) for one in super().__iter__())


class NoiseFor(float):
    """A noise multiplier that knows for which kind of batches it was computed."""

    sampler_class: type[Sampler]

    def __new__(cls, noise_multiplier: float, sampler_class: type[Sampler]) -> "NoiseFor":
        number = super().__new__(cls, noise_multiplier)
        number.sampler_class = sampler_class
        return number

    def __getnewargs__(self) -> tuple[float, type[Sampler]]:  # type: ignore[override]
        return float(self), self.sampler_class

    def check(self, law: Sampler | None) -> None:
        """Refuses batches that need more noise."""
        for_poisson = self.sampler_class is Poisson
        if isinstance(law, Shuffled) or (for_poisson and not isinstance(law, Poisson)):
            drawn = "of a law that is not known" if law is None else f"of {type(law).__name__}"
            remedy = (
                "Take poisson_batchify_data and pass its columns as they are, or compute the noise "
                "by approximate_sigma. If your own batches are Poisson, pass float(dp_scale)."
                if for_poisson
                else "Take subsample_batchify_data or poisson_batchify_data for training."
            )
            raise ValueError(
                f"dp_scale was computed for batches of {self.sampler_class.__name__}, but these "
                f"are batches {drawn}, which need more noise for the same epsilon. {remedy}"
            )


def record(batch: PyTree, sampler: Sampler) -> None:
    """Notes the sampler of arrays, as long as they exist."""
    draw = object()
    for leaf in jax.tree.leaves(batch):
        # An identity is used again after its array is gone.
        forget = functools.partial(_forget, id(leaf))
        _LAWS[id(leaf)] = weakref.ref(leaf, forget), sampler, draw


def law_of(batch: PyTree) -> Sampler | None:
    """Returns the sampler of all arrays of one draw, or None if it is unknown or not the same."""
    leaves = jax.tree.leaves(batch, is_leaf=lambda node: isinstance(node, DrawnExamples))
    found = [_law_of_leaf(leaf) for leaf in leaves]
    same = bool(found) and all(law == found[0] for law in found)
    return found[0][0] if same else None


def num_steps(law: Sampler, q: float, num_epochs: float | None, num_iter: float | None) -> int:
    """Returns the number of updates, rounded up; an epoch counts as the batchifier counts it."""
    if (num_epochs is None) == (num_iter is None):
        raise TypeError(
            "give either num_epochs or num_iter. Pass one of the two and leave out the other."
        )
    # A batchifier rounds the batch size, so that its epochs may have more batches than 1 / q.
    size = max(1, round(float(law.expected_batch_size)))  # type: ignore[arg-type]
    per_epoch = max(1 / q, law.num_examples // size)
    steps = num_iter if num_iter is not None else num_epochs * per_epoch  # type: ignore[operator]
    # Rounding must not count a step that is there only by the representation of q.
    return math.ceil(_validate.non_negative("the number of updates", steps) * (1 - 1e-9))


def _forget(number: int, reference: Any) -> None:
    if _LAWS.get(number, (None,))[0] is reference:
        del _LAWS[number]


def _law_of_leaf(leaf: Any) -> tuple[Sampler | None, object]:
    if isinstance(leaf, DrawnExamples):
        # `jax.tree.map` keeps the sampler, also where it repeats rows or cuts them off.
        whole = jnp.shape(leaf.mask) == (leaf.sampler.max_batch_size,)
        return (leaf.sampler if whole else None), None
    reference, sampler, draw = _LAWS.get(id(leaf), (None, None, None))
    return (sampler, draw) if reference is not None and reference() is leaf else (None, None)
