"""ChaCha20: the vectors of RFC 8439, an independent implementation, and JAX's key interface."""

import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

import dpoptax
from dpoptax.random._chacha20 import CHACHA20, CPU_CHUNK, blocks, quarter_round

COUNTING = np.arange(32, dtype=np.uint8).view(np.uint32)


def words(text):
    return [int(word, 16) for word in text.split()]


def one_block(key, counter, nonce):
    counters = jnp.array([counter], jnp.uint32)
    block = jax.jit(blocks, static_argnums=2)(jnp.asarray(key, jnp.uint32), counters, nonce)
    return np.asarray(block)[0].tolist()


def wrap(key):
    return jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32), impl=CHACHA20)


def key_stream(key, nonce, num_bytes, counter=0):
    """The key stream of another implementation."""
    initial = counter.to_bytes(4, "little") + np.array(nonce, np.uint32).tobytes()
    cipher = Cipher(algorithms.ChaCha20(np.asarray(key, np.uint32).tobytes(), initial), mode=None)
    return cipher.encryptor().update(bytes(num_bytes))


def test_the_quarter_round_of_rfc_8439():
    state = [jnp.uint32(w) for w in words("11111111 01020304 9b8d6f43 01234567")]
    mixed = [int(word) for word in quarter_round(*state)]
    assert mixed == words("ea2a92f4 cb1cf8ce 4581472e 5881c4bb")
    # 2.2.1: on a whole state only the four named words change.
    state = words("516461b1 2a5f714c 53372767 3d631689")
    state[0], state[1], state[2], state[3] = words("516461b1 2a5f714c 53372767 3d631689")
    mixed = [int(w) for w in quarter_round(*[jnp.uint32(w) for w in state])]
    assert mixed == words("bdb886dc cfacafd2 e46bea80 ccc07c79")


@pytest.mark.parametrize(
    ("key", "counter", "nonce", "expected"),
    [
        (
            COUNTING,
            1,
            (0x09000000, 0x4A000000, 0),
            "e4e7f110 15593bd1 1fdd0f50 c47120a3 c7f4d1c7 0368c033 9aaa2204 4e6cd4c3 "
            "466482d2 09aa9f07 05d7c214 a2028bd9 d19c12b5 b94e16de e883d0cb 4e3c50a2",
        ),
        (
            np.zeros(8),
            0,
            (0, 0, 0),
            "ade0b876 903df1a0 e56a5d40 28bd8653 b819d2bd 1aed8da0 ccef36a8 c70d778b "
            "7c5941da 8d485751 3fe02477 374ad8b8 f4b8436a 1ca11815 69b687c3 8665eeb2",
        ),
    ],
)
def test_the_blocks_of_rfc_8439(key, counter, nonce, expected):
    assert one_block(key, counter, nonce) == words(expected)


@pytest.mark.parametrize(
    ("counter", "nonce", "first", "last"),
    [
        (1, (0, 0, 0), "bee7079f 7a385155 7c97ba98 0d082d73", "1f0ae1ac 6f4d794b"),
        (0, (0, 0, 0x02000000), "374dc6c2 3736d58c b904e24a cd3f93ef", "398a19fa 6ded1b53"),
    ],
)
def test_the_further_blocks_of_rfc_8439(counter, nonce, first, last):
    block = one_block(np.zeros(8), counter, nonce)
    assert block[:4] == words(first)
    assert block[-2:] == words(last)


def test_the_key_stream_of_rfc_8439():
    block = np.array(one_block(COUNTING, 1, (0, 0x4A000000, 0)), np.uint32)
    assert block.tobytes()[:8].hex() == "224f51f3401bd9e1"


@pytest.mark.parametrize("seed", range(5))
def test_bits_are_the_key_stream_of_another_implementation(seed):
    key = np.random.default_rng(seed).integers(0, 2**32, 8, dtype=np.uint32)
    drawn = jax.random.bits(wrap(key), (1000,))
    assert np.asarray(drawn).tobytes() == key_stream(key, (0, 0, 0), 4000)
    child = jax.random.key_data(jax.random.split(wrap(key), 40)[37])
    assert np.asarray(child).tobytes() == key_stream(key, (1, 0, 0), 32, counter=37)
    folded = jax.random.key_data(jax.random.fold_in(wrap(key), 2**31 + 5))
    assert np.asarray(folded).tobytes() == key_stream(key, (2, 0, 0), 32, counter=2**31 + 5)


@pytest.mark.slow
def test_a_long_draw_is_the_key_stream_across_chunks_also_under_vmap():
    drawn = jax.random.bits(wrap(COUNTING), (16 * CPU_CHUNK + 5,))
    stream = key_stream(COUNTING, (0, 0, 0), 4 * drawn.size)
    assert np.asarray(drawn).tobytes() == stream
    both = jax.random.key_data(jax.random.split(wrap(COUNTING), 2))
    batched = jax.vmap(lambda key: jax.random.bits(key, drawn.shape))(
        jax.random.wrap_key_data(both, impl=CHACHA20)
    )
    second = key_stream(both[1], (0, 0, 0), 4 * drawn.size)
    assert np.asarray(batched[1]).tobytes() == second


@pytest.mark.slow
@pytest.mark.parametrize("width", [jnp.uint8, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (17,), (3, 50), (0,)])
def test_narrow_bits_are_the_same_stream_without_gaps(width, shape):
    key = wrap(COUNTING)
    drawn = np.asarray(jax.random.bits(key, shape, width))
    assert drawn.shape == shape
    assert drawn.tobytes() == key_stream(COUNTING, (0, 0, 0), drawn.nbytes)


@pytest.mark.slow
def test_a_longer_draw_begins_with_the_shorter_one():
    key = wrap(COUNTING)
    long = jax.random.bits(key, (64,))
    for size in (1, 15, 16, 17, 32, 63):
        np.testing.assert_array_equal(jax.random.bits(key, (size,)), long[:size])
    assert len(np.unique(np.asarray(jax.random.bits(key, (4096,))))) > 4090


def test_split_fold_in_and_bits_never_overlap():
    root = dpoptax.random.insecure_key(0)
    children = jax.random.key_data(jax.random.split(root, 10_000))
    folded = jax.random.key_data(
        jax.vmap(lambda d: jax.random.fold_in(root, d))(jnp.arange(10_000))
    )
    drawn = jax.random.bits(root, (20_000, 8))
    found = np.concatenate([children, folded, drawn, jax.random.key_data(root)[None]])
    assert len(np.unique(found, axis=0)) == len(found)


def test_vmap_equals_a_loop_and_jit_equals_eager():
    keys = jax.random.split(dpoptax.random.insecure_key(1), 5)
    together = jax.vmap(lambda key: jax.random.normal(key, (7,)))(keys)
    one_by_one = [jax.jit(lambda key: jax.random.normal(key, (7,)))(key) for key in keys]
    np.testing.assert_array_equal(together, jnp.stack(one_by_one))
    many = jax.random.split(keys[0], (2, 3))
    assert many.shape == (2, 3)
    np.testing.assert_array_equal(
        jax.random.key_data(many).reshape(6, 8), jax.random.key_data(jax.random.split(keys[0], 6))
    )


def test_normals_are_normal():
    n = 200_000
    draws = np.asarray(jax.random.normal(dpoptax.random.insecure_key(2), (n,)), np.float64)
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(draws.mean()) < 4.5 / math.sqrt(n)
    assert abs(draws.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    for bound in (2, 3, 4):
        expected = 2 * scipy.stats.norm.sf(bound) * n
        assert abs(np.sum(np.abs(draws) > bound) - expected) < 5 * math.sqrt(expected) + 1


def _count(key, bit_width, shape):
    del key
    assert bit_width == 32
    return (jnp.arange(math.prod(shape), dtype=jnp.uint32) << np.uint32(9)).reshape(shape)


def test_the_tails_of_float32_normals_are_right_to_five_standard_deviations():
    """All 2**23 possible normals, once each: their distribution if the bits are uniform."""
    counting = jax.extend.random.define_prng_impl(
        key_shape=(1,), seed=lambda seed: jnp.zeros(1, jnp.uint32), split=None,
        random_bits=_count, fold_in=None, name="counting", tag="count",
    )  # fmt: skip
    key = jax.random.wrap_key_data(jnp.zeros(1, jnp.uint32), impl=counting)
    values = np.asarray(jax.random.normal(key, (2**23,)), np.float64)
    assert len(np.unique(values)) > 2**22
    for bound in (1, 2, 3, 4, 4.5, 5):
        for tail in (values > bound, values < -bound):
            assert abs(tail.sum() - scipy.stats.norm.sf(bound) * 2**23) < 2
    assert 5.2 < values.max() < 5.6


def test_secure_keys_are_new_each_time_and_of_full_length():
    keys = {jax.random.key_data(dpoptax.random.secure_key()).tobytes() for _ in range(50)}
    assert len(keys) == 50
    assert all(len(key) == 32 for key in keys)
    # No word follows from another one.
    assert len({key[place : place + 4] for key in keys for place in range(0, 32, 4)}) == 8 * 50
    bits = np.unpackbits(np.frombuffer(b"".join(keys), np.uint8))
    assert abs(bits.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(bits))


def test_seeds_of_tests_give_different_keys():
    keys = {
        jax.random.key_data(dpoptax.random.insecure_key(s)).tobytes() for s in (0, 1, 2, 2**32 - 1)
    }
    assert len(keys) == 4
    for bad, message in ((-1, "at least 0"), (2**32, r"below 2\*\*32.*secure_key")):
        with pytest.raises(ValueError, match=message):
            dpoptax.random.insecure_key(bad)


def test_a_draw_beyond_the_counter_is_refused_before_it_is_made():
    key = dpoptax.random.insecure_key(0)
    with pytest.raises(ValueError, match=r"counts to 2\*\*32; asked to draw"):
        jax.jit(lambda key: jax.random.bits(key, (2**36 + 16,), jnp.uint32)).lower(key)


@pytest.mark.slow
def test_a_private_run_uses_a_secure_key_by_default():
    import optax

    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(100, 10), clip=1.0, noise_multiplier=1.0, num_steps=5,
        delta=1e-4,
    )  # fmt: skip

    def fit(key):
        return dpoptax.training.fit(
            lambda params, x: jnp.sum(params * x), jnp.zeros(50), jnp.zeros((100, 50)),
            plan=plan, optimizer=optax.sgd(1.0), key=key, progress=False,
        )  # fmt: skip

    first, second, given = fit(None), fit(None), fit(dpoptax.random.insecure_key(7))
    assert abs(np.corrcoef(first.params, second.params)[0, 1]) < 4.5 / math.sqrt(50)
    np.testing.assert_array_equal(given.params, fit(dpoptax.random.insecure_key(7)).params)
    report = first.report()
    assert "ChaCha20, 256 bits of entropy of the operating system" in str(report)
    assert report.prng in report.to_json()
    assert "ChaCha20, with a key from the caller" in given.prng
    assert "threefry" in fit(jax.random.key(7)).prng
    with pytest.raises(TypeError, match=r"For real data leave the key out|Type-check error"):
        fit(7)
