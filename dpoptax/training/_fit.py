"""Differentially private training of a model, from a plan to parameters with a privacy report."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax._foreign_names import answer_foreign_names
from dpoptax._jax_compat import constants_inside
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax._validate import described
from dpoptax.per_example._validate_loss import check_loss, check_params, takes_key
from dpoptax.random._keys import describe_key, root_key
from dpoptax.training._audited import Canaries, Started, refuse_same_coins, start_audit
from dpoptax.training._automatic_axes import with_automatic_axes
from dpoptax.training._captured_data import refuse_captured_data
from dpoptax.training._check_arguments import check_microbatch_size, check_plan
from dpoptax.training._check_size import check_size
from dpoptax.training._data import (
    DeviceData,
    HostData,
    as_training_data,
    example_of_batch,
)
from dpoptax.training._diagnostics import warn_if_many
from dpoptax.training._dispatch import make_stepper
from dpoptax.training._loop import run_steps
from dpoptax.training._memory import microbatch_size_for_plan
from dpoptax.training._objective import Objective, split_objective
from dpoptax.training._packed_rows import refuse_packed_rows
from dpoptax.training._progress import Listener
from dpoptax.training._result import FitResult, StopReason, make_result
from dpoptax.training._resume.run import open_run
from dpoptax.training._resume.settings import Checkpoints
from dpoptax.training._start import start_run
from dpoptax.training._train_step import TrainState, TrainStep, make_train_step
from dpoptax.training._validate_optimizer import check_optimizer


@answer_foreign_names
@with_automatic_axes
def fit(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    params: PyTree,
    data: PyTree | DeviceData | HostData,
    *,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray | None = None,
    progress: bool | Listener | Sequence[bool | Listener] = True,
    resume: str | os.PathLike[str] | Checkpoints | None = None,
    microbatch_size: int | Literal["auto"] | None = None,
    diagnostics: bool = False,
    audit: Canaries | None = None,
) -> FitResult:
    """Trains privately: runs all steps of `plan`, with a progress bar that shows epsilon.

    Ctrl-C, SIGTERM and `time_limit` stop the run after the steps that are running. After SIGTERM
    and `time_limit`, the guarantee is that of the steps that ran. After Ctrl-C it is that of all
    planned steps, because you may have looked at the parameters; the report states both. A second
    Ctrl-C acts as usual.

    Args:
        loss_fn: the loss of one example, `loss_fn(params, example)`, or
            `loss_fn(params, example, key)` if it needs randomness; or an `Objective`, such as
            `dpoptax.vi.global_elbo` returns.
        params: the initial parameters. They must not depend on the private data. Their sharding
            is kept.
        data: a tree of arrays with a leading axis of `plan.sampler.num_examples`; all of it moves
            to the device. `HostData(...)` stays on the host. `DeviceData(arrays, take=...)` says
            how to gather a batch, for example over several devices.
        plan: sampler, clip, noise, number of steps and delta.
        optimizer: any Optax optimizer, without `privatize`. It sees private gradients only.
        key: the root key; all other keys are derived from it. By default a new secret key from the
            operating system. The guarantee needs a secret key: pass `jax.random.key(seed)` only in
            examples and tests. Runs with one key share no noise if loss, optimizer, initial
            parameters or data differ, and are equal bit for bit if nothing differs.
        progress: whether to show the bar; or a function that is called with a `Progress` from
            time to time; or `Every(function, steps=100)` for regular calls; or a list of these. A
            function that returns True ends the run, with the guarantee of all planned steps.
        resume: a folder, or `Checkpoints`, where the run is saved. If it holds a run, training
            continues there, bit for bit. If the program or the data changed since, training draws
            new noise. Steps that a crash lost then stay charged: they count in epsilon.
        microbatch_size: computes each batch in parts of this many examples, to save memory;
            "auto" is the largest size that `choose_microbatch_size` finds.
        diagnostics: whether `progress` also shows the loss, the clipped fraction and the median
            gradient norm of the last step. The loss may then return a pair `(loss, metrics)`, with
            metrics as a dict of numbers. All these are not private: they come from the data without
            noise. `dpoptax.mechanisms.norm_histogram` is a private alternative.
        audit: canaries, such as `dpoptax.audit.GradientCanaries(1000)`: additional examples whose
            trace in the run is measured. The plan must count them: `plan.sampler.num_examples` is
            then the number of rows of `data` plus that of canaries.

    Returns:
        A `FitResult` with the parameters and the report of the run, and its `audit`.

    Raises:
        TypeError: the loss has another signature, parameters are not floating-point, or `key` is
            not a typed Threefry or ChaCha key.
        ValueError: the data and the plan differ in size, the loss is not a scalar, a parameter has
            no influence on it, the model has mutable state, or the folder holds another run. All
            before the first step.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = fit(
        ...     lambda mean, x: 0.5 * (mean - x) ** 2, jnp.array(0.0), jnp.ones(200),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False,
        ... )
        >>> result.num_steps, abs(float(result.params) - 1) < 0.3
        (50, True)
    """
    data, root = as_training_data(data), root_key(key)
    started = None
    if audit is not None:
        started = check_and_start(audit, loss_fn, params, data, plan, optimizer, root)
        refuse_same_coins(started.included)
        data = started.audit.data
    state, make_step = prepare(
        loss_fn,
        params,
        data,
        plan=plan,
        optimizer=optimizer,
        root=root,
        microbatch_size=microbatch_size,
        diagnostics=diagnostics,
        started=started,
    )
    stopped: StopReason = "plan"
    nonfinite = None
    with contextlib.ExitStack() as stack:
        run = open_run(resume, plan, params, key, describe_key(key))
        stack.callback(run.close)
        state = run.restore(state, plan)
        # A finished run is only reported: compiling it again could not add a step.
        if int(state.step) < plan.num_steps:
            stepper = make_stepper(
                make_step,
                data,
                sampler=plan.sampler,
                diagnostics=diagnostics,
            )
            stack.callback(stepper.close)
            state = run.begin(state, stepper.fingerprint, plan)
            state, stopped = run_steps(state, stepper, run, plan, progress)
            nonfinite = stepper.nonprivate_nonfinite()
            warn_if_many(nonfinite)
        return make_result(state, plan, run, stopped, nonfinite, started)


def prepare(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    params: PyTree,
    data: DeviceData | HostData,
    *,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    root: PRNGKeyArray,
    microbatch_size: int | Literal["auto"] | None,
    diagnostics: bool,
    started: Started | None = None,
) -> tuple[TrainState, Callable[..., TrainStep]]:
    """Checks the arguments of a run; returns its first state, and what makes its step.

    The stepper adds `take`: host data arrive as the rows of a batch, device data as a whole.
    """
    if started is None:
        check_arguments(data, params, plan, optimizer)
    check_microbatch_size(microbatch_size)
    example = example_of_batch(data, plan.sampler)
    tx, state = start_run(loss_fn, params, data, example, plan, optimizer, root, started)
    has_aux = _check_loss(loss_fn, state, example, data, has_aux=None if diagnostics else False)
    if microbatch_size == "auto":
        sharding = getattr(data.take, "sharding", None)
        microbatch_size = microbatch_size_for_plan(loss_fn, state, example, plan, sharding)
    make_step = functools.partial(
        make_train_step,
        loss_fn,
        tx=tx,
        sampler=plan.sampler,
        microbatch_size=microbatch_size,
        diagnostics=plan.clip if diagnostics else None,
        has_aux=has_aux,
        audit=None if started is None else started.audit,
    )
    return state, make_step


def check_and_start(
    audit: Canaries,
    loss_fn: Callable[..., Any] | Objective,
    params: PyTree,
    data: DeviceData | HostData,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    root: PRNGKeyArray,
) -> Started:
    """Checks the arguments of a run with canaries, and starts its audit."""
    # A class has all names that its instances have.
    if isinstance(audit, type) or not isinstance(audit, Canaries):
        raise TypeError(
            f"audit must be canaries; got {described(audit)}. Pass for example "
            "dpoptax.audit.GradientCanaries(1000)."
        )
    check_arguments(data, params, plan, optimizer, audit.num_canaries)
    return start_audit(audit, loss_fn, params, data, plan, root)


def check_arguments(
    data: DeviceData | HostData,
    params: PyTree,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    num_canaries: int = 0,
) -> None:
    """Refuses data that do not fit the plan, and parameters that cannot be trained."""
    check_plan(plan)
    check_size(len(data), plan.sampler, num_canaries)
    refuse_packed_rows(data, plan.sampler)
    check_params(params)
    check_optimizer(optimizer, params)


def _check_loss(
    loss_fn: Callable[..., Any] | Objective,
    state: TrainState,
    examples: PyTree,
    data: DeviceData | HostData,
    *,
    has_aux: bool | None,
) -> bool:
    """Refuses a loss that would fail, or would train something else, before the first step.

    Returns whether the loss returns a pair `(loss, metrics)`.
    """
    loss_of, point_of = split_objective(loss_fn)
    point = jax.eval_shape(point_of, state.params, state.opt_state)
    key = state.model_key if takes_key(loss_of) else None
    if isinstance(loss_fn, Objective):  # another part of it may train what the loss leaves out
        trace = check_loss(loss_of, point, examples, key, allow_unused=True)
    else:
        trace = check_loss(loss_of, point, examples, key, has_aux=has_aux)
    captured = (*trace.constants, *constants_inside(trace.program.jaxpr))
    refuse_captured_data(captured, data)
    return trace.program.aux_treedef is not None
