"""A program as users write it, which type checkers must accept; see `test_foreign_names.py`."""

import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax import samplers
from dpoptax.training import DeviceData, HostData, fit, init_state, make_train_step


def loss_fn(params: dict[str, jax.Array], example: jax.Array) -> jax.Array:
    """The loss of one example."""
    return jnp.vdot(params["w"], example) ** 2


def main() -> None:
    """Uses every step of the pipeline once."""
    drawn = samplers.Poisson(1000, 50)
    plan = dpoptax.Plan(sampler=drawn, clip=1.0, noise_multiplier=1.1, num_steps=10, delta=1e-5)
    others: list[samplers.Sampler] = [
        samplers.FixedSize(1000, 50),
        samplers.Shuffled(1000, 50),
        samplers.BallsInBins(1000, 20),
        samplers.CyclicPoisson(1000, 50, 2),
        samplers.UserPoisson(range(1000), 50, 1),
        samplers.PoissonSchedule([(samplers.Poisson(1000, 50), 2)]),
    ]
    exact = dpoptax.mechanisms.DiscreteGaussian()
    for mechanism in (exact, dpoptax.mechanisms.Gaussian(num_draws=4)):
        plan = plan.replace(mechanism=mechanism)
    for sampler in others:
        clip: dpoptax.clipping.ClipRule = dpoptax.clipping.FlatClip(1.0)
        budget = dpoptax.Plan.calibrate(
            sampler=sampler, clip=clip, epochs=1, epsilon=1.0, delta=1e-5, mechanism=exact
        )
        again: dpoptax.Plan = dpoptax.Plan.from_json(budget.to_json()).replace(num_steps=3)
        print(again.epsilon() + 1.0)

    params = {"w": jnp.zeros(2)}
    keys = dpoptax.random.split_by_purpose(jax.random.key(0))
    tx = optax.chain(plan.privatize(keys.noise_key), optax.adam(1e-3))
    state = tx.init(params)
    sampler_state, batch = plan.sampler.sample(plan.sampler.init(keys.sampling_key))
    data = jnp.ones((1000, 2))
    examples = samplers.take(data, batch)
    grads = dpoptax.per_example_grads(loss_fn)(params, examples, mask=batch.mask)
    updates, state = tx.update(grads, state, params)
    new_params = optax.apply_updates(params, updates)
    print(new_params, state, sampler_state)

    sgd = dpoptax.dp_sgd(
        0.1, 1.0, noise_multiplier=1.0, expected_batch_size=50, key=jax.random.key(2)
    )
    step = jax.jit(make_train_step(loss_fn, tx=sgd, sampler=drawn))
    train_state = init_state(
        params, tx=sgd, sampler=drawn, sampling_key=keys.sampling_key, model_key=keys.model_key
    )
    train_state, info = step(train_state, data)
    print(info.nonprivate_loss)

    options = {"seed": 0}
    key = jax.random.key(options["seed"])
    for source in (data, HostData([1.0]), DeviceData(data)):
        result = fit(loss_fn, params, source, plan=plan, optimizer=optax.sgd(0.1), key=key)
        print(result.report().epsilon, result.epsilon())
    epsilon: float = dpoptax.accounting.epsilon(
        sampler=drawn, noise_multiplier=1.0, num_steps=10, delta=1e-5
    )
    found = dpoptax.accounting.calibrate_noise_multiplier(
        epsilon=epsilon, delta=1e-5, sampler=drawn, epochs=3
    )
    print(found.noise_multiplier)
