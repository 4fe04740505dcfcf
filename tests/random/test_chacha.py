"""ChaCha: published vectors, two independent implementations, and JAX's key interface."""

import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

import dpoptax
from dpoptax.random._chacha import (
    CPU_CHUNK,
    KEY_TYPES,
    NORMALS,
    blocks,
    check_counter,
    quarter_round,
    rounds_of,
)
from dpoptax.training._resume import array_codec

COUNTING = np.arange(32, dtype=np.uint8).view(np.uint32)


def words(text):
    return [int(word, 16) for word in text.split()]


def one_block(key, counter, nonce, rounds=20):
    counters = jnp.array([counter], jnp.uint32)
    run = jax.jit(blocks, static_argnums=(2, 3))
    block = run(jnp.asarray(key, jnp.uint32), counters, nonce, rounds)
    return np.asarray(block)[0].tolist()


def wrap(key, rounds=20):
    return jax.random.wrap_key_data(jnp.asarray(key, jnp.uint32), impl=KEY_TYPES[rounds])


def slow_block(key, counter, nonce, rounds):
    """One block by Python's integers, written from the paper of Bernstein (2008), section 3."""
    first = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *map(int, key), counter, *nonce]
    x = list(first)

    def mix(a, b, c, d):
        for target, other, turned, bits in (
            (a, b, d, 16),
            (c, d, b, 12),
            (a, b, d, 8),
            (c, d, b, 7),
        ):
            x[target] = (x[target] + x[other]) % 2**32
            word = x[turned] ^ x[target]
            x[turned] = (word << bits | word >> (32 - bits)) % 2**32

    for turn in range(rounds):
        for i in range(4):
            mix(*(4 * row + (i + row * (turn % 2)) % 4 for row in range(4)))
    return [(a + b) % 2**32 for a, b in zip(x, first, strict=True)]


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


# Two blocks of draft-strombergson-chacha-test-vectors-01 for each number of rounds: zeros, and the
# key and the initial value of its last case.
LAST = ("c46ec1b18ce8a878725a37e780dfb7351f68ed2e194c79fbc6aebee1a667975d", "1ada31d5cf688221")
DRAFT = {
    ("00" * 32, "00" * 8, 8):
        "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"
        "984ce172b9216f419f445367456d5619314a42a3da86b001387bfdb80e0cfe42"
        "d2aefa0deaa5c151bf0adb6c01f2a5adc0fd581259f9a2aadcf20f8fd566a26b"
        "5032ec38bbc5da98ee0c6f568b872a65a08abf251deb21bb4b56e5d8821e68aa",
    ("00" * 32, "00" * 8, 12):
        "9bf49a6a0755f953811fce125f2683d50429c3bb49e074147e0089a52eae155f"
        "0564f879d27ae3c02ce82834acfa8c793a629f2ca0de6919610be82f411326be"
        "0bd58841203e74fe86fc71338ce0173dc628ebb719bdcbcc151585214cc089b4"
        "42258dcda14cf111c602b8971b8cc843e91e46ca905151c02744a6b017e69316",
    (*LAST, 8):
        "838751b42d8ddd8a3d77f48825a2ba752cf4047cb308a5978ef274973be374c9"
        "6ad848065871417b08f034e681fe46a93f7d5c61d1306614d4aaf257a7cff08b"
        "16f2fda170cc18a4b58a2667ed962774af792a6e7f3c77992540711a7a136d7e"
        "8a2f8d3f93816709d45a3fa5f8ce72fde15be7b841acba3a2abd557228d9fe4f",
    (*LAST, 12):
        "1482072784bc6d06b4e73bdc118bc0103c7976786ca918e06986aa251f7e9cc1"
        "b2749a0a16ee83b4242d2e99b08d7c20092b80bc466c87283b61b1b39d0ffbab"
        "d94b116bc1ebdb329b9e4f620db695544a8e3d9b68473d0c975a46ad966ed631"
        "e42aff530ad5eac7d8047adfa1e5113c91f3e3b883f1d189ac1c8fe07ba5a42b",
    (*LAST, 20):
        "f63a89b75c2271f9368816542ba52f06ed49241792302b00b5e8f80ae9a473af"
        "c25b218f519af0fdd406362e8d69de7f54c604a6e00f353f110f771bdca8ab92"
        "e5fbc34e60a1d9a9db17345b0a402736853bf910b060bdf1f897b6290f01d138"
        "ae2c4c90225ba9ea14d518f55929dea098ca7a6ccfe61227053c84e49a4a3332",
}  # fmt: skip


@pytest.mark.parametrize(("key", "initial", "rounds"), DRAFT)
def test_the_key_streams_of_the_draft_for_reduced_rounds(key, initial, rounds):
    expected = np.frombuffer(bytes.fromhex(DRAFT[key, initial, rounds]), "<u4").tolist()
    key = np.frombuffer(bytes.fromhex(key), "<u4")
    # The draft has 64 bits of counter and 64 of the initial value; RFC 8439 has 32 and 96.
    nonce = (0, *np.frombuffer(bytes.fromhex(initial), "<u4").tolist())
    assert one_block(key, 0, nonce, rounds) + one_block(key, 1, nonce, rounds) == expected
    assert slow_block(key, 0, nonce, rounds) + slow_block(key, 1, nonce, rounds) == expected


@pytest.mark.parametrize("rounds", KEY_TYPES)
def test_bits_have_the_rounds_of_the_type_and_keys_have_twenty(rounds):
    words = np.random.default_rng(rounds).integers(0, 2**32, 8, dtype=np.uint32)
    key = wrap(words, rounds)
    assert rounds_of(key) == rounds
    expected = [slow_block(words, counter, (0, 0, 0), rounds) for counter in range(3)]
    assert jax.random.bits(key, (3, 16)).tolist() == expected
    child, folded = jax.random.split(key, 6)[5], jax.random.fold_in(key, 7)
    assert rounds_of(child) == rounds_of(folded) == rounds
    assert jax.random.key_data(child).tolist() == slow_block(words, 5, (1, 0, 0), 20)[:8]
    assert jax.random.key_data(folded).tolist() == slow_block(words, 7, (2, 0, 0), 20)[:8]
    assert len({(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), NORMALS}) == 5


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
        jax.random.wrap_key_data(both, impl=KEY_TYPES[20])
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
    check_counter("draw", 2**32)


@pytest.mark.untyped
def test_other_numbers_of_rounds_are_refused():
    for make in (dpoptax.random.secure_key, lambda **kw: dpoptax.random.insecure_key(0, **kw)):
        for rounds in (6, 7, 9, 24):
            with pytest.raises(ValueError, match=rf"must be 8, 12 or 20; got {rounds}"):
                make(rounds=rounds)
        with pytest.raises(TypeError, match="rounds"):
            make(rounds="8")
        assert [rounds_of(make(rounds=rounds)) for rounds in (8, 12, 20)] == [8, 12, 20]
        assert rounds_of(make()) == 8
    assert rounds_of(jax.random.key(0)) is None


@pytest.mark.parametrize(
    ("name", "rounds"), [("cc20", 20), ("chacha20", 20), ("chacha12", 12), ("chacha8", 8)]
)
def test_a_stored_key_keeps_its_rounds_also_under_its_earlier_name(name, rounds):
    key = wrap(COUNTING, rounds)
    stored, descriptions = array_codec.encode({"key": key}), array_codec.describe_all({"key": key})
    (path,) = descriptions
    assert descriptions[path][2] in (name, "chacha20")
    descriptions[path][2] = name
    like = {"key": dpoptax.random.insecure_key(0)}  # a run that starts now has the default
    restored = array_codec.decode(stored, like, descriptions)["key"]
    assert restored.dtype == key.dtype
    assert bool(restored == key)


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
    assert "ChaCha8, 256 bits of entropy of the operating system" in str(report)
    assert report.prng in report.to_json()
    assert "ChaCha8, with a key from the caller" in given.prng
    assert "threefry" in fit(jax.random.key(7)).prng
    with pytest.raises(TypeError, match=r"For real data leave the key out|Type-check error"):
        fit(7)
