"""Settings of a Tunix trainer under which its steps would not be those of the plan."""

from typing import Any

from dpoptax._plan import Plan


def check_settings(trainer: Any, plan: Plan) -> None:
    """Raises for such a setting."""
    config = trainer.config
    if config.get_with_default("gradient_accumulation_steps", 1) != 1:
        raise ValueError(
            "expected a trainer without gradient_accumulation_steps, which averages gradients "
            f"before they are clipped; got {config.gradient_accumulation_steps}. For a larger "
            "batch, plan a larger expected_batch_size. To save memory, use make_private(..., "
            "microbatch_size=...)."
        )
    if trainer.data_hooks is not None:
        raise ValueError(
            "expected a trainer without data hooks, since the sampler of the plan draws the "
            "batches; got hooks that load them. Pass all training data to train, as arrays."
        )
    if config.max_steps is not None and config.max_steps > plan.num_steps:
        raise ValueError(
            f"expected max_steps of at most {plan.num_steps}, the number of steps of the plan; got "
            f"{config.max_steps}. Leave it out, or plan more steps."
        )
