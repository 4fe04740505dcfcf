"""The interface of a norm rule: one algorithm for the norms and sums of one parameter leaf."""

import abc
import dataclasses
import math
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from dpoptax.per_example._norm_rules.factors import Factors, num_terms
from dpoptax.per_example._tracing.site import Site


@dataclasses.dataclass(frozen=True, eq=False)
class NormRule(abc.ABC):
    """Computes norms, gradients and sums of one leaf from the factors of its sites.

    To add a rule, write one subclass in one file and add it to `RULES` in `select.py`.

    Every rule obeys these laws. `prepare` takes one `Factors` per site, in the order of `sites`.
    The others take what it returns. Each array has a leading axis of examples.

    1. `squared_norms(factors)[i]` is at least the squared norm of `gradients(factors)[i]`, whatever
       was lost by rounding (see `rounding.py`), and equal to it up to rounding where the terms of
       the gradient do not cancel. Clipping relies on this bound, so it is a matter of privacy.
    2. `weighted_sum(factors)` is the sum of `gradients(factors)` over the examples. Weights are not
       seen here: the caller has already scaled the cotangents with them. The caller passes so few
       examples at a time that rounding is harmless, whatever the order of the sum.
    3. Examples are independent. A NaN in one example changes no result of another, and an example
       whose cotangents are zero adds zero to the sum.
    4. Everything is computed at the highest precision, in float32 or wider, and the size of the
       chunks that a batch is split into changes no result beyond rounding.
    5. `matches` returns None for sites that the formulas do not cover. A refusal makes a model
       slower, a wrong acceptance breaks the privacy guarantee: in doubt, refuse.

    Attributes:
        sites: all uses of the leaf.
        spec: the shape and dtype of the leaf.
    """

    sites: tuple[Site, ...]
    spec: jax.ShapeDtypeStruct

    @classmethod
    @abc.abstractmethod
    def matches(cls, sites: Sequence[Site], spec: jax.ShapeDtypeStruct) -> "NormRule | None":
        """Returns the rule for a leaf with these sites, or None if it does not apply to them."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The name that `explain` shows."""

    @property
    @abc.abstractmethod
    def cost(self) -> float:
        """Multiplications per example for the norms: the cheapest rule is used.

        It is an estimate from static shapes. Work that is slower than a large matrix product counts
        more, by the factors in `cost_model.py`.
        """

    @property
    def num_terms(self) -> int:
        """How many terms one example adds to a number in `weighted_sum`, at most."""
        return num_terms(self.sites, self.spec)

    @property
    def num_floats(self) -> int:
        """How many floats `weighted_sum` needs for one example."""
        return math.prod(self.spec.shape) + sum(site.num_floats for site in self.sites)

    @property
    def sums_to_vector(self) -> bool:
        """Whether `weighted_sum` multiplies a matrix by a vector."""
        return False

    def prepare(self, factors: Sequence[Factors]) -> Sequence[Factors]:
        """Returns what the other methods take: by default the factors as they are."""
        return factors

    @abc.abstractmethod
    def squared_norms(self, factors: Sequence[Factors]) -> Float[Array, " batch"]:
        """Returns an upper bound on the squared norm of every example's gradient."""

    @abc.abstractmethod
    def gradients(self, factors: Sequence[Factors]) -> Float[Array, "batch ..."]:
        """Returns the gradient of every example, `(batch, *leaf.shape)`, in float32 or wider."""

    @abc.abstractmethod
    def weighted_sum(self, factors: Sequence[Factors]) -> Float[Array, "..."]:
        """Returns the sum of the gradients, by one large product where possible."""
