"""A run of `DPSVI`: its start, warm or cold, its training, and the result that it recommends."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger
from dpoptax.per_example._base import select
from dpoptax.random._derive import derive_key
from dpoptax.training import Every, FitResult, Progress, fit
from dpoptax.transforms._private import PrivateOptimizer
from dpoptax.vi._iterates import recommend, with_iterates
from dpoptax.vi.numpyro._elbo import NumPyroElbo
from dpoptax.vi.numpyro._state import SVIRunResult

# Each recorded loss computes an epsilon for the progress bar, which takes time.
_MOST_LOSSES = 100


class Start(NamedTuple):
    """Parameters on the real line, and the optimizer with the state that it starts from."""

    params: dict[str, PyTree]
    optimizer: optax.GradientTransformation
    before: SVIRunResult | None = None
    purpose: str = "run"


def start_of(
    elbo: NumPyroElbo,
    optimizer: optax.GradientTransformation,
    init_params: Any,
    init_state: Any,
    rng_key: PRNGKeyArray,
) -> Start:
    """Returns where a run starts: as the guide says, at given parameters, or after another run."""
    if init_state is None:
        params = _given_params(elbo, init_params)
        purpose = "run" if init_params is None else _purpose_from(params)
        return Start(params, optimizer, purpose=purpose)
    if init_params is not None:
        raise ValueError(
            "init_params and init_state both say where the run starts. Pass one of them."
        )
    if not isinstance(init_state, SVIRunResult):
        raise TypeError(
            "init_state must be the result of an earlier run; got "
            f"{_validate.described(init_state)}. A state of update holds noise keys and a count "
            "of steps, which a second run would use again. Pass what DPSVI.run returned."
        )
    _refuse_same_key(init_state, rng_key)
    params, opt_state = init_state.fit.params, init_state.optimizer_state
    _check_shapes(elbo, params)
    if any(_validate.is_key(leaf) for leaf in jax.tree.leaves(opt_state)):
        raise ValueError(
            "the optimizer keeps a PRNG key in its state, so a second run would use its random "
            "numbers again. Start from init_params=result.params."
        )

    def init(params: PyTree) -> Any:
        fresh = jax.eval_shape(optimizer.init, params)
        structures: list[Any] = [jax.tree.structure(tree) for tree in (fresh, opt_state)]
        shapes = [
            [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (fresh, opt_state)
        ]
        if structures[0] != structures[1] or shapes[0] != shapes[1]:
            raise ValueError(
                "the earlier run had another optimizer, whose state does not fit. Pass the same "
                "one, or start from init_params=result.params with a new state."
            )
        return jax.tree.map(jnp.asarray, opt_state)

    purpose = _purpose_from((params, opt_state))
    return Start(params, _starting(optimizer, init), init_state, purpose)


def run_svi(
    elbo: NumPyroElbo,
    data: tuple[Any, ...],
    start: Start,
    plan: Plan,
    key: PRNGKeyArray,
    *,
    progress_bar: bool,
    nonprivate_losses: bool,
) -> SVIRunResult:
    """Trains, and chooses between the last iterate and an average of the last ones."""
    earlier = None if start.before is None else _event_before(start.before, plan)
    losses: list[Array] = []

    def record(progress: Progress) -> None:
        assert progress.nonprivate is not None
        mean = progress.nonprivate.nonprivate_loss
        kl_key = jax.random.fold_in(derive_key(key, "shown losses"), progress.step)
        losses.append(total_loss(elbo, progress.params, mean, kl_key))

    every = Every(record, steps=max(plan.num_steps // _MOST_LOSSES, 1))
    result = fit(
        elbo,
        start.params,
        data,
        plan=plan,
        optimizer=with_iterates(start.optimizer, plan.num_steps),
        key=derive_key(key, start.purpose),
        progress=[progress_bar, every] if nonprivate_losses else progress_bar,
        diagnostics=nonprivate_losses,
    )
    if earlier is not None:
        ledger = copy.copy(result.ledger)
        ledger.charge_event(earlier)
        result = dataclasses.replace(result, ledger=ledger)
    params, convergence = _recommended(result, plan)
    return SVIRunResult(
        params=elbo.constrain(params),
        last_params=elbo.constrain(result.params),
        convergence=convergence,
        fit=result,
        elbo=elbo,
        root=jax.random.clone(key),
        nonprivate_losses=jnp.stack(losses) if losses else None,
    )


def mean_of(losses: Array, rows: Array) -> Array:
    """Returns the mean loss of the real examples of a batch; zero for an empty batch."""
    count = jnp.maximum(jnp.sum(rows, dtype=losses.dtype), 1)
    return jnp.sum(select(rows, losses)) / count


def total_loss(elbo: NumPyroElbo, params: PyTree, mean_loss: Array, key: PRNGKeyArray) -> Array:
    """Scales the mean loss of a batch to all the data, as NumPyro reports it."""
    total = elbo.num_examples * mean_loss
    return elbo.scale * (total if elbo.kl_clipped else total + elbo.kl(params, key))


def _recommended(result: FitResult, plan: Plan) -> tuple[dict[str, PyTree], Any]:
    kept = result.state.opt_state[1][1]
    params, convergence = recommend(result.params, kept, plan.num_steps)
    # An average that the user's optimizer keeps is the user's choice.
    return (params if result.averaged_params is None else result.averaged_params), convergence


def _given_params(elbo: NumPyroElbo, given: Any) -> dict[str, PyTree]:
    """Returns the parameters of the guide, those that are given in place of the initial ones."""
    params = elbo.init()
    if given is None:
        return params
    if not isinstance(given, Mapping):
        raise TypeError(
            f"init_params must be a dictionary of parameters; got {_validate.described(given)}. "
            "Pass for example result.params, or init_state=result to go on with a run."
        )
    unknown = sorted(set(given) - set(params))
    if unknown:
        raise ValueError(
            f"init_params has {unknown}, which are no parameters. Expected names of "
            f"{sorted(params)}."
        )
    free = {
        name: jax.tree.map(
            lambda value: jnp.asarray(value, jnp.result_type(value, float)),
            elbo.transforms[name].inv(given[name]),
        )
        for name in given
    }
    _check_shapes(elbo, {**params, **free})
    return {**params, **free}


def _check_shapes(elbo: NumPyroElbo, params: PyTree) -> None:
    shapes = jax.tree.map(jnp.shape, params)
    expected = jax.tree.map(jnp.shape, elbo.init())
    if shapes != expected:
        raise ValueError(
            f"the parameters to start from have the shapes {shapes}; expected {expected}. Pass "
            "those of the same model and guide."
        )
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "a parameter to start from is not finite, or lies outside its support. Pass values "
            "inside, for example result.params."
        )


def _refuse_same_key(before: SVIRunResult, key: PRNGKeyArray) -> None:
    now, then = jax.random.key_data(key), jax.random.key_data(before.root)
    if now.shape == then.shape and bool(jnp.all(now == then)):
        raise ValueError(
            "rng_key is that of the earlier run, so batches and noise would depend on one key. "
            "Pass another one, such as dpoptax.random.secure_key()."
        )


def _purpose_from(start: PyTree) -> str:
    """Returns a name for the keys of a warm start: another start draws other batches.

    Otherwise a key that an earlier run had would draw its batches again, and the charges of both
    runs add up only if their batches are independent. `fit` itself binds the noise to the start.
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(start):
        digest.update(np.asarray(leaf).tobytes())
    return f"run from {digest.hexdigest()}"


def _starting(optimizer: optax.GradientTransformation, init: Any) -> optax.GradientTransformation:
    """Returns the optimizer with another initial state."""
    if isinstance(optimizer, PrivateOptimizer):
        inner = _starting(optimizer.optimizer, init)
        return PrivateOptimizer("an optimizer of dpoptax.transforms", inner, optimizer.wrap)
    update = optax.with_extra_args_support(optimizer).update
    return optax.GradientTransformationExtraArgs(init, update)


def _event_before(before: SVIRunResult, plan: Plan) -> Any:
    """Returns what the earlier run cost; it charges all planned steps where they count."""
    ledger: Ledger = before.fit.guaranteed_ledger
    return ledger.event(plan.sampler.relation)
