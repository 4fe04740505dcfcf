"""A Keras optimizer as an Optax transformation, and the settings that do not fit private steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpoptax._pytree import PyTree


def as_transformation(optimizer: Any, names: list[str]) -> optax.GradientTransformation:
    """Returns the steps of a built Keras optimizer on private gradients.

    The state is the list of its variables. Constraints of the weights and moving averages belong to
    the step.
    """

    def init(params: PyTree) -> list[Any]:
        del params
        return [jnp.copy(variable.value) for variable in optimizer.variables]

    def update(
        updates: PyTree, state: list[Any], params: PyTree | None = None
    ) -> tuple[PyTree, list[Any]]:
        assert params is not None
        after, state = optimizer.stateless_apply(
            state, [updates[name] for name in names], [params[name] for name in names]
        )
        new = dict(zip(names, after, strict=True))
        return jax.tree.map(lambda new, old: new - old, new, params), state

    return optax.GradientTransformation(init, update)


def check_optimizer(optimizer: Any) -> None:
    """Raises for a setting that would not do what it says."""
    import keras

    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor:
        raise ValueError(
            "expected an optimizer without loss scaling; got one with it. It would scale the "
            "gradients before they are clipped. Use the policy mixed_bfloat16 in place of "
            "mixed_float16, or compile with auto_scale_loss=False and without loss_scale_factor."
        )
    if optimizer.gradient_accumulation_steps:
        raise ValueError(
            "expected an optimizer without gradient_accumulation_steps, which averages gradients "
            f"over steps; got {optimizer.gradient_accumulation_steps}. Each example must be "
            "clipped alone, and the noise is added once per batch. For a larger batch, plan a "
            "larger expected_batch_size. To save memory, use microbatch_size= of make_private."
        )
