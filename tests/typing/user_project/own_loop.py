"""A loop of one's own: a sampler, `privatize` in a chain of Optax, a ledger, a compiled step."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax import accounting, samplers
from dpoptax.training import PrivateRun, StepInfo, TrainState, init_state, make_train_step


def loss_fn(params: jax.Array, example: jax.Array) -> jax.Array:
    return jnp.sum((params - example) ** 2)


data = 3.0 + jax.random.normal(jax.random.key(1), (200, 2))
sampler = samplers.Poisson(num_examples=200, expected_batch_size=20)
plan = dpoptax.Plan(
    sampler=sampler,
    clip=dpoptax.clipping.FlatClip(1.0),
    noise_multiplier=1.1,
    num_steps=4,
    delta=1e-4,
)

# Every line by itself.
keys = dpoptax.random.split_by_purpose(jax.random.key(0))
private = dpoptax.privatize(1.0, 1.1, expected_batch_size=20, key=keys.noise_key)
tx = optax.chain(private, optax.adam(0.1))
params = jnp.zeros(2)
state = tx.init(params)
sampler_state = plan.sampler.init(keys.sampling_key)
ledger = plan.ledger()
for _ in range(plan.num_steps):
    sampler_state, batch = plan.sampler.sample(sampler_state)
    examples = samplers.take(data, batch)
    grads = dpoptax.per_example_grads(loss_fn)(params, examples, mask=batch.mask)
    ledger.charge(plan.noise_multiplier)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    size = batch.mask.sum()
    print(size, batch.indices.shape)
print(params, ledger.epsilon())

# A compiled step, and a run that keeps the account.
fresh = optax.chain(plan.privatize(jax.random.key(1)), optax.adam(0.1))
TrainStep = Callable[[TrainState, jax.Array], tuple[TrainState, StepInfo]]
step = cast(TrainStep, jax.jit(make_train_step(loss_fn, tx=fresh, sampler=sampler)))
train_state = init_state(
    jnp.zeros(2),
    tx=fresh,
    sampler=sampler,
    sampling_key=keys.sampling_key,
    model_key=keys.model_key,
)
train_state, first = step(train_state, data)
print(train_state.params, first.nonprivate_loss)
run = PrivateRun(
    loss_fn, jnp.zeros(2), data, plan=plan, optimizer=optax.adam(0.1), key=jax.random.key(2)
)
for info in run:
    told: StepInfo = info
    print(run.steps_done, run.params, run.epsilon(), told.nonprivate_loss)
print(run.report())

# What it costs.
others: list[samplers.Sampler] = [
    samplers.FixedSize(200, 20),
    samplers.Shuffled(200, 20),
    samplers.BallsInBins(200, 10),
    samplers.UserPoisson(range(200), 20, 1),
]
for other in others:
    spent: float = accounting.epsilon(sampler=other, noise_multiplier=2.0, num_steps=10, delta=1e-4)
    found = accounting.calibrate_noise_multiplier(
        sampler=other, num_steps=10, epsilon=2.0, delta=1e-4
    )
    print(
        other.num_examples, other.expected_batch_size, spent, found.noise_multiplier, found.epsilon
    )
