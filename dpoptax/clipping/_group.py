"""Clipping by group: one bound for each group of parameters."""

import attrs
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpoptax._pytree import PyTree
from dpoptax.clipping._bound import clip_bound, norms_and_finite, sensitivity_of, weight_within
from dpoptax.clipping._groups import by_path, check_disjoint, groups_of
from dpoptax.per_example._base import global_squared_norms
from dpoptax.relations import Relation
from dpoptax.schedules import ScalarOrSchedule, as_schedule, root_sum_of_squares, validated


@attrs.frozen(init=False, repr=False)
class GroupClip:
    """Clips each group of parameters to a bound of its own.

    The part of the gradient that belongs to group k becomes `g_k * min(1, C_k / ||g_k||)`. So the
    whole contribution of an example has a norm of at most `sqrt(sum of C_k**2)`, which is
    `l2_clip`. All groups get the same noise, which is scaled by `l2_clip`. A group with large
    gradients no longer decides how far the others are scaled down.

    An example with a gradient that is not finite in one group contributes zero in all of them.

    Attributes:
        bounds: the bound of each group, by the path of the group, such as "encoder" or
            "encoder/kernel". A group covers all parameters whose paths begin with its own. The
            constructor also takes a tree prefix of the parameters: nested dicts, lists and the
            like. Each bound may be a `Schedule`.

    Raises:
        ValueError: a bound is not positive, or too small for float32; there are no groups; or a
            group is a part of another one. Later, from `privatize`: the groups do not cover the
            parameters, or a group has no parameter.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = GroupClip({"encoder": 3.0, "head": 4.0})
        >>> rule.l2_clip, rule.sensitivity("replace_one")
        (5.0, 10.0)
        >>> squared_norms = {"encoder": {"w": jnp.array([36.0])}, "head": jnp.array([1.0])}
        >>> rule.weights(squared_norms)
        {'encoder': {'w': Array([0.5], dtype=float32)}, 'head': Array([1.], dtype=float32)}

    Reference: McMahan, Ramage, Talwar and Zhang 2018, arXiv:1710.06963, section 2.3.
    """

    # Sorted pairs: a dict could be changed after the noise was scaled.
    _bounds: tuple[tuple[str, ScalarOrSchedule], ...]

    def __init__(self, bounds: PyTree[ScalarOrSchedule]) -> None:
        checked = {path: _bound(path, value) for path, value in by_path(bounds).items()}
        if not checked:
            raise ValueError(
                "bounds must have a bound for at least one group; got none. Pass for example "
                '{"encoder": 1.0, "head": 0.5}, by the names of the parameters.'
            )
        check_disjoint(checked)
        self.__attrs_init__(tuple(sorted(checked.items())))

    def __repr__(self) -> str:
        """Shows the bounds as they can be passed."""
        return f"GroupClip(bounds={self.bounds})"

    @property
    def bounds(self) -> dict[str, ScalarOrSchedule]:
        """The bound of each group, by its path."""
        return dict(self._bounds)

    @property
    def l2_clip(self) -> ScalarOrSchedule:
        """The bound on the norm of the whole contribution: sqrt(sum of squared bounds)."""
        return root_sum_of_squares([bound for _, bound in self._bounds])

    def weights(
        self, squared_norms: PyTree[Float[Array, " batch"]], step: Int[Array, ""] | int = 0
    ) -> PyTree[Float[Array, " batch"]]:
        """Returns min(1, bound / norm) of each group, as a tree like `squared_norms`.

        Raises:
            ValueError: the groups do not fit the tree.
        """
        leaves, structure = jax.tree.flatten(squared_norms)
        bounds = self.bounds
        groups = groups_of(squared_norms, bounds)
        members: dict[str, list[Array]] = {group: [] for group in bounds}
        for leaf, group in zip(leaves, groups, strict=True):
            members[group].append(leaf)
        _, finite = norms_and_finite(squared_norms)
        weights = {
            group: weight_within(
                as_schedule(bounds[group]).at(step), jnp.sqrt(global_squared_norms(parts)), finite
            )
            for group, parts in members.items()
        }
        return jax.tree.unflatten(structure, [weights[group] for group in groups])

    def sensitivity(self, relation: Relation) -> float:
        """Returns l2_clip, or twice that if one example replaces another.

        The groups are different coordinates, so the squared norms of the parts of an example add
        up, to at most the sum of the squared bounds.
        """
        return sensitivity_of(self.l2_clip, relation)


def _bound(path: str, value: ScalarOrSchedule) -> ScalarOrSchedule:
    return validated(f"the bound of {path}" if path else "the bound", value, clip_bound)
