"""Check of a clip rule of the user's own: its weights, at a few norms, must keep the three laws."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpoptax._pytree import PyTree
from dpoptax.per_example._leaf_weights import weights_by_leaf
from dpoptax.schedules import as_schedule

# Norms around the bound, and far from it on both sides.
_NORMS = (0.0, 0.01, 0.5, 0.99, 1.01, 2.0, 30.0, 1e4)
# Float32 rounds norms and weights. A rule that does not clip is far beyond this.
_TOLERANCE = 1e-3
# Trees of parameters that are made up, for a rule that is checked before there are parameters.
_MADE_UP = ({"all": 0}, {"first": 0, "second": 0, "third": 0})


def check_rule(rule: Any) -> None:
    """Raises for a rule that breaks a law at some made-up norms.

    This finds mistakes and proves nothing. A rule that asks for the norms of certain parameters
    cannot be tried here. `check_rule_for` tries it where there are parameters.

    Raises:
        ValueError: weights scale a gradient to more than the bound, are not zero for a norm that is
            not finite, depend on other examples, or have another shape.
    """
    for tree in _MADE_UP:
        try:
            # What the rule raises, of whatever kind, for a tree that it does not know.
            _weights(rule, tree, np.ones((1, len(tree)), np.float32))
        except _WrongShapeError as error:
            raise ValueError(str(error)) from None
        except Exception:
            continue
        _check(rule, tree)


def check_fits(rule: Any, params: PyTree) -> None:
    """Raises if a rule does not fit these parameters, or breaks a law for them.

    What the rule itself raises is not caught.

    Raises:
        ValueError: see `check_rule`; or the groups of the rule are not those of the parameters.
    """
    if not jax.tree.leaves(params):
        return
    if not is_ours(rule):
        _check(rule, params)
        return
    norm = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.eval_shape(rule.weights, jax.tree.map(lambda _: norm, params))


def is_ours(rule: Any) -> bool:
    """Whether a rule is one of this package, whose laws are proven and tested."""
    return type(rule).__module__.startswith(f"{__package__}.")


class _WrongShapeError(ValueError):
    """Weights that are neither one array nor a prefix."""


def _check(rule: Any, tree: PyTree) -> None:
    bound, name = float(as_schedule(rule.l2_clip).values[0]), type(rule).__name__
    norms = _norms(bound, len(jax.tree.leaves(tree)))
    together = _weights(rule, tree, norms)
    alone = np.concatenate([_weights(rule, tree, norms[i : i + 1]) for i in range(len(norms))])
    finite = np.isfinite(norms).all(axis=1)
    if np.any(alone[~finite] != 0):
        raise ValueError(
            "a clip rule must give weight 0 to a norm that is not finite, and to all groups of "
            f"that example; got another weight from {name}. Return jnp.where(jnp.isfinite("
            "squared), weight, 0.0), where squared is the sum over all parameters."
        )
    terms = np.where(np.isfinite(alone), alone, 0)[finite] * norms[finite]
    contributions = np.sqrt(np.sum(terms**2, axis=1))
    if not np.all(alone >= 0) or np.any(contributions > (1 + _TOLERANCE) * bound):
        raise ValueError(
            "a clip rule must scale the whole gradient of an example to at most l2_clip, by "
            f"weights of zero or more; got weights from {name} that do not. squared_norms are "
            "squares: take their root. Bounds C_k of groups give l2_clip = sqrt(sum of C_k**2)."
        )
    if not np.allclose(together, alone, rtol=_TOLERANCE, atol=1e-6):
        raise ValueError(
            f"the weight of an example must depend on its own norms only; got a rule {name} whose "
            "weights depend on the other examples of the batch. Use a public number in their place."
        )


def _norms(bound: float, num_leaves: int) -> np.ndarray:
    """Returns made-up norms, a row per example and a column per parameter."""
    scale = bound if 0 < bound < math.inf else 1.0
    sizes = np.array([scale * norm for norm in _NORMS], np.float32)
    rows = [np.outer(sizes / math.sqrt(num_leaves), np.ones(num_leaves, np.float32))]
    if num_leaves > 1:
        # All of a gradient in one parameter, and one parameter that is not finite.
        single = np.zeros((num_leaves, num_leaves), np.float32)
        np.fill_diagonal(single, 3 * scale)
        rows += [np.full((1, num_leaves), 3 * scale, np.float32), single[[0, -1]]]
    for bad in (math.inf, math.nan):
        for column in {0, num_leaves - 1}:
            rows.append(np.full((1, num_leaves), scale / 2, np.float32))
            rows[-1][0, column] = bad
    return np.concatenate(rows).astype(np.float32)


def _weights(rule: Any, tree: PyTree, norms: np.ndarray) -> np.ndarray:
    """Returns the weights of a rule, a row per example and a column per parameter."""
    structure = jax.tree.structure(tree)
    # Overflow to infinity is meant: the square of a large norm is not finite either. The rule also
    # runs where the caller is being traced.
    with np.errstate(over="ignore"), jax.ensure_compile_time_eval():
        squares = [jnp.asarray(column**2) for column in norms.T]
        weights = rule.weights(jax.tree.unflatten(structure, squares), 0)
    try:
        leaves = weights_by_leaf(weights, structure, jnp.ones(len(norms), bool))
    except ValueError as error:
        raise _WrongShapeError(f"{type(rule).__name__}: {error}") from None
    return np.stack([np.asarray(leaf) for leaf in leaves], axis=1)
