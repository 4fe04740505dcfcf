"""From a trainer of Tunix to a private one."""

import os
from typing import Any

from jaxtyping import PRNGKeyArray

from dpoptax._plan import Plan
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.tunix._settings import check_settings


def make_private(
    trainer: Any,
    plan: Plan,
    *,
    key: PRNGKeyArray | None = None,
    microbatch_size: int | None = None,
    resume: str | os.PathLike[str] | Checkpoints | None = None,
) -> Any:
    """Returns a private trainer with the model, optimizer and settings of a `PeftTrainer`.

    Its `train(data, eval_ds)` takes the training data as one tree of arrays with a row per example,
    such as a `TrainingInput`, in place of batches. It makes all steps of the plan. Each batch is
    drawn by the sampler of the plan, and each example counts by the clipped gradient of the loss of
    a batch of one. `gen_model_input_fn` and the loss get such batches of one too. The optimizer
    sees the private gradients only. Evaluation, hooks, metrics and checkpoints are those of the
    trainer. Loss and gradient norm of the training data are not private: they are not logged.

    Args:
        trainer: a `tunix.PeftTrainer`. Do not use it again.
        plan: sampler, clip, noise, number of steps and delta.
        key: as in `dpoptax.training.fit`.
        microbatch_size: as in `dpoptax.training.fit`.
        resume: as in `dpoptax.training.fit`. Checkpoints of Tunix hold neither the keys nor the
            account of a run, so a trainer that saves them needs this folder too.

    Returns:
        A `PeftTrainer` that also has `report()` and `epsilon()`.

    Raises:
        ImportError: Tunix is not installed.
        TypeError: `trainer` is no `PeftTrainer`, or a subclass. From `train`: the data are batches.
        ValueError: the trainer accumulates gradients, has made steps that the folder of the run
            does not know, takes its batches from data hooks, saves checkpoints while `resume` is
            missing, or wants more steps than the plan has.

    Example:
        >>> trainer = PeftTrainer(model, optax.adamw(1e-3), config)  # doctest: +SKIP
        >>> private = make_private(trainer, plan)  # doctest: +SKIP
        >>> private.train(data)  # doctest: +SKIP
        >>> print(private.report())  # doctest: +SKIP
    """
    try:
        from dpoptax.tunix import _trainer
    except ImportError as error:
        raise ImportError("dpoptax.tunix needs Tunix: pip install 'dpoptax[tunix]'.") from error
    _trainer.check_type(trainer)
    check_settings(trainer, plan)
    if trainer.config.checkpoint_root_directory is not None and resume is None:
        raise ValueError(
            "expected a folder for the run beside checkpoint_root_directory, since checkpoints of "
            "Tunix hold neither the keys nor the account of a private run; got resume=None. Pass "
            "make_private(..., resume=folder), with another folder than that of Tunix."
        )
    if trainer.train_steps and resume is None:
        raise ValueError(
            f"expected a trainer before its first step; got one after {trainer.train_steps}, which "
            "the plan does not cover. Make a new trainer."
        )
    return _trainer.PrivateTrainer(
        trainer, plan, key=key, microbatch_size=microbatch_size, resume=resume
    )
