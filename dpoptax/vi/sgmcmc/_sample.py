"""A chain of stochastic gradient MCMC by a private run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger
from dpoptax.random import derive_key, secure_key
from dpoptax.random._keys import root_key
from dpoptax.reports import Report
from dpoptax.training import PrivateRun
from dpoptax.vi._elbo_terms import Prior
from dpoptax.vi.sgmcmc._kernels import Kernel
from dpoptax.vi.sgmcmc._log_density import check_plan, negative


@dataclasses.dataclass(frozen=True)
class Chain:
    """What `sample` returns. All positions are private releases, and all of them are paid for.

    Attributes:
        positions: a tree like the position, with a leading axis of the draws.
        temperature: the chain samples the posterior at this temperature; above 1 it is wider.
        ledger: every step that was charged, each before it ran.
        report: the privacy statement of the run.

    Example:
        >>> import dpoptax, jax.numpy as jnp
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(50, 50), clip=1.0, noise_multiplier=5.0,
        ...     num_steps=4, delta=1e-3,
        ... )
        >>> kernel = dpoptax.vi.sgmcmc.SGLD(1e-3)
        >>> likelihood = lambda mean, x: -0.5 * (x - mean) ** 2
        >>> chain = sample(likelihood, 1.0, jnp.zeros(()), jnp.ones(50), plan=plan, kernel=kernel)
        >>> chain.positions.shape, chain.temperature
        ((4,), 1.0)
    """

    positions: PyTree
    temperature: float
    ledger: Ledger
    report: Report


def sample(
    log_likelihood: Callable[[PyTree, PyTree], Float[Array, ""]],
    prior: Prior,
    position: PyTree,
    data: PyTree,
    *,
    plan: Plan,
    kernel: Kernel,
    num_warmup: int = 0,
    thin: int = 1,
    key: PRNGKeyArray | None = None,
) -> Chain:
    """Runs a chain of stochastic gradient MCMC: one step for each step of the plan.

    Each step draws a batch by the sampler of the plan, releases a private gradient, charges the
    ledger, and makes one step of the kernel, which is post-processing. Steps beyond the plan are
    refused. A chain that is `num_warmup` steps long before it is read costs privacy in these steps
    too, so start at a good position.

    Gradients are clipped. Where many are, the chain samples another distribution than the
    posterior: choose a clip that is rarely reached.

    Args:
        log_likelihood: `log_likelihood(position, example)`, of one example.
        prior: `prior(position)`, the log density; or a number, the scale of a normal prior.
        position: where the chain starts. It must not depend on the private data.
        data: a tree of arrays with a leading axis of `plan.sampler.num_examples`.
        plan: sampler, clip, noise, number of steps and delta. The larger the batches, the less
            noise comes from drawing them.
        kernel: `SGLD`, `SGHMC` or `SGNHT`.
        num_warmup: steps before the first draw.
        thin: steps from one draw to the next.
        key: as in `dpoptax.training.fit`; a new secret key by default.

    Returns:
        A `Chain` with `(plan.num_steps - num_warmup) // thin` draws.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, or the plan has fewer steps.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp
        >>> plan = dpoptax.Plan.calibrate(
        ...     num_examples=200, expected_batch_size=200, clip=2.0, num_steps=30, epsilon=4.0,
        ...     delta=1e-3,
        ... )
        >>> chain = sample(
        ...     lambda mean, x: -0.5 * (x - mean) ** 2, 10.0, jnp.array(0.0), jnp.ones(200),
        ...     plan=plan, kernel=dpoptax.vi.sgmcmc.SGLD(1e-3), num_warmup=10, thin=2,
        ...     key=jax.random.key(0),
        ... )
        >>> chain.positions.shape, chain.ledger.num_steps, chain.ledger.epsilon() <= 4
        ((10,), 30, True)

    Reference: Wang, Fienberg and Smola 2015, arXiv:1502.07645.
    """
    check_plan(plan)
    num_warmup = _validate.count("num_warmup", num_warmup, at_least=0)
    thin = _validate.count("thin", thin)
    num_draws = (plan.num_steps - num_warmup) // thin
    if num_draws < 1:
        raise ValueError(
            f"the plan has {plan.num_steps} steps, which gives no draw after {num_warmup} steps "
            f"with one draw in {thin}. Plan more steps, or pass a smaller num_warmup."
        )
    # With the root key the noise of the sampler would repeat if the chain is repeated.
    noise_key = secure_key() if key is None else derive_key(root_key(key), "sgmcmc")
    run = PrivateRun(
        negative(log_likelihood, prior),
        position,
        data,
        plan=plan,
        optimizer=kernel.optimizer(plan, prior, key=noise_key),
        key=key,
    )
    if num_warmup:
        run.step(num_warmup)
    draws: list[Any] = []
    for _ in range(num_draws):
        run.step(thin)
        draws.append(jax.tree.map(np.asarray, run.params))
    positions = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *draws)
    return Chain(positions, kernel.temperature(plan), run.ledger, run.report())
