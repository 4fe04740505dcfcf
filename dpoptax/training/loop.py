"""A loss, parameters, data and a plan in; private parameters and their report out."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from dpoptax import _checks
from dpoptax.accounting import Ledger, Report
from dpoptax.per_example import validation
from dpoptax.plan import Plan
from dpoptax.random import split_by_purpose
from dpoptax.random.domains import in_domain
from dpoptax.random.keys import root_of
from dpoptax.schedules import slice_of
from dpoptax.training.objective import Objective
from dpoptax.training.progress import ProgressBar
from dpoptax.training.step import TrainState, init_state, make_train_step, takes_key

# How long one dispatch to the device should take, in seconds: long enough that its cost vanishes,
# short enough that the progress bar moves.
SECONDS_PER_DISPATCH = 0.5


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What training leaves behind.

    Attributes:
        params: the private parameters.
        state: everything that a further step would need; holds keys, so it must not be released.
        plan: what was planned.
        ledger: what was charged, each step before it ran.
        generator: where the random numbers came from.
    """

    params: PyTree
    state: TrainState
    plan: Plan
    ledger: Ledger
    generator: str

    @property
    def num_steps(self) -> int:
        """How many steps ran."""
        return self.ledger.num_steps

    def epsilon(self, delta: float | None = None) -> float:
        """Returns what the steps that ran cost, under the relation of the sampler."""
        return self.ledger.epsilon(delta)

    def report(self) -> Report:
        """Returns the privacy statement of the steps that ran."""
        report = self.plan.report(self.num_steps)
        return dataclasses.replace(report, generator=self.generator)


def fit(
    loss_fn: Callable[..., Float[Array, ""]] | Objective,
    params: PyTree,
    data: PyTree,
    *,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray | int | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains privately: all the steps of `plan`, with a bar that shows epsilon spent so far.

    Args:
        loss_fn: the loss of one example, `loss_fn(params, example)`, or
            `loss_fn(params, example, key)` for one that draws; or an `Objective`, such as
            `dpoptax.vi.global_elbo` makes.
        params: the initial parameters; they must not depend on the private data.
        data: a tree of arrays with a leading axis of `plan.sampler.num_examples`.
        plan: sampler, clip, noise, steps and delta.
        optimizer: any Optax optimizer; it sees private gradients only.
        key: one root key, split by purpose; by default a new one of the operating system's
            entropy. The guarantee rests on its being secret: a whole number, or a key of a small
            seed, is for examples and tests, and the report says so.
        progress: whether to show the bar.

    Returns:
        A `FitResult` with the parameters and the report of what ran.

    Raises:
        TypeError: a loss of another signature, parameters that are not floating-point, an
            old-style key.
        ValueError: data of another length than the plan's, a loss that is not a scalar, a model
            with mutable state. All before the first step.

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
    root, generator = root_of(key)
    keys = split_by_purpose(root)
    _check_data(data, plan)
    validation.check_params(params)
    private = plan.privatize(keys.noise_key)
    if isinstance(loss_fn, Objective):
        private = loss_fn.around(private, in_domain(keys.model_key, "objective"))
    tx = optax.chain(private, optimizer)
    step = make_train_step(loss_fn, tx=tx, sampler=plan.sampler)
    state = init_state(
        params,
        tx=tx,
        sampler=plan.sampler,
        sampling_key=keys.sampling_key,
        model_key=keys.model_key,
    )
    _check_loss(loss_fn, state, data)
    data = jax.tree.map(jnp.asarray, data)

    @jax.jit
    def advance(state: TrainState, data: PyTree, num_steps: Int[Array, ""]) -> TrainState:
        return jax.lax.fori_loop(0, num_steps, lambda _, state: step(state, data)[0], state)

    ledger = plan.ledger()
    done, stride = 0, 1
    with ProgressBar(plan, enabled=progress) as bar:
        while done < plan.num_steps:
            stride = min(stride, plan.num_steps - done)
            ledger.charge(slice_of(plan.scheduled_noise, done, done + stride), stride)
            began = time.monotonic()
            state = jax.block_until_ready(advance(state, data, jnp.asarray(stride, jnp.int32)))
            done += stride
            bar.update(done)
            # The first call compiles, and so says little; doubling keeps a slow step in check.
            seconds = max(time.monotonic() - began, 1e-6)
            stride = max(1, min(2 * stride, int(stride * SECONDS_PER_DISPATCH / seconds)))
    return FitResult(state.params, state, plan, ledger, generator)


def _check_data(data: PyTree, plan: Plan) -> None:
    num_examples = _checks.batch_size("data", data)
    if num_examples != plan.sampler.num_examples:
        raise ValueError(
            f"the plan is for {plan.sampler.num_examples} examples and data has {num_examples}: "
            "its epsilon would not be this run's. Make the sampler with the size of the data."
        )


def _check_loss(loss_fn: Callable[..., Any] | Objective, state: TrainState, data: PyTree) -> None:
    """Refuses what would fail, or would train something else, before the first step."""
    if isinstance(loss_fn, Objective):
        point = jax.eval_shape(loss_fn.point, state.params, state.opt_state)
        validation.check_loss(loss_fn.loss, point, data, state.model_key)
    else:
        key = state.model_key if takes_key(loss_fn) else None
        validation.check_loss(loss_fn, state.params, data, key)
