"""What a streamed leaf does in the backward pass: which norms it reads, and which sum it forms.

The first backward pass reads numbers of each example, such as norms, and the second one forms the
sum. In between, the leaf may use what the first pass found elsewhere. It tells its site in a
message, which the site receives as a cotangent.

A compiler may round differently in the two passes. For a loss with a jump, or a steep one, a
gradient may then be much longer in the second pass than the norm by which it was clipped. So the
second pass reads the norm again, from the numbers that it sums, and `never_longer` reduces the
weight of such an example. See "Two backward passes" in `docs/numerics.md`.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpoptax._precision import wide_dtype
from dpoptax.per_example._base import select
from dpoptax.per_example._batch_sum import examples_per_chunk
from dpoptax.per_example._in_memory import from_memory
from dpoptax.per_example._norm_rules import Factors, NormRule, sum_weighted
from dpoptax.per_example._norm_rules.chunking import sum_examples
from dpoptax.per_example._norm_rules.cost_model import constants
from dpoptax.per_example._norm_rules.factors import to_leaf
from dpoptax.per_example._norm_rules.materialize import materialization_cost
from dpoptax.per_example._norm_rules.rounding import sum_of_squares
from dpoptax.per_example._norm_rules.weighted import select_factors
from dpoptax.per_example._tracing.site import Site


class Message(NamedTuple):
    """What a site receives in the backward pass, with one row per example.

    Attributes:
        weights: of the examples in the sum.
        norms: the squared norms by which the examples were clipped, as the first pass read them;
            empty for a leaf without a second pass.
        lookup: the index and the cotangent of each lookup in a tied table; empty otherwise.
    """

    weights: Any
    norms: tuple[Any, ...] = ()
    lookup: tuple[Any, ...] = ()


def never_longer(
    weights: Float[Array, " batch"], first: Float[Array, " batch"], again: Float[Array, " batch"]
) -> Float[Array, " batch"]:
    """Reduces the weights of gradients that are longer than when they were clipped.

    Args:
        weights: of the examples in the sum.
        first: the squared norms by which they were clipped.
        again: the squared norms of what is summed now.

    Returns:
        Weights with which no gradient contributes more than `weights * sqrt(first)`.
    """
    scale = jnp.sqrt(jnp.where(again > first, first / again, 1))
    counts = (weights != 0) & jnp.isfinite(again)
    return jnp.where(counts, weights * scale.astype(weights.dtype), 0)


def forms_each_gradient(rule: NormRule) -> bool:
    """Whether the sum forms the gradients of the examples one at a time."""
    return examples_per_chunk(rule.num_terms) == 1


def sum_no_longer(
    rule: NormRule,
    factors: Sequence[Factors],
    weights: Float[Array, " batch"],
    first: Float[Array, " batch"],
) -> Array:
    """Returns the weighted sum of a leaf, after `never_longer` has reduced the weights.

    The norms are those of the numbers in the sum: neither is computed from other roundings.
    """

    def of_batch(factors: Sequence[Factors]) -> Array:
        reduced = never_longer(weights, first, rule.squared_norms(factors))
        return sum_weighted(rule, factors, reduced, reduced != 0)

    def of_example(example: Any) -> Array:
        factors, weights, first = example
        one = rule.weighted_sum([select_factors(factor, weights != 0) for factor in factors])
        one = jax.lax.optimization_barrier(one)
        again = sum_of_squares(one, tuple(range(one.ndim)))
        reduced = never_longer(weights, first, again[None].astype(first.dtype))
        return select(reduced != 0, reduced[0].astype(one.dtype) * one[None])[0]

    if not (forms_each_gradient(rule) and len(weights)):
        return from_memory(of_batch, list(factors), jnp.any(first < 0))
    return sum_examples(of_example, (factors, weights, first), rule.num_terms, rule.num_floats)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedLeaf(abc.ABC):
    """A leaf whose norms and sum are formed while one of its sites is differentiated.

    Attributes:
        spec: shape and dtype of the leaf.
        site: the site.
        rule: the norm rule.
    """

    spec: jax.ShapeDtypeStruct
    site: Site
    rule: NormRule

    @property
    def kept(self) -> tuple[Site, ...]:
        """The other sites of the leaf, whose factors are kept."""
        return ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the leaf."""
        return (*self.kept, self.site)

    @property
    @abc.abstractmethod
    def cost(self) -> float:
        """Multiplications per example for the norms, as in `NormRule`."""

    @property
    def cost_again(self) -> float:
        """The same for the norms in the second pass."""
        if not forms_each_gradient(self.rule):
            return self.cost
        return constants(self.sites).product * math.prod(self.spec.shape)

    @property
    def message(self) -> Message:
        """Shapes and dtypes of the message to one run of the site, for one example."""
        number = jax.ShapeDtypeStruct((), wide_dtype(self.spec.dtype))
        return Message(number, norms=(number,))

    @property
    @abc.abstractmethod
    def readings(self) -> Any:
        """Shapes and dtypes of what `read` returns for one example."""

    @property
    @abc.abstractmethod
    def total(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what one run adds to the sum."""

    @abc.abstractmethod
    def read(self, factors: Factors, message: Message) -> Any:
        """Returns the readings of one run, with an axis of examples."""

    @abc.abstractmethod
    def add_up(self, factors: Factors, message: Message) -> Array:
        """Returns the weighted sum of one run over the examples."""

    @abc.abstractmethod
    def squared_norms(self, readings: Any, kept: list[Factors]) -> Float[Array, " batch"]:
        """Returns the squared norms, from the readings `(batch, *scans, ...)` of all runs."""

    @abc.abstractmethod
    def to_leaf(self, total: Array) -> Array:
        """Brings the sums of all runs, `(*scans, ...)`, to the shape of the leaf."""

    def tell(self, message: Message, kept: list[Factors], readings: Any = None) -> Message:
        """Returns the message with what the first pass has found.

        Args:
            message: the message so far.
            kept: the factors of the kept sites, with zeros for what is unknown.
            readings: of all runs of the site; None before the first pass.
        """
        return message


class OneRunLeaf(StreamedLeaf):
    """Each number of the leaf is used by one run of one site: the norms of the runs add up."""

    @property
    def cost(self) -> float:
        """See `StreamedLeaf.cost`."""
        return self.site.num_runs * self.rule.cost

    @property
    def readings(self) -> Any:
        """See `StreamedLeaf.readings`."""
        return jax.ShapeDtypeStruct((), wide_dtype(self.spec.dtype))

    @property
    def total(self) -> jax.ShapeDtypeStruct:
        """See `StreamedLeaf.total`."""
        return jax.ShapeDtypeStruct(self.site.parameter.shape, wide_dtype(self.spec.dtype))

    def read(self, factors: Factors, message: Message) -> Any:
        """See `StreamedLeaf.read`."""
        return self.rule.squared_norms(self.rule.prepare([factors]))

    def add_up(self, factors: Factors, message: Message) -> Array:
        """See `StreamedLeaf.add_up`."""
        prepared = self.rule.prepare([factors])
        return sum_no_longer(self.rule, prepared, message.weights, message.norms[0])

    def tell(self, message: Message, kept: list[Factors], readings: Any = None) -> Message:
        """See `StreamedLeaf.tell`: the norm of each run."""
        return message if readings is None else message._replace(norms=(readings,))

    def squared_norms(self, readings: Any, kept: list[Factors]) -> Float[Array, " batch"]:
        """See `StreamedLeaf.squared_norms`; rounded up."""
        total = readings.sum(axis=tuple(range(1, readings.ndim)))
        return total * (1 + 4 * self.site.num_runs * float(jnp.finfo(total.dtype).eps))

    def to_leaf(self, total: Array) -> Array:
        """See `StreamedLeaf.to_leaf`."""
        return to_leaf(self.site, total, self.spec)


class HeldLeaf(StreamedLeaf):
    """A small leaf whose gradients are formed in the backward pass and held, instead of factors.

    It needs no second pass: the gradients give the norms and the sum.
    """

    @property
    def cost(self) -> float:
        """See `StreamedLeaf.cost`: forming the gradients."""
        return materialization_cost([self.site.equation], self.spec)

    @property
    def message(self) -> Message:
        """See `StreamedLeaf.message`."""
        return super().message._replace(norms=())

    @property
    def readings(self) -> Any:
        """See `StreamedLeaf.readings`: a gradient."""
        return jax.ShapeDtypeStruct(self.site.parameter.shape, wide_dtype(self.spec.dtype))

    @property
    def total(self) -> jax.ShapeDtypeStruct:
        """See `StreamedLeaf.total`: nothing."""
        return jax.ShapeDtypeStruct((), wide_dtype(self.spec.dtype))

    def read(self, factors: Factors, message: Message) -> Any:
        """See `StreamedLeaf.read`."""
        return self.rule.gradients(self.rule.prepare([factors]))

    def add_up(self, factors: Factors, message: Message) -> Array:
        """See `StreamedLeaf.add_up`."""
        return jnp.zeros((), self.total.dtype)

    def squared_norms(self, readings: Any, kept: list[Factors]) -> Float[Array, " batch"]:
        """Raises `AssertionError`: the gradients are held as those of a stacked leaf."""
        raise AssertionError("a held leaf has gradients, and no norms")

    def to_leaf(self, total: Array) -> Array:
        """See `StreamedLeaf.to_leaf`; of one gradient."""
        return to_leaf(self.site, total, self.spec)
