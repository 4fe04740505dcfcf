"""Programs that release through clip, sum and noise only are certified, in every form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from audit.leaking_programs import (
    DATA,
    DATASET,
    SAMPLER,
    WIDTH,
    N,
    apply,
    gradients,
    honest,
    initial,
    loss,
    privatize,
    sample,
)
from flax import nnx

import dpoptax
from dpoptax.clipping import QuantileClip
from dpoptax.samplers import MaskedExamples, take
from dpoptax.training import init_state, make_train_step
from dpoptax.training._noise_binding import bind_noise
from dpoptax.training._own_gradients import make_sampling_step
from dpoptax.transforms import chain, disk, scale_then_privatize
from dpoptax.vi import aligned_elbo, global_elbo, local_elbo_loss
from dpoptax.vi.guides import MeanField

PLAN = dpoptax.Plan(sampler=SAMPLER, clip=1.0, noise_multiplier=1.1, num_steps=20, delta=1e-4)
KEYS = dpoptax.random.split_by_purpose(jax.random.key(8))


def certify_step(loss_fn, params, data=DATA, tx=None, sampler=SAMPLER, **options):
    if tx is None:
        tx = optax.chain(PLAN.privatize(KEYS.noise_key), optax.sgd(0.1, momentum=0.9))
    run = {"tx": tx, "sampler": sampler}
    step = make_train_step(loss_fn, **run, **options)
    state = init_state(params, sampling_key=KEYS[0], model_key=KEYS[2], **run)
    return dpoptax.certify(step, state, data, private="data")


def require(certificate):
    assert certificate.certified, str(certificate)
    return certificate


def squared(w, x):
    return jnp.sum((w - x) ** 2)


def test_a_train_step_names_all_that_it_returns():
    found = require(certify_step(squared, jnp.zeros(WIDTH)))
    assert found.released == ("output[0].params", "output[0].opt_state[1][0].trace")
    assert found.secret == (
        "output[0].opt_state[0].key",
        "output[0].sampler_state.key",
        "output[0].model_key",
    )
    assert set(found.nonprivate) == {
        "output[1].nonprivate_loss",
        "output[1].nonprivate_batch_size",
        "output[1].nonprivate_nonfinite_count",
    }
    (release,) = found.releases
    assert release.sampler == SAMPLER
    assert release.noise_multiplier == 1.1
    assert not found.assumptions


def with_aux(w, x):
    return squared(w, x), {"first": x[0]}


def with_key(w, x, key):
    return squared(w, x + jax.random.normal(key, x.shape))


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (squared, {"microbatch_size": 4}),
        (squared, {"diagnostics": 1.0}),
        (with_aux, {"has_aux": True}),
        (with_key, {}),
    ],
)
def test_a_train_step_is_certified_with_every_option(loss_fn, options):
    require(certify_step(loss_fn, jnp.zeros(WIDTH), **options))


def test_augmentation_is_certified():
    flip = lambda key, x: jnp.where(jax.random.bernoulli(key), x[::-1], x)  # noqa: E731
    require(certify_step(dpoptax.average_views(squared, flip, 3), jnp.zeros(WIDTH)))


def test_a_clip_rule_with_state_is_certified():
    tx = optax.chain(privatize(QuantileClip(1.0)), optax.sgd(0.1))
    found = require(certify_step(squared, jnp.zeros(WIDTH), tx=tx))
    assert any("clip_state" in name for name in found.released)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        scale_then_privatize(optax.sgd(0.1)),
        scale_then_privatize(optax.sgd(0.1), per_leaf=True),
        disk(optax.sgd(0.1)),
    ],
)
def test_an_optimizer_that_acts_before_the_clip_is_certified(optimizer):
    require(certify_step(squared, jnp.zeros(WIDTH), tx=chain(privatize(), optimizer)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        dpoptax.samplers.FixedSize(N, 6),
        dpoptax.samplers.Shuffled(N, 6),
        dpoptax.samplers.BallsInBins(N, 10),
        dpoptax.samplers.CyclicPoisson(N, 6, 4),
    ],
)
def test_every_sampler_is_certified(sampler):
    require(certify_step(squared, jnp.zeros(WIDTH), sampler=sampler))


def test_linen_and_nnx_models_are_certified():
    model = nn.Dense(1)
    params = model.init(jax.random.key(0), jnp.zeros(WIDTH))["params"]
    loss_fn = lambda params, x: jnp.sum(model.apply({"params": params}, x) ** 2)  # noqa: E731
    require(certify_step(loss_fn, params))
    module = nnx.Linear(WIDTH, 1, rngs=nnx.Rngs(0))
    loss_fn, params = dpoptax.nnx.loss_fn(module, lambda module, x: jnp.sum(module(x) ** 2))
    require(certify_step(loss_fn, params))


@pytest.mark.slow
@pytest.mark.parametrize("make", [global_elbo, aligned_elbo])
@pytest.mark.parametrize("prior", [1.0, lambda latent: -jnp.sum(jnp.abs(latent))])
def test_variational_inference_is_certified(make, prior):
    guide = MeanField(jnp.zeros(WIDTH))
    elbo = make(guide, lambda latent, x: -squared(latent, x), prior, num_examples=N)
    params = guide.init(jax.random.key(0), jax.random.key(0))["params"]
    private = elbo.wrap(privatize(), jax.random.key(4))
    require(certify_step(elbo, params, tx=chain(private, optax.sgd(0.1))))


def test_a_variational_autoencoder_is_certified():
    encode = lambda w, x: (w * x, jnp.ones(WIDTH))  # noqa: E731
    loss_fn = local_elbo_loss(encode, lambda w, z, x: -squared(z * w, x))
    require(certify_step(loss_fn, jnp.ones(WIDTH)))


def test_the_two_halves_of_a_step_are_certified_together():
    grads_fn = dpoptax.per_example_grads(squared)
    half = make_sampling_step(SAMPLER, take)
    tx = optax.chain(PLAN.privatize(KEYS.noise_key), optax.sgd(0.1))

    def step(state, data):
        state, (batch, examples) = half(state, data)
        grads = grads_fn(state.params, examples, mask=batch.mask)
        opt_state = bind_noise(state.opt_state, (batch.indices, examples), program="own")
        updates, opt_state = tx.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state)

    run = {"tx": tx, "sampler": SAMPLER}
    state = init_state(jnp.zeros(WIDTH), sampling_key=KEYS[0], model_key=KEYS[2], **run)
    require(dpoptax.certify(step, state, DATA, private="data", plan=PLAN))


def test_a_batch_on_a_mesh_is_certified():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    require(certify_step(squared, jnp.zeros(WIDTH), take=dpoptax.samplers.sharded_take(sharding)))


# Loops of one's own


def scans(s, data):
    return jax.lax.scan(lambda s, _: (honest(s, data), None), s, None, length=5)[0]


def loops(s, data):
    return jax.lax.fori_loop(0, 5, lambda _, s: honest(s, data), s)


def scans_in_a_scan(s, data):
    return jax.lax.scan(lambda s, _: (scans(s, data), None), s, None, length=5)[0]


def makes_steps_before_and_after_a_loop(s, data):
    return honest(scans(honest(s, data), data), data)


def shows_losses(s, data):
    s, _, taken = sample(s, data)
    losses, grads = dpoptax.value_and_per_example_grads(loss)(s.params, taken)
    return apply(s, grads), {"nonprivate_losses": losses}


def changes_rows_one_by_one(s, data):
    s, _, taken = sample(s, data)
    x = taken.examples["x"]
    norms = jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True))
    scaled = {"x": x / jnp.maximum(norms, 1e-3), "y": taken.examples["y"]}
    return apply(s, gradients(s.params, MaskedExamples(scaled, taken.mask)))


def changes_all_rows_before(s, data):
    return honest(s, {"x": (data["x"] - 0.5) * 2 + data["y"][:, None].astype(jnp.float32), **data})


def takes_gradients_by_vmap(s, data):
    s, _, taken = sample(s, data)
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(s.params, taken.examples)
    masked = jax.tree.map(lambda g: jnp.where(taken.mask[:, None], g, 0.0), grads)
    return apply(s, masked)


def takes_gradients_one_by_one(s, data):
    s, _, taken = sample(s, data)
    grads = jax.lax.map(lambda row: jax.grad(loss)(s.params, row), taken.examples)
    masked = jax.tree.map(lambda g: jnp.where(taken.mask[:, None], g, 0.0), grads)
    return apply(s, masked)


def draws_its_own_randomness(s, data):
    key, use, show = jax.random.split(s.key, 3)
    s, _, taken = sample(s._replace(key=key), data)
    noisy = lambda params, row, key: loss(params, row) * jax.random.uniform(key)  # noqa: E731
    grads = dpoptax.per_example_grads(noisy)(s.params, taken, key=use)
    return apply(s, grads), jax.random.normal(show, (3,))


def averages_the_parameters(s, data):
    after = honest(s, data)
    return after, jax.tree.map(lambda a, b: (a + b) / 2, after.params, s.params)


def stops_by_released_numbers(s, data):
    small = lambda s: jnp.sum(s.params["w"] ** 2) < 0.1  # noqa: E731
    return jax.lax.while_loop(small, lambda s: honest(s, data), s)


def prints_released_numbers(s, data):
    s = honest(s, data)
    jax.debug.print("{}", s.params["w"])
    return s


def uses_frozen_features(s, data):
    frozen = jnp.ones((WIDTH, WIDTH)) * jnp.arange(WIDTH, dtype=jnp.float32)
    s, _, taken = sample(s, data)
    of_features = lambda params, row: jnp.sum((params["w"] * (frozen @ row["x"])) ** 2)  # noqa: E731
    return apply(s, gradients(s.params, taken, of_features))


def has_a_custom_derivative(s, data):
    s, _, taken = sample(s, data)
    relu = lambda params, row: jnp.sum(jax.nn.relu(params["w"] - row["x"]))  # noqa: E731
    return apply(s, gradients(s.params, taken, relu))


def jits_its_parts(s, data):
    sampler_state, batch = jax.jit(SAMPLER.sample)(s.sampler_state)
    grads = jax.jit(dpoptax.per_example_grads(loss))(s.params, take(data, batch))
    return apply(s._replace(sampler_state=sampler_state), grads)


OWN = [
    scans,
    loops,
    scans_in_a_scan,
    makes_steps_before_and_after_a_loop,
    shows_losses,
    changes_rows_one_by_one,
    changes_all_rows_before,
    takes_gradients_by_vmap,
    takes_gradients_one_by_one,
    draws_its_own_randomness,
    averages_the_parameters,
    stops_by_released_numbers,
    prints_released_numbers,
    uses_frozen_features,
    has_a_custom_derivative,
    jits_its_parts,
]


@pytest.mark.parametrize("program", OWN, ids=lambda program: program.__name__)
def test_a_loop_of_ones_own_is_certified(program):
    require(dpoptax.certify(program, initial(), DATASET, private="data"))
