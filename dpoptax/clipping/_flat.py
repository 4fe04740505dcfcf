"""Flat clipping: one bound for the gradient of an example over all parameters together."""

from typing import Any

import attrs
import jax
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.clipping._base import ClipRule
from dpoptax.clipping._bound import clip_bound, norms_and_finite, sensitivity_of, weight_within
from dpoptax.clipping._check_rule import check_rule, is_ours
from dpoptax.clipping._state import AnyClipRule, StatefulClipRule
from dpoptax.clipping._unit import first_rule
from dpoptax.relations import Relation, parse_relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated

_INTERFACE = ("l2_clip", "weights", "sensitivity")


@attrs.frozen(init=False)
class FlatClip:
    """Clips the gradient of each example, all parameters together, to norm `l2_clip`.

    The contribution of an example becomes `g * min(1, l2_clip / ||g||)`. An example with a gradient
    that is not finite contributes zero. So does one with a norm above about 1.8e19, because its
    square overflows float32.

    Norms are float32 sums of squares at the highest matmul precision. They include a bound on what
    rounding may have removed. Together with the rounding of the sum, one example moves the sum by
    at most 3 % more than the bound, in batches of up to 65,536 examples. `docs/numerics.md` has the
    proof.

    Attributes:
        l2_clip: the bound, in the unit of the gradient. `math.inf` turns clipping off, which only a
            transformation without noise accepts. A `Schedule` changes the bound with the step, and
            the noise with it. That costs no privacy, which depends on their ratio.

    Raises:
        ValueError: `l2_clip` is not positive, or too small for float32.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = FlatClip(2.0)
        >>> rule.weights({"w": jnp.array([1.0, 16.0]), "b": jnp.array([0.0, 0.0])})
        Array([1. , 0.5], dtype=float32)
        >>> rule.sensitivity("add_or_remove_one"), rule.sensitivity("replace_one")
        (2.0, 4.0)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """

    l2_clip: ScalarOrSchedule

    # Not a converter: type checkers would no longer take the field for a number.
    def __init__(self, l2_clip: ScalarOrSchedule) -> None:
        self.__attrs_init__(validated("l2_clip", l2_clip, clip_bound))

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> Float[Array, " batch"]:
        """Returns min(1, l2_clip / norm), and 0 for an example with a norm that is not finite."""
        norms, finite = norms_and_finite(squared_norms)
        return weight_within(as_schedule(self.l2_clip).at(step), norms, finite)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another."""
        return sensitivity_of(self.l2_clip, relation)


def as_clip_rule(clip: Any) -> AnyClipRule:
    """Returns a rule as it is, and a number or a schedule as `FlatClip`.

    Raises:
        TypeError: clip is neither, for example a rule without one of the three methods.
        ValueError: one example moves the sum by more than the `l2_clip` of the rule, or a weight
            breaks a law of clip rules.
    """
    # A class has the attributes of the interface too.
    if isinstance(clip, type):
        raise TypeError(
            f"clip must be a number or a clip rule; got the class {clip.__name__}. Make a value of "
            f"it, such as {clip.__name__}(1.0)."
        )
    if isinstance(clip, StatefulClipRule):
        # The rule of its first step must keep the laws, also if this is being traced.
        with jax.ensure_compile_time_eval():
            as_clip_rule(first_rule(clip))
        return clip
    if not isinstance(clip, ClipRule):
        missing = [name for name in _INTERFACE if not hasattr(clip, name)]
        if 0 < len(missing) < len(_INTERFACE):
            raise TypeError(
                "a clip rule needs l2_clip, weights and sensitivity; got "
                f"{type(clip).__name__} without {' and '.join(missing)}. Add what is missing."
            )
        if clip is None:
            raise TypeError(
                "clip must be a number, a schedule or a clip rule; got None. Pass for example 1.0, "
                "or math.inf with noise_multiplier=0 to train without clipping."
            )
        if isinstance(clip, dict | list | tuple):
            raise TypeError(
                "clip must be a number, a schedule or a clip rule; got "
                f"{_validate.described(clip)}. For a bound of each layer pass "
                "dpoptax.clipping.GroupClip(bounds)."
            )
        return FlatClip(validated("clip", clip, clip_bound))
    check_sensitivity(clip, "add_or_remove_one")
    if not is_ours(clip):
        check_rule(clip)
    return clip


def check_sensitivity(rule: AnyClipRule, relation: Relation) -> None:
    """Raises if neighbours move the sum by more than the noise covers under a relation.

    Raises:
        ValueError: the sensitivity that the rule states is infinite, or too large.
    """
    clip = first_rule(rule)
    largest = as_schedule(clip.l2_clip).max
    name = parse_relation(relation).name.lower()
    moves = clip.sensitivity(name)  # as text, which a rule of the user's own may compare
    # Two neighbours differ by two contributions at most. A rule of the user's own may state that
    # for every relation but the first.
    covered = largest if name == "add_or_remove_one" else 2 * largest
    # Not `moves > covered`, which is False for NaN.
    if not moves <= covered:
        raise ValueError(
            f"noise is a multiple of l2_clip, which is {largest} for {type(clip).__name__}, yet "
            f"one example more moves the sum by {moves}: make l2_clip as large as that."
            if name == "add_or_remove_one"
            else f"under {name} the noise covers a sensitivity of 2 * l2_clip, which is "
            f"{covered} for {type(clip).__name__}; got {moves}. Use a sampler with another "
            "relation, or a rule with a finite sensitivity."
        )
