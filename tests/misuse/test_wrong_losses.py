"""A loss written for something else: the error says how it was called, and what to write."""

import functools
import re
import traceback

import jax
import jax.numpy as jnp
import optax
import pytest

import dpoptax
from dpoptax.training import fit

# Numbers that would be recognised in an error.
SECRET = 8274.5
PARAMS = {"w": jnp.full((3, 2), SECRET)}
BATCH = {"x": jnp.full((5, 3), SECRET), "y": jnp.zeros((5,), jnp.int32)}
PAIR = (BATCH["x"], BATCH["y"])
KEY = jax.random.key(0)
CALLED = (
    r"dpoptax called loss_fn with params, one example and no batch axis \(example\['x'\]: "
    r"float32\[3\], example\['y'\]: int32\[\]\), and no PRNG key\..*x\[None\]"
)


def logits(p, x):
    return x @ p["w"]


def cross_entropy(p, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y)


def batched(p, batch):
    """A loss of a whole batch, with its axis named."""
    outputs = jnp.einsum("bi,io->bo", batch["x"], p["w"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]))


def over_the_batch(p, batch):
    return jnp.mean(jax.vmap(functools.partial(cross_entropy, p))(batch["x"], batch["y"]))


# name: (loss, examples, key, what the error with its notes must say)
WRONG = {
    "for a batch, einsum": (batched, BATCH, None, CALLED),
    "for a batch, vmap": (over_the_batch, BATCH, None, CALLED),
    "for a batch, index": (lambda p, e: jnp.sum(logits(p, e["x"][:, 0])), BATCH, None, CALLED),
    "three arguments": (
        cross_entropy,
        PAIR,
        None,
        r"called with \(params, example\): example\[0\]: float32\[3\], example\[1\]: int32\[\]. "
        r"Got one that takes \(p, x, y\).*pass lambda params, example: loss\(params, \*example\)",
    ),
    "three arguments and a key": (
        lambda p, x, y: cross_entropy(p, x @ p["w"].T, y),
        PAIR,
        KEY,
        r"and one PRNG key.*The third argument is the key.*loss\(params, \*example\)",
    ),
    "one argument": (lambda p: 0.0, BATCH, None, r"takes \(p\) \(too many positional"),
    "a key that is not taken": (batched, BATCH, KEY, r"Leave out key=, or give loss_fn a third"),
    "a key that is not given": (
        lambda p, e, key: jnp.sum(logits(p, e["x"])),
        BATCH,
        None,
        r"takes \(p, e, key\).*If the third argument is a key, pass key=",
    ),
    "no return": (lambda p, e: None, BATCH, None, "got None. Add the missing return"),
    "with metrics": (
        lambda p, e: (jnp.sum(logits(p, e["x"])), {"accuracy": jnp.zeros(())}),
        BATCH,
        None,
        r"one scalar.*got PyTreeDef.*has_aux=True.*fit\(\.\.\., diagnostics=True\)",
    ),
    "a loss per class": (
        lambda p, e: logits(p, e["x"]),
        BATCH,
        None,
        r"must return a scalar.*got shape \(2,\).*Sum or average over the axes within",
    ),
    "an axis too many": (
        lambda p, e: jnp.sum(logits(p, e["x"][None]), axis=1),
        BATCH,
        None,
        r"must return a scalar.*got shape \(1,\)",
    ),
    "a count of errors": (
        lambda p, e: jnp.sum(jnp.argmax(logits(p, e["x"])) != e["y"]),
        BATCH,
        None,
        "real floating-point loss; got int32.*Convert",
    ),
    "an error of its own": (
        lambda p, e: e["label"],
        BATCH,
        None,
        "label.*" + CALLED,
    ),
}


def told(call):
    """All that a person sees of an error: its message and its notes."""
    with pytest.raises(Exception) as caught:  # noqa: PT011, errors of every type get the note
        call()
    shown = "".join(traceback.format_exception_only(caught.value)).replace("\n", " ")
    assert str(SECRET) not in shown
    return caught.value, shown


@pytest.mark.parametrize(("loss", "examples", "key", "message"), WRONG.values(), ids=WRONG)
def test_the_error_says_what_the_loss_was_called_with(loss, examples, key, message):
    grads_fn = dpoptax.per_example_grads(loss)
    _, shown = told(lambda: grads_fn(PARAMS, examples, key=key))
    assert re.search(message, shown), shown


def test_the_type_of_the_error_and_its_own_text_stay():
    error, _ = told(lambda: dpoptax.per_example_grads(lambda p, e: e["label"])(PARAMS, BATCH))
    assert type(error) is KeyError
    assert error.args == ("label",)


def test_many_leaves_are_summarized():
    wide = [jnp.zeros((5, 2))] * 30
    _, shown = told(lambda: dpoptax.per_example_grads(lambda p, e: e["no"])(PARAMS, wide))
    assert "example[5]: float32[2], and 24 more)" in shown


@pytest.mark.seconds
def test_fit_says_the_same_before_the_first_step():
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(5, 2), clip=1.0, noise_multiplier=1.0, num_steps=1,
        delta=1e-3,
    )  # fmt: skip
    options = {"plan": plan, "optimizer": optax.sgd(0.1), "progress": False}
    _, shown = told(lambda: fit(batched, PARAMS, BATCH, **options))
    assert "no batch axis (example['x']: float32[3]" in shown
    # Its third argument is taken for a key.
    _, shown = told(lambda: fit(cross_entropy, PARAMS, PAIR, **options))
    assert "The third argument is the key." in shown


def no_metrics(p, e):
    return jnp.sum(logits(p, e["x"]))


def test_metrics_are_returned_beside_the_losses():
    def loss(p, e):
        outputs = logits(p, e["x"])
        return jnp.sum(outputs), {"sum": jnp.sum(e["x"]), "hit": jnp.argmax(outputs) == e["y"]}

    mask = jnp.array([True, True, False, True, True])
    for microbatch_size in (None, 2):
        fn = dpoptax.value_and_per_example_grads(
            loss, has_aux=True, microbatch_size=microbatch_size
        )
        losses, aux = jax.jit(lambda fn=fn: fn(PARAMS, BATCH, mask=mask)[0])()
        assert losses.shape == (5,)
        assert aux["sum"].tolist() == [3 * SECRET, 3 * SECRET, 0.0, 3 * SECRET, 3 * SECRET]
        assert aux["hit"].tolist() == [True, True, False, True, True]
    with pytest.raises(ValueError, match=r"with has_aux, loss_fn must return a pair"):
        dpoptax.value_and_per_example_grads(no_metrics, has_aux=True)(PARAMS, BATCH)


def test_a_loss_with_metrics_may_close_over_arrays():
    scale = jnp.array([2.0, 3.0])
    fn = dpoptax.value_and_per_example_grads(
        lambda w, x: (jnp.sum(w * scale) * x, {"scale": scale}), has_aux=True
    )
    (losses, aux), grads = fn(jnp.ones(2), jnp.array([1.0, 10.0]))
    assert losses.tolist() == [5.0, 50.0]
    assert aux["scale"].tolist() == [[2.0, 3.0]] * 2
    assert grads.stacked().tolist() == [[2.0, 3.0], [20.0, 30.0]]
