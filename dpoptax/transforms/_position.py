"""Where `privatize` may stand: first, outermost, and outside of functions mapped over devices."""

from typing import Any

import jax
import optax

from dpoptax import _call_stack, _jax_compat
from dpoptax._pytree import PyTree

# What to say about a function of Optax that wraps `privatize`, beyond the general sentence.
_WHY = {
    "partition": "One example moves all parts, and the noise of each covers its own part only. "
    "Per-group clipping is a clip rule, dpoptax.clipping.GroupClip, of one privatize for the whole "
    "tree.",
    "masked": "The leaves that are masked out would be released without noise.",
    "inject_hyperparams": "Clip, noise and size are part of the privacy statement, so they must "
    "not change without notice. For numbers that change with the step pass a "
    "dpoptax.schedules.Schedule.",
    "MultiSteps": "It averages gradients before they are clipped. For a large batch in parts use "
    "per_example_grads(microbatch_size=...).",
    "apply_if_finite": "It decides by the raw gradients whether to release. privatize itself "
    "leaves out examples with gradients that are not finite.",
}
_WHY["multi_transform"] = _WHY["partition"]


def refuse_wrapper() -> None:
    """Raises if a function of Optax other than `chain` calls the running function."""
    name = _call_stack.optax_wrapper()
    if name is not None:
        raise ValueError(
            f"privatize must come first and outermost; got privatize inside optax.{name}. "
            f"{_WHY.get(name, 'It could change gradients before they are clipped.')} Wrap only "
            f"what follows: optax.chain(privatize(...), optax.{name}(...))."
        )


def refuse_follower() -> None:
    """Raises if `optax.chain` has called another transformation before the running one."""
    if _call_stack.follows_in_chain():
        raise ValueError(
            "privatize must come first and outermost; got another transformation before it in "
            "optax.chain, which computes with per-example gradients before they are clipped. Use "
            "optax.chain(privatize(...), other_transformations)."
        )


def refuse_masked(tree: PyTree) -> None:
    """Raises if Optax took leaves out of a tree, as `optax.masked` and `optax.partition` do."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_masked)
    if any(map(_is_masked, leaves)):
        raise ValueError(
            "privatize must come first and outermost, and see the whole tree; got a tree with an "
            "optax.MaskedNode, so privatize is inside optax.masked or optax.partition. The other "
            "leaves would be released without noise, or with noise for a part of the sensitivity. "
            "Use optax.chain(privatize(...), optax.masked(...))."
        )


def refuse_mapped_axes() -> None:
    """Raises inside `jax.shard_map`, `jax.pmap`, and a `jax.vmap` with an axis name."""
    names = _jax_compat.mapped_axes()
    if names:
        raise ValueError(
            "privatize must run outside of jax.shard_map, jax.pmap and jax.vmap(axis_name=...); "
            f"got a function that is mapped over the axes {', '.join(names)}. Each device would "
            "clip only a part of the sum, and add the same noise. Call it under jax.jit on arrays "
            "that are sharded over the devices: JAX then sums over devices between the clip and "
            "the noise."
        )


def refuse_array(name: str, value: Any) -> None:
    """Raises for a number that is a JAX array: the accountant could not read it."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python or NumPy number, or a dpoptax.schedules.Schedule: it is part "
            "of the privacy statement; got a JAX array. If optax.inject_hyperparams made it, use "
            "optax.chain(privatize(...), optax.inject_hyperparams(...)(...)) instead, else pass "
            "float(value)."
        )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)
