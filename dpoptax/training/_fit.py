"""A loss, parameters, data and a plan in; private parameters and their report out."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from dpoptax import _validate, samplers
from dpoptax._plan import Plan
from dpoptax.accounting import Ledger
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example import _validate_loss as validation
from dpoptax.random import split_by_purpose
from dpoptax.random._derive import derive_key
from dpoptax.schedules import slice_of
from dpoptax.training._dispatch import Engine, FromHost, Resident
from dpoptax.training._host_data import HostData, example_of
from dpoptax.training._memory import default_limit, largest_part
from dpoptax.training._multihost import if_any, of_first
from dpoptax.training._objective import Objective
from dpoptax.training._prng import root_key
from dpoptax.training._progress import Reporter, Show
from dpoptax.training._result import FitResult
from dpoptax.training._resume.checkpoints import Checkpoints, identity_of
from dpoptax.training._resume.run import Kept
from dpoptax.training._stopping import Interrupts
from dpoptax.training._train_step import (
    Take,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    takes_key,
)

# How long one dispatch to the device should take, in seconds: long enough that its cost vanishes,
# short enough that the progress bar moves.
SECONDS_PER_DISPATCH = 0.5


def fit(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    params: PyTree,
    data: PyTree | HostData,
    *,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray | int | None = None,
    progress: bool | Show = True,
    resume: str | os.PathLike[str] | Checkpoints | None = None,
    max_seconds: float | None = None,
    microbatch_size: int | Literal["auto"] | None = None,
    take: Take = samplers.take,
    nonprivate_readings: bool = False,
) -> FitResult:
    """Trains privately: all the steps of `plan`, with a bar that shows epsilon spent so far.

    Ctrl-C, a request to terminate and the time limit end it after the steps that are under way,
    with a result and a report of what ran. A second Ctrl-C acts as ever.

    Args:
        loss_fn: the loss of one example, `loss_fn(params, example)`, or
            `loss_fn(params, example, key)` for one that draws; or an `Objective`, such as
            `dpoptax.vi.global_elbo` makes.
        params: the initial parameters; they must not depend on the private data. Their sharding
            is kept.
        data: a tree of arrays with a leading axis of `plan.sampler.num_examples`; it is moved to
            the device whole. `HostData(data)` stays on the host.
        plan: sampler, clip, noise, steps and delta.
        optimizer: any Optax optimizer; it sees private gradients only.
        key: one root key, split by purpose; by default a new one of the operating system's
            entropy. The guarantee rests on its being secret: a whole number, or a key of a small
            seed, is for examples and tests, and the report says so.
        progress: whether to show the bar; or a function, called with a `Progress` now and then.
        resume: a folder, or `Checkpoints`, that keeps the run: if there is one in it, it goes on
            where it was, bit for bit. Where the program or the data changed meanwhile, it draws
            other noise, and what the crash lost stays charged.
        max_seconds: ends training after so much time.
        microbatch_size: works through each batch in parts of so many examples, for less memory;
            "auto" for the largest that `choose_microbatch_size` finds.
        take: `take(data, batch)`, the examples of a batch; one of your own may place them on a
            mesh of devices.
        nonprivate_readings: whether progress also tells loss, share clipped and median norm of the
            last step, which are outside the guarantee; `dpoptax.readings` has what is inside.

    Returns:
        A `FitResult` with the parameters and the report of what ran.

    Raises:
        TypeError: a loss of another signature, parameters that are not floating-point, an
            old-style key.
        ValueError: data of another length than the plan's, a loss that is not a scalar, a model
            with mutable state, a folder with another run. All before the first step.

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
    root, generator = root_key(key)
    keys = split_by_purpose(root)
    if max_seconds is not None:
        max_seconds = _validate.non_negative("max_seconds", max_seconds)
    _check_data(data, plan)
    validation.check_params(params)
    private = plan.privatize(keys.noise_key)
    if isinstance(loss_fn, Objective):
        private = loss_fn.around(private, derive_key(keys.model_key, "objective"))
    tx = optax.chain(private, optimizer)
    state = init_state(
        params,
        tx=tx,
        sampler=plan.sampler,
        sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )
    examples = example_of(data)
    _check_loss(loss_fn, state, examples)
    if microbatch_size == "auto":
        microbatch_size = _fitting(loss_fn, state, examples, plan)
    parts = microbatch_size

    def make_step(take: Take) -> TrainStep:
        return make_train_step(
            loss_fn,
            tx=tx,
            sampler=plan.sampler,
            take=take,
            microbatch_size=parts,
            watch=plan.clip_rule if nonprivate_readings else None,
        )

    kept = None if resume is None else Kept(resume, identity_of(plan, params, key), generator)
    with contextlib.ExitStack() as stack:
        if kept is not None:
            stack.callback(kept.close)
            state = kept.restore(state, plan)
            generator = kept.generator
        done = int(state.step)
        if done == plan.num_steps:
            return _result(state, plan, done, kept, generator, "plan")
        engine: Engine
        if isinstance(data, HostData):
            engine = FromHost(
                make_step, data, take, sampler=plan.sampler, informs=nonprivate_readings
            )
        else:
            engine = Resident(make_step, data, take, informs=nonprivate_readings)
        stack.callback(engine.close)
        if kept is not None:
            state = kept.enter(state, engine.digest(state), plan)
        # Steps that a crash lost and that are repeated alike are released already.
        charged = done if kept is None else max(done, kept.released)
        ledger = _ledger(plan, charged, () if kept is None else kept.lost())
        bar = stack.enter_context(Reporter(progress, ledger, done=done, num_steps=plan.num_steps))
        interrupts = stack.enter_context(Interrupts(max_seconds))
        stride = engine.most() or 1
        while done < plan.num_steps and not if_any(interrupts.reason is not None):
            stride = min(of_first(stride), plan.num_steps - done)
            if done + stride > charged:
                ledger.charge(
                    slice_of(plan.scheduled_noise, charged, done + stride), done + stride - charged
                )
                charged = done + stride
            if kept is not None:
                kept.allow(done + stride)
            began = time.monotonic()
            state, info = engine.advance(state, stride)
            done += stride
            seconds = max(time.monotonic() - began, 1e-6)
            if kept is not None:
                kept.save_if_due(state)
            bar.update(done, info, last=done == plan.num_steps or interrupts.reason is not None)
            if engine.most() is None:
                # The first call compiles, and so says little; doubling keeps a slow step in check.
                within = min(SECONDS_PER_DISPATCH, max(interrupts.seconds_left, 0.0))
                stride = max(1, min(2 * stride, int(stride * within / seconds)))
        if kept is not None:
            kept.save(state)
        return _result(state, plan, done, kept, generator, _why(interrupts, plan, done))


def _ledger(plan: Plan, done: int, lost: Iterable[tuple[int, int]]) -> Ledger:
    """What the run as it stands cost, and what crashes lost."""
    ledger = plan.ledger()
    for first, last in ((0, done), *lost):
        if first < last:
            ledger.charge(slice_of(plan.scheduled_noise, first, last), last - first)
    return ledger


def _result(
    state: TrainState, plan: Plan, done: int, kept: Kept | None, generator: str, stopped: str
) -> FitResult:
    return FitResult(
        params=state.params,
        state=state,
        plan=plan,
        num_steps=done,
        ledger=_ledger(plan, done, () if kept is None else kept.lost(done)),
        generator=generator,
        stopped=stopped,
    )


def _fitting(
    loss_fn: Callable[..., Any] | Objective, state: TrainState, examples: PyTree, plan: Plan
) -> int | None:
    """The microbatch for a plan, from shapes alone."""
    example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), examples)
    point = state.params
    if isinstance(loss_fn, Objective):
        point = jax.eval_shape(loss_fn.point, state.params, state.opt_state)
        loss_fn = loss_fn.loss
    assert plan.sampler.max_batch_size is not None

    def released(grads: PerExampleGrads) -> PyTree:
        return plan.mechanism.release(
            jax.random.key(0), grads, plan.clip_rule, plan.scheduled_noise, 0
        )

    return largest_part(
        loss_fn, point, example, released, plan.sampler.max_batch_size, default_limit()
    )


def _why(interrupts: Interrupts, plan: Plan, done: int) -> str:
    if done == plan.num_steps:
        return "plan"
    return interrupts.reason or "another process"


def _check_data(data: PyTree | HostData, plan: Plan) -> None:
    num_examples = len(data) if isinstance(data, HostData) else _validate.batch_size("data", data)
    if num_examples != plan.sampler.num_examples:
        raise ValueError(
            f"the plan is for {plan.sampler.num_examples} examples and data has {num_examples}: "
            "its epsilon would not be this run's. Make the sampler with the size of the data."
        )


def _check_loss(
    loss_fn: Callable[..., Any] | Objective, state: TrainState, examples: PyTree
) -> None:
    """Refuses what would fail, or would train something else, before the first step."""
    if isinstance(loss_fn, Objective):
        point = jax.eval_shape(loss_fn.point, state.params, state.opt_state)
        validation.check_loss(loss_fn.loss, point, examples, state.model_key)
    else:
        key = state.model_key if takes_key(loss_fn) else None
        validation.check_loss(loss_fn, state.params, examples, key)
