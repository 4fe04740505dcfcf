"""Weights of the examples by parameter, from one array or from one per group of parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dpoptax._pytree import PyTree

# A large model has too many parameters to print.
_MAX_SHOWN = 300


def weights_by_leaf(
    weights: PyTree[Array], structure: Any, mask: Bool[Array, " batch"]
) -> list[Array]:
    """Returns the weights of each leaf of a tree with this structure, in order.

    Args:
        weights: `(batch,)`, or a prefix of the tree with one such array per group of leaves.
        structure: the structure of the parameters.
        mask: `(batch,)`, for the shape.

    Raises:
        ValueError: the weights are no prefix of the tree, or have another shape.
    """
    full = jax.tree.unflatten(structure, range(structure.num_leaves))
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(weights, full))
    except ValueError:
        raise ValueError(
            "weights must be one array of shape (batch,), or a tree prefix of the parameters with "
            f"one such array per group; got the structure {_shown(jax.tree.structure(weights))} "
            f"for parameters {_shown(structure)}. Return a tree like the squared norms that a clip "
            "rule gets."
        ) from None
    for leaf in leaves:
        if jnp.shape(leaf) != mask.shape:
            raise ValueError(
                f"each array of weights must have shape {mask.shape}, one number per example; got "
                f"{jnp.shape(leaf)}. Combine the norms of a group, and keep the axis of examples."
            )
    return leaves


def kept_by_leaf(weights: list[Array], mask: Bool[Array, " batch"]) -> list[Array]:
    """Returns, for each leaf, which examples are real and have a weight that is not zero."""
    # Leaves of one group share one array: a model may have hundreds of leaves and few groups.
    found = {id(leaf): mask & (leaf != 0) for leaf in weights}
    return [found[id(leaf)] for leaf in weights]


def _shown(structure: Any) -> str:
    text = str(structure)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
