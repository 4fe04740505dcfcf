"""Clipping per layer: one bound for each parameter array, from one bound on the whole gradient."""

import math

import attrs
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import clip_bound, norms_and_finite, sensitivity_of, weight_within
from dpoptax.clipping._groups import by_path, groups_of
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule, Schedule, as_schedule, validated


@attrs.frozen(init=False, repr=False)
class PerLayerClip:
    """Clips the gradient of each parameter array to its share of `l2_clip`.

    With K arrays, each is clipped to `l2_clip / sqrt(K)`; or, with `by_size`, array k of d_k
    numbers to `l2_clip * sqrt(d_k / sum of d)`. The squares of the bounds add up to `l2_clip**2`.
    The noise is the same as that of `FlatClip(l2_clip)`.

    A kernel and its bias are two arrays. To clip them together, use `GroupClip`. An example with a
    gradient that is not finite in one array contributes zero in all of them.

    Attributes:
        l2_clip: the bound on the norm of the whole contribution. It may be a `Schedule`.
        sizes: how many numbers each array has, by its path; None for equal shares. `by_size` fills
            it in.

    Raises:
        ValueError: `l2_clip` is not positive, or too small for float32. Later, from `privatize`:
            the parameters are not those of `sizes`, or there are so many that a share of `l2_clip`
            is too small.

    Example:
        >>> import jax.numpy as jnp
        >>> squared_norms = {"w": jnp.array([9.0]), "b": jnp.array([0.01])}
        >>> rule = PerLayerClip(2**0.5)  # two arrays, so each is clipped to norm 1
        >>> weights = rule.weights(squared_norms)
        >>> round(float(weights["b"][0]), 3), round(float(weights["w"][0]), 3)
        (1.0, 0.333)
        >>> PerLayerClip.by_size(1.0, {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}).sizes
        {'b': 3, 'w': 6}

    Reference: McMahan, Ramage, Talwar and Zhang 2018, arXiv:1710.06963, section 2.3.
    """

    l2_clip: ScalarOrSchedule
    # Sorted pairs: a dict could be changed later.
    _sizes: tuple[tuple[str, int], ...] | None

    def __init__(self, l2_clip: ScalarOrSchedule, sizes: dict[str, int] | None = None) -> None:
        bound = validated("l2_clip", l2_clip, clip_bound)
        checked = None if sizes is None else tuple(sorted(map(_size, sizes.items())))
        self.__attrs_init__(bound, checked)

    def __repr__(self) -> str:
        """Shows the arguments as they can be passed."""
        sizes = "" if self._sizes is None else f", sizes={self.sizes}"
        return f"PerLayerClip({self.l2_clip}{sizes})"

    @property
    def sizes(self) -> dict[str, int] | None:
        """How many numbers each array has, by its path; None for equal shares."""
        return None if self._sizes is None else dict(self._sizes)

    @classmethod
    def by_size(cls, l2_clip: ScalarOrSchedule, params: PyTree) -> "PerLayerClip":
        """Returns the rule that gives each array of `params` a share by its size.

        Then all numbers have equal shares of the squared bound.

        Args:
            l2_clip: the bound on the norm of the whole contribution.
            params: the parameters, or their shapes as `jax.ShapeDtypeStruct`.
        """
        if isinstance(params, int | float | Schedule):
            raise TypeError(
                f"params must be a tree of arrays; got {_validate.described(params)}. Pass "
                "PerLayerClip.by_size(l2_clip, params)."
            )
        # An array without numbers adds nothing, and needs a positive bound.
        sizes = {path: max(1, math.prod(leaf.shape)) for path, leaf in by_path(params).items()}
        return cls(l2_clip, sizes)

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> PyTree[Float[Array, " batch"]]:
        """Returns min(1, bound / norm) of each array, as a tree like `squared_norms`.

        Raises:
            ValueError: the arrays are not those of `sizes`, or a bound is too small.
        """
        leaves, structure = jax.tree.flatten(squared_norms)
        shares = self._shares(squared_norms)
        clip = as_schedule(self.l2_clip)
        clip_bound("the smallest share of l2_clip", clip.min * min(shares))
        bound = clip.at(step)
        _, finite = norms_and_finite(squared_norms)
        scales = [
            weight_within(bound * share, jnp.sqrt(leaf), finite)
            for share, leaf in zip(shares, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, scales)

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another.

        The arrays are different coordinates, so the squared norms of the parts of an example add
        up, to at most l2_clip**2 times the sum of the squared shares, which is 1.
        """
        return sensitivity_of(self.l2_clip, relation)

    def _shares(self, tree: PyTree) -> list[float]:
        """Returns the bound of each leaf divided by l2_clip."""
        num_leaves, sizes = len(jax.tree.leaves(tree)), self.sizes
        if sizes is None:
            return [num_leaves**-0.5] * num_leaves
        groups = groups_of(tree, sizes)
        if len(set(groups)) < num_leaves:
            raise ValueError(
                f"sizes must have one entry for each parameter array; got {len(sizes)} entries for "
                f"{num_leaves} arrays. Make the rule by PerLayerClip.by_size(l2_clip, params), "
                "from the parameters that are trained."
            )
        total = sum(sizes.values())
        return [math.sqrt(sizes[group] / total) for group in groups]


def _size(item: tuple[str, int]) -> tuple[str, int]:
    path, size = item
    return path, _validate.count("a size", size)
