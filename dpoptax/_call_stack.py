"""Where Optax calls us from, read from the call stack.

A transformation of Optax is a pair of functions that knows nothing about its neighbours. But they
decide whether a release is private: what another transformation does to per-example gradients is
done before the clip. Only the call stack shows this. It does so at the time of tracing, before
anything is computed.
"""

import inspect
from collections.abc import Iterator
from types import FrameType

import jax

# They pass gradients on as they are. `lookahead` needs special parameters, so it must be
# outermost.
_TRANSPARENT = {"chain", "named_chain", "with_extra_args_support", "lookahead"}
# Code between a caller and the function that it called.
_GLUE = {"jax", "jaxlib", "contextlib", "functools", "jaxtyping", "beartype", ""}
_TREE_MAPS = {
    function.__code__
    for function in (
        jax.tree.map,
        jax.tree.map_with_path,
        jax.tree_util.tree_map,
        jax.tree_util.tree_map_with_path,
    )
}
# Libraries that take arguments apart, and put them together again unchanged, around `jax.jit`.
_REBUILDS_ARGUMENTS = {"dpoptax", "equinox", "flax", "haiku"}


def optax_wrapper() -> str | None:
    """Returns the outermost function of Optax that wraps the running transformation, or None."""
    names = [_name(frame) for frame in _frames() if _package(frame) == "optax"]
    return next((name for name in reversed(names) if name not in _TRANSPARENT), None)


def follows_in_chain() -> bool:
    """Whether the running transformation is in an `optax.chain`, and not the first of it."""
    for frame in _frames():
        if _package(frame) == "optax" and _name(frame) in ("chain", "named_chain"):
            # The states of the transformations that have run already. A version of Optax with
            # another name for it only costs this check.
            before = frame.f_locals.get("new_state")
            if isinstance(before, list | dict) and before:
                return True
    return False


def optax_caller() -> str | None:
    """Returns the function of Optax that called JAX, if Optax did; else None."""
    name = None
    for frame in _frames():
        package = _package(frame)
        if package == "optax":
            if _name(frame) in _TRANSPARENT:
                break
            name = _name(frame)
        elif package not in _GLUE and frame.f_globals.get("__name__") not in _OURS:
            break
    return name


def maps_over_leaves() -> bool:
    """Whether code outside of JAX called `jax.tree.map`, and not for example `jax.jit`."""
    called = None
    for frame in _frames():
        package = _package(frame)
        if package == "jax":
            called = frame
        elif package not in _GLUE and frame.f_globals.get("__name__") not in _OURS:
            return (
                called is not None
                and called.f_code in _TREE_MAPS
                and package not in _REBUILDS_ARGUMENTS
            )
    return False


# Modules whose frames lie between JAX and this one.
_OURS = {__name__, "dpoptax.per_example._base"}


def _frames() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _name(frame: FrameType) -> str:
    return frame.f_code.co_qualname.partition(".")[0]
