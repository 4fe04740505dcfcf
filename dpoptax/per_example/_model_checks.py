"""Checks of models: what they keep or draw must not be shared by the examples of a batch.

Flax, Haiku and Equinox are not imported here, because that takes long. Who has not imported them
has no model of theirs.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from dpoptax import _jax_compat
from dpoptax._pytree import PyTree
from dpoptax.per_example._tracing.influence import Influence

NO_STATE = (
    "Per-example gradients need a model without mutable state: batch statistics mix examples, "
    "and updating them from data is not private. Use a normalization within the example "
    "(GroupNorm, LayerNorm) instead of BatchNorm, and differentiate only the trainable parameters"
)
USE_HELPER = "loss_fn, params = dpoptax.nnx.loss_fn(model, loss)"
# With running averages these functions compute no sums.
_BATCH_NORMS = tuple(
    (file, "BatchNorm.__call__")
    for file in (
        "flax/linen/normalization.py",
        "flax/nnx/nn/normalization.py",
        "haiku/_src/batch_norm.py",
        "equinox/nn/_batch_norm.py",
    )
)
# The functions of Flax that derive a key from a stream of random numbers.
_STREAMS = (
    ("flax/nnx/rnglib.py", "RngStream.__call__"),
    ("flax/core/scope.py", "Scope.make_rng"),
)


def refuse_state(params: PyTree) -> None:
    """Raises if a collection or Variable among the parameters is not trained by gradients."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = ", ".join(repr(name) for name in params if name != "params")
        raise ValueError(
            f"params holds the collection(s) {others} in addition to 'params'. {NO_STATE}: "
            "pass variables['params'], and keep the rest as constants of the loss."
        )
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        if is_variable(node) and not isinstance(node, sys.modules["flax.nnx"].Param):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} is a {type(node).__name__}, not a parameter. "
                f"{NO_STATE}: {USE_HELPER}, or graphdef, params, rest = nnx.split(model, "
                "nnx.Param, ...)."
            )


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is an NNX Variable."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def state_error(error: Exception) -> ValueError | None:
    """Returns what to raise if Flax refused that a module changes its state; else None."""
    errors = sys.modules.get("flax.errors")
    if errors is None or not isinstance(
        error, (errors.ModifyScopeVariableError, errors.TraceContextError)
    ):
        return None
    found = _changed_variable(error)
    if found is None:
        return ValueError(f"loss_fn changes the state of a Flax module while it runs. {NO_STATE}.")
    path, variable = found
    return ValueError(
        f"loss_fn changes the state of a Flax module while it runs: {path}, of type "
        f"{type(variable).__name__}. {remedy(variable)}"
    )


def remedy(variable: Any) -> str:
    """What to do about an NNX Variable that a loss changes."""
    if isinstance(variable, sys.modules["flax.nnx"].RngState):
        return (
            "It belongs to a stream of random numbers, such as that of Dropout. Every example "
            f"needs numbers of its own: use {USE_HELPER}, where loss(model, example) is the loss "
            "of one example. Or turn the randomness off with model.eval()."
        )
    return f"{NO_STATE}. To keep statistics of public data fixed, call model.eval()."


def check_layers(jaxpr: Any, num_constants: int) -> None:
    """Raises if the loss normalizes over the batch, or draws the same numbers for all examples.

    The equations of a jaxpr know which functions made them. So this also sees a layer whose update
    of its state is dropped, which Flax does not refuse. The first `num_constants` inputs of the
    jaxpr are the same for all examples and steps.
    """
    if not {"flax", "haiku", "equinox"} & sys.modules.keys():
        return
    # By equation, whether any of its inputs depends on an input of the loss.
    draws: dict[int, tuple[Any, bool]] = {}

    def watch(eqn: Any, found: list[int]) -> None:
        if eqn.primitive.name == "random_fold_in" and _was_made_by(eqn, _STREAMS):
            _, before = draws.get(id(eqn), (eqn, False))
            draws[id(eqn)] = eqn, before or any(found)
        elif eqn.primitive.name == "reduce_sum" and _was_made_by(eqn, _BATCH_NORMS):
            raise ValueError(
                f"loss_fn normalizes by statistics of the batch, in BatchNorm{_place(eqn)}. Here "
                "every batch is one example, so the model that is trained is not the model that is "
                f"used later. {NO_STATE}. To keep the statistics of a pretrained model fixed, use "
                "running averages: use_running_average=True in Linen, model.eval() in NNX."
            )

    variables, _ = _jax_compat.inputs_of(jaxpr)
    entering = [int(number >= num_constants) for number in range(len(variables))]
    influence = Influence(by_derivative=False, watch=watch)
    influence.outputs(jaxpr, entering)
    for eqn, varies in draws.values():
        if not varies and influence.is_complete:
            raise ValueError(
                f"loss_fn draws random numbers from a constant key{_place(eqn)}, so every example "
                "and every step gets the same ones, such as one mask of Dropout. Expected a loss "
                "that takes a key, loss_fn(params, example, key). For an NNX model use "
                f"{USE_HELPER}; for Linen pass rngs={{'dropout': key}} to model.apply. Or turn the "
                "randomness off."
            )


def _changed_variable(error: Exception) -> tuple[str, Any] | None:
    """The Variable that NNX refused to change, and its path in the model."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return None
    frames = list(_local_values(error))
    changed = [value for values in frames for value in values if isinstance(value, nnx.Variable)]
    if not changed:
        return None
    # The outermost module that holds it has the longest path.
    for values in frames:
        for module in values:
            for path, node in nnx.iter_graph(module) if isinstance(module, nnx.Module) else ():
                if node is changed[-1]:
                    return ".".join(map(str, path)), changed[-1]
    return "a Variable", changed[-1]


def _local_values(error: Exception) -> Iterator[list[Any]]:
    """The local variables of the frames that an error went through, outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield list(trace.tb_frame.f_locals.values())
        trace = trace.tb_next


def _frames(eqn: Any) -> list[tuple[str, str, int]]:
    """File, function and line of the calls that made an equation, innermost first."""
    trace = eqn.source_info.traceback
    frames = () if trace is None else trace.frames
    return [
        (frame.file_name.replace("\\", "/"), frame.function_name, frame.line_num)
        for frame in frames
    ]


def _was_made_by(eqn: Any, functions: Any) -> bool:
    return any(
        name == function and file.endswith(end)
        for file, name, _ in _frames(eqn)
        for end, function in functions
    )


def _place(eqn: Any) -> str:
    """The user's line, as " at file:line"."""
    for file, _, line in _frames(eqn):
        if "/site-packages/" not in file and "/dpoptax/per_example/" not in file:
            return f" at {file}:{line}"
    return ""
