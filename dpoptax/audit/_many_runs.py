"""Audits of many runs: one canary, in or out by a separate coin in each run of a small model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax._attacks import Audit
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.random import split_by_purpose
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.training._audited import (
    Canaries,
    RunAudit,
    Started,
    audit_of_scores,
    audit_state,
    audited,
    refuse_same_coins,
)
from dpoptax.training._data import DeviceData, HostData, as_training_data
from dpoptax.training._fit import check_and_start
from dpoptax.training._objective import Objective
from dpoptax.training._train_step import init_state, make_train_step
from dpoptax.transforms import chain
from dpoptax.transforms._private import bind


def audit_many_runs(
    loss_fn: Any,
    params: PyTree,
    data: PyTree | DeviceData,
    *,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    canary: Canaries,
    num_runs: int,
    key: PRNGKeyArray,
    runs_at_once: int = 16,
) -> Audit:
    """Trains a small model many times, each time with the canary in or out by a fair coin.

    The runs are independent, and so are their scores. So the lower bound needs no assumption about
    canaries that share a run, and the exact binomial intervals of many runs apply. All runs are one
    compiled program. Its cost is that of `num_runs` trainings: for a model that trains in less than
    a second, a thousand runs take minutes.

    Args:
        loss_fn: the loss of one example, as for `fit`. It may not be an `Objective`.
        params: the initial parameters, the same in all runs.
        data: as for `fit`, on the device.
        plan: as for `fit`; it counts one canary more than data has rows.
        optimizer: as for `fit`.
        canary: `GradientCanaries(1)`, or `InputCanaries` with one row.
        num_runs: how many runs; a thousand or more for a bound that is close to epsilon.
        key: a typed PRNG key. These runs are a test: nobody publishes their parameters.
        runs_at_once: how many runs are vectorized. More take more memory.

    Returns:
        An `Audit` with one score per run, which are independent.

    Raises:
        TypeError: an argument has the wrong type; the data are on the host, or the loss is an
            `Objective`.
        ValueError: there is more than one canary, or the plan does not fit, as for `fit`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(20 + 1, 7),  # 20 rows, one canary
        ...     clip=1.0, noise_multiplier=1.0, num_steps=5, delta=1e-2,
        ... )
        >>> audit = audit_many_runs(
        ...     lambda w, x: jnp.sum((w - x) ** 2), jnp.zeros(3), jnp.ones((20, 3)), plan=plan,
        ...     optimizer=optax.sgd(0.1), canary=dpoptax.audit.GradientCanaries(1), num_runs=40,
        ...     key=jax.random.key(0),
        ... )
        >>> len(audit.in_scores) + len(audit.out_scores), audit.independent
        (40, True)
    """
    num_runs = _validate.count("num_runs", num_runs)
    at_once = _validate.count("runs_at_once", runs_at_once)
    source = as_training_data(data)
    _refuse_unsuitable(loss_fn, source, canary)
    canary_key, coin_key, run_key = split_by_purpose(allowed_key("key", key))
    # Checked and drawn once: all runs have the same canary.
    started = check_and_start(canary, loss_fn, params, source, plan, optimizer, canary_key)
    coins = jax.random.bernoulli(coin_key, shape=(num_runs, 1))
    refuse_same_coins(coins)
    one = one_run(loss_fn, params, plan, optimizer, started.audit)
    keys = jax.random.split(run_key, num_runs)
    scores = np.asarray(
        jax.jit(lambda runs: jax.lax.map(one, runs, batch_size=at_once))((keys, coins))
    )
    return audit_of_scores(
        scores,
        coins,
        plan=plan,
        attack=f"{started.audit.attack}, {num_runs:,} runs",
        independent=True,
    )


def one_run(
    loss_fn: Any,
    params: PyTree,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    audit: RunAudit,
) -> Any:
    """Returns a function from a key and the coins of the canaries to the scores of a run."""
    data: Any = audit.data
    arrays = jax.tree.map(jnp.asarray, data.arrays)

    def one(run: tuple[PRNGKeyArray, Array]) -> Array:
        key, coins = run
        keys = split_by_purpose(key)
        private = audited(plan.privatize(keys.noise_key), Started(audit, coins))
        tx = chain(*bind(private, optimizer))
        state = init_state(
            params,
            tx=tx,
            sampler=plan.sampler,
            sampling_key=keys.sampling_key,
            model_key=keys.model_key,
        )
        step = make_train_step(loss_fn, tx=tx, sampler=plan.sampler, take=data.take, audit=audit)
        state = jax.lax.fori_loop(0, plan.num_steps, lambda _, state: step(state, arrays)[0], state)
        return audit.final_scores(audit_state(state.opt_state), state.params)

    return one


def _refuse_unsuitable(loss_fn: Any, data: DeviceData | HostData, canary: Canaries) -> None:
    if isinstance(loss_fn, Objective):
        raise TypeError(
            "many runs take a loss of one example; got an Objective. Audit one run of it: "
            "fit(..., audit=GradientCanaries(...))."
        )
    if isinstance(data, HostData):
        raise TypeError(
            "many runs need data on the device, because all runs are one program; got HostData. "
            "Pass the arrays."
        )
    if isinstance(canary, Canaries) and canary.num_canaries != 1:
        raise ValueError(
            f"many runs have one canary each; got {canary.num_canaries:,} canaries. Pass "
            "GradientCanaries(1), or InputCanaries with one row."
        )
