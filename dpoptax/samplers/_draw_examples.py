"""Draws some examples of a user, others in every step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree


def draw_examples(
    key: PRNGKeyArray, row: tuple[PyTree, Bool[Array, " examples"]], count: int
) -> tuple[PyTree, Bool[Array, " count"]]:
    """Draws `count` examples of one user at random, or all of them if there are not so many.

    Call it in a loss on the rows of `UserPoisson.arrange`, with a key of the loss. So each user
    whom a step draws uses other examples each time, at the cost of `count` examples. The clip
    still acts on the whole user, and the guarantee does not change: which examples a user
    contributes depends on this user alone.

    Args:
        key: one PRNG key, other for each user and each step, such as that of
            `loss_fn(params, example, key)`.
        row: the examples of one user, a tree of arrays with a leading axis, and the mask that is
            True where there is an example.
        count: how many examples to draw, at most the length of the axis.

    Returns:
        A tree with a leading axis of `count`, and its mask.

    Raises:
        TypeError: count is not a whole number.
        ValueError: count is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> row = (jnp.array([1.0, 2.0, 3.0, 0.0]), jnp.array([True, True, True, False]))
        >>> x, mask = draw_examples(jax.random.key(0), row, 2)
        >>> x.shape, mask.tolist(), bool(jnp.all(x > 0))
        ((2,), [True, True], True)

    Reference: Charles et al. 2024, arXiv:2407.07737 (user-level sampling).
    """
    examples, mask = row
    count = _validate.count("count", count)
    if count > len(mask):
        raise ValueError(
            f"count must be at most the number of places in a row, {len(mask)}; got {count}. Use "
            "all examples, or arrange more of them per user."
        )
    # A random order in which those who are missing come last.
    order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0))[:count]
    return jax.tree.map(lambda leaf: leaf[order], examples), mask[order]
