"""The interface of a sampler: public numbers, and a pure `init` / `sample` pair."""

import abc
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PRNGKeyArray

from dpoptax import _markers, _validate
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.relations import Relation, parse_relation
from dpoptax.samplers._participation import Participation
from dpoptax.schedules import ScalarOrSchedule


class Batch(NamedTuple):
    """The examples of one step. Not private: the members of a batch must not be released.

    Attributes:
        indices: int32 `(max_batch_size,)`, distinct where `mask` is True. Elsewhere they are
            num_examples, which points at no example. Gather with `dpoptax.samplers.take`: NumPy
            raises an error for such an index, but `array[indices]` of JAX reads the last example.
        mask: bool `(max_batch_size,)`; True marks a real example, False marks padding.

    Example:
        >>> import jax, dpoptax
        >>> sampler = dpoptax.samplers.FixedSize(num_examples=100, batch_size=8)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> batch.indices.shape, int(batch.mask.sum())
        ((8,), 8)
    """

    indices: Int[Array, " max_batch_size"]
    mask: Bool[Array, " max_batch_size"]

    def __repr__(self) -> str:
        """Leaves out the members, which must not appear in logs and error messages."""
        return f"Batch(<{jnp.shape(self.mask)} rows, not shown>)"


class SamplerState(NamedTuple):
    """What the next batch needs: its number and the key.

    Attributes:
        step: the number of the next batch, int32.
        key: the sampling key; the same in every step.
    """

    step: Int[Array, ""]
    key: PRNGKeyArray

    def __repr__(self) -> str:
        """Leaves out the key, which must not appear in logs and error messages."""
        return f"SamplerState(step={self.step}, key=<not shown>)"

    def keys(self, num: int) -> Key[Array, " num"]:
        """Returns keys for the next batch and no other."""
        key = allowed_key("the key of a sampler state", self.key)
        return jax.random.split(jax.random.fold_in(key, self.step), num)

    def advanced(self) -> "SamplerState":
        """Returns the state after one more batch."""
        return SamplerState(self.step + 1, self.key)


class Sampler(abc.ABC):
    """Base class of all samplers: which examples take part in each step, and what that costs.

    A sampler is a frozen value. To write one, derive from this class, give it the attributes
    below as fields or properties, and implement `sample` and `event`. Override `init` if the next
    batch needs more than a step and a key.

    Attributes:
        unit: what is sampled and protected, such as an example or a user.
        relation: the neighbouring relation under which a guarantee is stated by default.
        num_examples: how many examples there are; a public constant.
        expected_batch_size: the public number that the sum is divided by, in examples; a
            `Schedule` if it changes with the step.
        max_batch_size: the static size of every batch, padding included.

    Example:
        >>> import attrs, dp_accounting, jax, jax.numpy as jnp
        >>> @attrs.frozen
        ... class FullBatch(Sampler):
        ...     num_examples: int
        ...
        ...     @property
        ...     def expected_batch_size(self):
        ...         return float(self.num_examples)
        ...
        ...     @property
        ...     def max_batch_size(self):
        ...         return self.num_examples
        ...
        ...     def sample(self, state):
        ...         indices = jnp.arange(self.num_examples, dtype=jnp.int32)
        ...         return state.advanced(), Batch(indices, jnp.ones(self.num_examples, bool))
        ...
        ...     def event(self, noise_multiplier, num_steps, relation=None):
        ...         gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        ...         return dp_accounting.SelfComposedDpEvent(gaussian, num_steps)
        >>> sampler = FullBatch(3)
        >>> state, batch = sampler.sample(sampler.init(jax.random.key(0)))
        >>> batch.indices.tolist(), sampler.unit
        ([0, 1, 2], 'example')
    """

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "add_or_remove_one"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _markers.marks_batches(cls)

    if TYPE_CHECKING:
        # For a type checker, a read-only declaration can be implemented by a field or by a
        # property. At run time a property here would stop a dataclass from setting its field.

        @property
        def num_examples(self) -> int: ...

        @property
        def expected_batch_size(self) -> ScalarOrSchedule: ...

        @property
        def max_batch_size(self) -> int: ...

    def init(self, key: PRNGKeyArray, step: int = 0) -> Any:
        """Returns the state before batch number `step`.

        Every batch follows from the key and its number, so a run can resume at any step.

        Args:
            key: a key for sampling and nothing else.
            step: the number of the first batch to draw.

        Returns:
            A pytree for `sample`.

        Raises:
            TypeError: the key is not a typed Threefry or ChaCha key, or `step` is not a whole
                number.
            ValueError: `step` is negative.
        """
        step = _validate.count("step", step, at_least=0)
        return SamplerState(jnp.asarray(step, jnp.int32), allowed_key("key", key))

    @abc.abstractmethod
    def sample(self, state: Any) -> tuple[Any, Batch]:
        """Draws the next batch: a pure function that can be jitted, of static shape.

        Args:
            state: from `init`, or from the last call.

        Returns:
            The next state and the batch.
        """

    @abc.abstractmethod
    def event(
        self,
        noise_multiplier: ScalarOrSchedule,
        num_steps: int,
        relation: Relation | None = None,
    ) -> dp_accounting.DpEvent:
        """Returns the privacy event of `num_steps` noisy sums over batches of this sampler.

        Args:
            noise_multiplier: standard deviation of the Gaussian noise on the sum, divided by the
                clip bound.
            num_steps: how many steps ran, counted from the first.
            relation: which data sets count as neighbours; None for the sampler's own `relation`.

        Returns:
            dp-accounting's event.

        Raises:
            ValueError: nothing is proven about this sampler under `relation`.
        """

    def participation(self, num_steps: int) -> Participation | None:
        """Returns in which steps one example may take part, for noise that is correlated.

        Args:
            num_steps: how many steps ran, counted from the first.

        Returns:
            A `Participation`; None where no pattern is known.
        """
        return None

    def resized(self, max_batch_size: int | None) -> "Sampler | None":
        """Returns this sampler with batches of another padded size.

        Args:
            max_batch_size: the size; None for a size that is practically never exceeded.

        Returns:
            A sampler; None where the size of batches is not random, or cannot be chosen.
        """
        return None


def padded_batch(
    indices: Int[Array, " batch"],
    mask: Bool[Array, " batch"],
    num_examples: int,
    size: int | None = None,
) -> Batch:
    """Returns a batch, padded to a static size, whose padded indices point at no example."""
    missing = 0 if size is None else size - len(mask)
    indices = jnp.where(mask, indices, num_examples)
    return Batch(
        jnp.pad(indices, (0, missing), constant_values=num_examples), jnp.pad(mask, (0, missing))
    )


def refuse_add_or_remove_one(relation: Relation, what: str, parts: str) -> None:
    """Raises under add_or_remove_one, for a sampler that assigns examples to `parts` by index."""
    if parse_relation(relation) == dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE:
        raise ValueError(
            f"{what} have no guarantee under add_or_remove_one: an example more moves others "
            f"between {parts}. Sample with Poisson. Or state another guarantee, about other "
            "neighbours: relation='replace_special' (an example is there or contributes nothing) "
            "or 'replace_one'."
        )
