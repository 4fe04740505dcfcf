"""Rounding: in no batch does one example move the clipped sum by 3 % more than its gradient.

The search below tries batches that are built to lose the most: terms of hundreds of clip bounds
that cancel within each example, and sums that stand at a power of two, where float32 numbers begin
to lie further apart. `docs/numerics.md` has the proof of what the search confirms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.per_example import _batch_sum
from dpoptax.per_example._norm_rules import chunking, rounding

WIDTH = 4
ALLOWED = 0.03
NUMBERS = ("NWC", "WIO", "NWC")


def product(w, a, x, b, y):
    """One use: nothing cancels."""
    del a, x
    return b @ (y @ w)


def used_twice(w, a, x, b, y):
    return a @ (x @ w) + b @ (x @ w) + y @ jnp.zeros(WIDTH)


def transposed(w, a, x, b, y):
    return a @ (x @ w) + x @ (w @ b) + y @ jnp.zeros(WIDTH)


def over_time(w, a, x, b, y):
    def add(total, step):
        return total + step @ (x @ w), None

    return jax.lax.scan(add, y @ jnp.zeros(WIDTH), jnp.stack([a, b]))[0]


def tied_table(w, a, x, b, y):
    return a @ w[jnp.zeros(1, int)][0] + (w @ b)[0] + (x + y) @ jnp.zeros(WIDTH)


def looked_up_twice(w, a, x, b, y):
    return jnp.sum(jnp.stack([a, b]) * w[jnp.zeros(2, int)]) + (x + y) @ jnp.zeros(WIDTH)


def convolution(w, a, x, b, y):
    image = jnp.stack([x, x])[None]
    output = jax.lax.conv_general_dilated(image, w[None], (1,), "VALID", dimension_numbers=NUMBERS)
    return jnp.sum(output[0] * jnp.stack([a, b])) + y @ jnp.zeros(WIDTH)


def bias(w, a, x, b, y):
    return a @ (w[0] + x) + b @ (w[0] + y)


# The loss, whether the gradients of the leaf are held, and options of `per_example_grads`.
FORMS = {
    "product": (product, False, {}),
    "twice": (used_twice, False, {}),
    "transposed": (transposed, False, {}),
    "time": (over_time, False, {}),
    "tied": (tied_table, False, {}),
    "lookups": (looked_up_twice, False, {}),
    "convolution": (convolution, False, {}),
    "bias": (bias, False, {}),
    "held": (transposed, True, {}),
    "stacked": (transposed, False, {"form": "stacked"}),
    "microbatched": (transposed, False, {"microbatch_size": 8}),
}


def clipped_sum(name, monkeypatch):
    """The sum of the gradients, each clipped to norm 1, as a function of examples and mask."""
    loss_fn, held, options = FORMS[name]
    monkeypatch.setattr(dpoptax.per_example._factored, "is_materialized", lambda *_: held)
    rule = dpoptax.clipping.FlatClip(1.0)
    grads_fn = dpoptax.per_example_grads(lambda w, example: loss_fn(w, *example), **options)

    @jax.jit
    def run(examples, mask):
        grads = grads_fn(jnp.zeros((3 if name == "tied" else WIDTH, WIDTH)), examples, mask=mask)
        return grads.clip_and_sum(rule.weights)

    return lambda examples, mask: np.asarray(run(examples, mask), np.float64)


def cancelling(batch, size, signs, seed):
    """Terms of about `size` clip bounds that cancel to a gradient of norm 1/2; to 0 in the last."""
    rng = np.random.default_rng(seed)
    x = np.ones((batch, WIDTH))
    a = size * (1 + rng.random((batch, WIDTH)))
    a *= {"equal": 1, "random": rng.choice([-1, 1], (batch, 1)), "halves": -1}[signs]
    if signs == "halves":
        a[: batch // 2] *= -1
    small = rng.normal(size=(batch, WIDTH))
    small *= 0.25 / np.linalg.norm(small, axis=1, keepdims=True)
    small[-1] = 0
    a = a.astype(np.float32)
    return a, x, (small - a).astype(np.float32), x


def at_a_power_of_two(batch, divisor):
    """Sums just above 2**k, or below without the first example, and then less than they resolve.

    Above 2**k the rest is rounded away. Below it, float32 numbers are twice as dense.
    """
    half = 2 ** int(np.log2(batch // 2))
    x = np.ones((batch, WIDTH))
    b = np.zeros((batch, WIDTH))
    b[:half, 0] = 0.5
    b[half, 0] = 0.25
    b[half + 1 :, 0] = -0.5 * half * 2.0**-24 * 0.999 / divisor
    return 0 * b, x, b, x


def candidates(batch):
    """Batches, and how many clip bounds the example that is removed may move the sum by."""
    last = np.arange(batch) != batch - 1
    for size in (5.0, 90.0, 250.0, 900.0):
        for signs in ("equal", "random", "halves"):
            yield cancelling(batch, size, signs, seed=batch), last, 0.0
    for divisor in (1, 8, 16, 256):
        yield at_a_power_of_two(batch, divisor), np.arange(batch) != 0, 1.0


def worst(name, batch, monkeypatch):
    """The largest distance beyond the clip bound that the search finds."""
    run = clipped_sum(name, monkeypatch)
    everyone = np.ones(batch, bool)
    found = 0.0
    for examples, mask, allowed in candidates(batch):
        # With one use of the parameter nothing cancels, and every gradient is clipped.
        allowed = 1.0 if name == "product" else allowed
        examples = tuple(np.asarray(leaf, np.float32) for leaf in examples)
        total = run(examples, everyone)
        # Removed in place, and with the last example in its place, as samplers draw batches.
        moved = [total - run(examples, mask)]
        removed = int(np.flatnonzero(~mask)[0])
        rows = np.arange(batch)
        rows[removed] = batch - 1
        shifted = tuple(leaf[rows] for leaf in examples)
        moved.append(total - run(shifted, np.arange(batch) < batch - 1))
        found = max(found, *(np.linalg.norm(each) - allowed for each in moved))
    return found


def sum_the_whole_batch(monkeypatch):
    """Plain float32 sums, each over all examples, and no limit on terms that cancel."""
    monkeypatch.setattr(chunking, "examples_per_chunk", lambda _: 2**30)
    monkeypatch.setattr(rounding, "examples_per_chunk", lambda _: 1)
    monkeypatch.setattr(_batch_sum, "CHUNK", 2**30)
    monkeypatch.setattr(_batch_sum, "RUN", 2**30)
    monkeypatch.setattr(_batch_sum, "MAX_FLOAT32_ADDITIONS", 2**90)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_one_example_moves_a_batch_of_1024_by_its_gradient(name, monkeypatch):
    assert worst(name, 1024, monkeypatch) <= ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("batch", [16, 100, 256, 4096, 2**15, 2**16])
@pytest.mark.parametrize("name", FORMS)
def test_one_example_moves_a_batch_of_any_size_by_its_gradient(name, batch, monkeypatch):
    assert worst(name, batch, monkeypatch) <= ALLOWED


@pytest.mark.parametrize("name", ["transposed", "tied"])
def test_the_search_finds_what_a_sum_over_the_whole_batch_loses(name, monkeypatch):
    """Power: the sites are summed one after the other, each over all examples."""
    sum_the_whole_batch(monkeypatch)
    assert worst(name, 1024, monkeypatch) > ALLOWED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transposed", "tied", "bias", "stacked", "microbatched"])
def test_the_search_finds_much_more_in_large_batches(name, monkeypatch):
    """Power, where plain sums are off by several clip bounds."""
    sum_the_whole_batch(monkeypatch)
    assert worst(name, 2**15, monkeypatch) > ALLOWED
