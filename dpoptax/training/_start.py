"""The start of a run: the transformation and the state before the first step, made from a plan."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import PRNGKeyArray

from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.per_example._validate_loss import takes_key
from dpoptax.random import derive_key, split_by_purpose
from dpoptax.training._audited import Started, audited
from dpoptax.training._captured_data import refuse_captured_data
from dpoptax.training._data import DeviceData, HostData
from dpoptax.training._noise_binding import bind_key
from dpoptax.training._objective import Objective, split_objective
from dpoptax.training._program_digest import start_digest
from dpoptax.training._train_step import TrainState, init_state
from dpoptax.transforms import chain
from dpoptax.transforms._private import bind, takes_gradients_at_params


def start_run(
    loss_fn: Callable[..., Any] | Objective | None,
    params: PyTree,
    data: DeviceData | HostData,
    example: PyTree,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    root: PRNGKeyArray,
    started: Started | None = None,
) -> tuple[optax.GradientTransformation, TrainState]:
    """Returns the whole transformation and the state before the first step.

    Args:
        loss_fn: of one example, or an `Objective`; None if the caller computes the gradients.
        params: the initial parameters.
        data: of the run.
        example: shapes of an example as `take` returns it, with a leading axis of one.
        plan: of the run.
        optimizer: follows the private transformation.
        root: the root key.
        started: an audit of the run.
    """
    keys = split_by_purpose(root)
    # Some optimizers act before the clip.
    private = plan.privatize(keys.noise_key)
    if started is not None:
        private = audited(private, started)
    private, optimizer = bind(private, optimizer)
    if not takes_gradients_at_params(private) and not _is_plain(loss_fn):
        raise ValueError(
            "disk takes the gradients at another point than the parameters, so it needs a plain "
            f"loss; got {'no loss' if loss_fn is None else type(loss_fn).__name__}. Pass a loss of "
            "one example, or use dpoptax.transforms.low_pass, which filters in the same way."
        )
    if isinstance(loss_fn, Objective):
        # After the noise, and before the optimizer: what an objective adds needs no privacy.
        private = loss_fn.wrap(private, derive_key(keys.model_key, "objective"))
    tx = chain(private, optimizer)
    program = start_digest(loss_fn, tx)
    opt_state = jax.eval_shape(tx.init, params)
    point, loss_key = params, None
    if loss_fn is not None:
        loss_of, point_of = split_objective(loss_fn)
        point = jax.eval_shape(point_of, params, opt_state)
        loss_key = keys.model_key if takes_key(loss_of) else None
    digest, _ = program(point, example, loss_key, params, opt_state)
    refuse_captured_data(program.take_constants_of_update(), data, by_optimizer=True)
    # Two runs that share their batches cost more together than the sum of their epsilons. So the
    # batches are bound too: to what is known before the first step, for any kind of data.
    known: list[Any] = [params, data.first_example()]
    if started is not None:
        known += [started.included, started.audit.canaries]
    sampling_key = bind_key(keys.sampling_key, tuple(known), digest)
    state = init_state(
        params, tx=tx, sampler=plan.sampler, sampling_key=sampling_key, model_key=keys.model_key
    )
    return tx, state


def _is_plain(loss_fn: Callable[..., Any] | Objective | None) -> bool:
    return loss_fn is not None and not isinstance(loss_fn, Objective)
