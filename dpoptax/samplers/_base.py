"""What a sampler is: a frozen value with public numbers, and a pure init/sample pair."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from dp_accounting import ComposedDpEvent, DpEvent, NeighboringRelation, SelfComposedDpEvent
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from dpoptax import _validate
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import Scheduled, passes


class Batch(NamedTuple):
    """Who takes part in a step. Not private: who was drawn must not be released.

    Attributes:
        indices: int32 `(max_batch_size,)`, distinct where `mask` is True, 0 elsewhere.
        mask: bool `(max_batch_size,)`; True marks a real example.
    """

    indices: Int[Array, " max_batch_size"]
    mask: Bool[Array, " max_batch_size"]


class SamplerState(NamedTuple):
    """What the next batch needs: how many there were, and the key."""

    step: Int[Array, ""]
    key: PRNGKeyArray

    def keys(self, num: int) -> Key[Array, " num"]:
        """Keys for the next batch and no other."""
        return jax.random.split(jax.random.fold_in(self.key, self.step), num)

    def advanced(self) -> "SamplerState":
        """The state after one more batch."""
        return SamplerState(self.step + 1, self.key)


def start(key: PRNGKeyArray, step: int) -> SamplerState:
    """The state before batch number `step`."""
    step = _validate.count("step", step, at_least=0)
    return SamplerState(jnp.asarray(step, jnp.int32), _validate.typed_key("key", key))


@runtime_checkable
class Sampler(Protocol):
    """What training asks of a sampler, and what accounting reads of it."""

    @property
    def unit(self) -> str:
        """What is sampled and protected: an example, a user."""

    @property
    def relation(self) -> str:
        """The neighbouring relation that a statement names if not asked for another."""

    @property
    def num_examples(self) -> int:
        """How many examples there are to draw from; a public constant."""

    @property
    def expected_batch_size(self) -> Scheduled:
        """The public normaliser of the sum, in examples."""

    @property
    def max_batch_size(self) -> int | None:
        """The static size of every batch, padding included."""

    def init(self, key: PRNGKeyArray, step: int = 0) -> Any:
        """The state before batch number `step`; `key` serves sampling and nothing else."""

    def sample(self, state: Any) -> tuple[Any, Batch]:
        """The next state and the next batch; pure, jittable, of static shape."""

    def event(self, noise_multiplier: Scheduled, num_steps: int, relation: Relation) -> DpEvent:
        """The law of this sampler under Gaussian noise on the sum, as dp-accounting reads it."""


def refuse_adding(relation: Relation, what: str, parts: str) -> None:
    """Refuses add_or_remove_one for a sampler that takes examples by their place.

    Args:
        relation: which data sets count as neighbours.
        what: has no guarantee.
        parts: between which an example more moves others.

    Raises:
        ValueError: under add_or_remove_one.
    """
    if parse_relation(relation) == NeighboringRelation.ADD_OR_REMOVE_ONE:
        raise ValueError(
            f"{what} have no guarantee under add_or_remove_one: an example more moves others "
            f"between {parts}. Ask for relation='replace_special' (an example is there or "
            "contributes nothing) or 'replace_one', or sample with Poisson."
        )


def composed(
    one_pass: Callable[[float], DpEvent],
    noise_multiplier: Scheduled,
    num_steps: int,
    steps_per_pass: int = 1,
) -> DpEvent:
    """The event of a run from that of one pass at a noise multiplier.

    Where the noise changes within a pass, the pass is taken at its least.
    """
    counts = passes(noise_multiplier, num_steps, steps_per_pass)
    runs = [SelfComposedDpEvent(one_pass(level), count) for level, count in counts.items()]
    return runs[0] if len(runs) == 1 else ComposedDpEvent(runs)
