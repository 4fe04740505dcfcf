"""A key whose random numbers depend on the batch that they are drawn in is refused by name.

The privacy of batches and noise needs `fold_in`, `split` and random bits that depend on the key and
on their arguments alone. The last tests show what the refused types of key do instead.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax._jax_compat import define_prng_impl
from dpoptax.random import _chacha, insecure_key
from dpoptax.random._threefry_unrolled import unrolled
from dpoptax.samplers import _feistel as feistel

# A user's own type, with the name and the code of ours: only the type itself tells them apart.
OWN = define_prng_impl(
    key_shape=(8,),
    seed=_chacha._seed,
    split=_chacha._split,
    random_bits=_chacha._random_bits_20,
    fold_in=_chacha._fold_in,
    name="mine",
    tag="chacha20",
)
REFUSED = {
    "unsafe_rbg": lambda: jax.random.key(0, impl="unsafe_rbg"),
    "rbg": lambda: jax.random.key(0, impl="rbg"),
    "mine": lambda: jax.random.key(jnp.uint32(0), impl=OWN),
}
ALLOWED = {
    "threefry": jax.random.key,
    "threefry, unrolled": lambda seed: unrolled(jax.random.key(seed)),
    **{f"chacha{r}": functools.partial(insecure_key, rounds=r) for r in (8, 12, 20)},
}
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(20, 4), clip=1.0, noise_multiplier=1.0, num_steps=2, delta=1e-3
)
GRADS = jnp.ones((2, 3))


def fit(key):
    return dpoptax.training.fit(
        lambda mean, x: (mean - x) ** 2,
        jnp.array(0.0),
        jnp.ones(20),
        plan=PLAN,
        optimizer=optax.sgd(0.1),
        key=key,
        progress=False,
    )


def stale_state(make):
    """Returns a function that samples from a state that was not made by `init`."""

    def call(key):
        sampler = make(8, 2)
        shapes = jax.eval_shape(sampler.init, jax.random.key(0))
        fields = {
            name: jnp.zeros(field.shape, field.dtype)
            for name, field in shapes._asdict().items()
            if name != "key"
        }
        return sampler.sample(type(shapes)(key=key, **fields))

    return call


TAKES_KEY = {
    **{
        f"init, {name}": lambda key, m=m: m(8, 2).init(key) for name, m in registry.SAMPLERS.items()
    },
    **{f"sample, {name}": stale_state(make) for name, make in registry.SAMPLERS.items()},
    "permute": lambda key: feistel.permute(key, jnp.arange(3), 1000),
    "invert": lambda key: feistel.invert(key, jnp.arange(3), 1000),
    "iterate_batches": lambda key: next(
        dpoptax.samplers.iterate_batches(dpoptax.samplers.Poisson(20, 4), key)
    ),
    "privatize": lambda key: dpoptax.privatize(1.0, 1.0, expected_batch_size=4, key=key),
    "plan.privatize": PLAN.privatize,
    "dp_adam": lambda key: dpoptax.dp_adam(
        0.1, 1.0, noise_multiplier=1.0, expected_batch_size=4, key=key
    ),
    "split_by_purpose": dpoptax.random.split_by_purpose,
    "fit": fit,
    "norm_histogram": lambda key: dpoptax.mechanisms.norm_histogram(GRADS, (0.0, 1.0), 1.0, key),
    **{
        f"release, {name}": lambda key, make=make: make().release(
            key,
            dpoptax.per_example_grads(lambda w, x: w @ x)(jnp.ones(3), GRADS),
            dpoptax.clipping.FlatClip(1.0),
            1.0,
            0,
        )
        for name, make in registry.MECHANISMS.items()
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("impl", REFUSED)
@pytest.mark.parametrize("call", TAKES_KEY.values(), ids=TAKES_KEY)
def test_a_key_of_another_type_is_refused_by_name(impl, call):
    message = rf"threefry2x32 or ChaCha key; got .*'{impl}'.*secure_key\(\), or jax.random.key"
    with pytest.raises(TypeError, match=message):
        call(REFUSED[impl]())


def test_a_traced_key_of_another_type_is_refused():
    with pytest.raises(TypeError, match="got a key of the type 'rbg'"):
        jax.jit(dpoptax.samplers.FixedSize(1000, 64).init)(REFUSED["rbg"]())


@pytest.mark.seconds
def test_a_default_type_of_jax_that_is_refused_does_not_stop_training():
    with jax.default_prng_impl("unsafe_rbg"):
        with pytest.raises(TypeError, match="jax_default_prng_impl may stay"):
            fit(jax.random.key(0))
        assert fit(None).num_steps == 2


def bits(key):
    return jax.random.bits(key, (3,))


def data_of_fold_in(key):
    datum = jax.random.key_data(key).ravel()[0]
    return jax.random.key_data(jax.random.fold_in(key, datum))


def data_of_split(key):
    return jax.random.key_data(jax.random.split(key))


def vmap_depends_on_more_than_the_key(make, draw):
    """Whether the draw of a key is another under `vmap`, `scan` or `jit`, or beside other keys."""
    keys = [make(seed) for seed in (1, 2, 1, 3)]
    alone = np.stack([draw(key) for key in keys])
    together = (
        jax.vmap(draw)(jnp.stack(keys)),
        jax.vmap(draw)(jnp.stack(keys[::-1]))[::-1],
        jax.lax.scan(lambda _, key: (None, draw(key)), None, jnp.stack(keys))[1],
        np.stack([jax.jit(draw)(key) for key in keys]),
    )
    return not all(np.array_equal(alone, values) for values in together)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [bits, data_of_fold_in, data_of_split])
@pytest.mark.parametrize("make", ALLOWED.values(), ids=ALLOWED)
def test_random_numbers_of_allowed_keys_depend_on_the_key_alone(make, draw):
    assert not vmap_depends_on_more_than_the_key(make, draw)


@pytest.mark.slow
def test_unsafe_rbg_derives_keys_by_their_place_in_the_batch(monkeypatch):
    def make(seed):
        return jax.random.key(seed, impl="unsafe_rbg")

    assert vmap_depends_on_more_than_the_key(make, data_of_fold_in)
    # So the network of the samplers is no permutation: an example is in a batch several times.
    monkeypatch.setattr(feistel, "allowed_key", lambda name, key: key)
    images = {
        name: feistel.permute(key, jnp.arange(600), 600)
        for name, key in (("unsafe_rbg", make(0)), ("threefry", jax.random.key(0)))
    }
    assert len(set(images["threefry"].tolist())) == 600
    assert len(set(images["unsafe_rbg"].tolist())) < 500


def test_rbg_draws_equal_noise_from_different_keys():
    first, second, third = (jax.random.key(seed, impl="rbg") for seed in range(3))
    noise, other = (
        jax.vmap(lambda key: jax.random.normal(key, (4,)))(jnp.stack(keys))
        for keys in ((first, second), (first, third))
    )
    np.testing.assert_array_equal(noise[1], other[1])
