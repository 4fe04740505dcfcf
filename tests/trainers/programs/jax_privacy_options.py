"""Calls JAX Privacy's `clipped_grad` and ours with the same arguments, and compares the results."""

import functools
import itertools
import warnings

# Optax warns of a function that JAX Privacy 2.0 calls.
warnings.simplefilter("ignore", DeprecationWarning)

import dp_accounting  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax_privacy import clipping  # noqa: E402

from dpoptax.compat import jax_privacy as ours  # noqa: E402

KEY = jax.random.key(0)
BOTH = clipping.clipped_grad, ours.clipped_grad
compared = 0


def compare(fun, args, kwargs=None, jit=True, rtol=2e-5, **options):
    """Both functions give the same trees, types, values and sensitivities."""
    global compared
    theirs, own = (clipped_grad(fun, **options) for clipped_grad in BOTH)
    assert type(own) is type(theirs)
    assert own.has_aux == theirs.has_aux
    for relation in dp_accounting.NeighboringRelation:
        assert own.sensitivity(relation) == theirs.sensitivity(relation)
    assert own.sensitivity() == theirs.sensitivity()
    expected, found = (
        (jax.jit(fn) if jit else fn)(*args, **(kwargs or {})) for fn in (theirs, own)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected), options
    named = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(named, jax.tree.leaves(found), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), (options, path)
        want = np.asarray(want, np.float64)
        atol = rtol * np.max(np.abs(want), initial=0) + 1e-12
        np.testing.assert_allclose(got, want, rtol=rtol, atol=atol, err_msg=f"{options} {path}")
    compared += 1


def normal(number, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, number), shape)


def mlp_with_aux(params, x, y):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    out = hidden @ params["w2"]
    return jnp.mean((out - y) ** 2), {"out": out, "max": jnp.max(hidden), "none": None}


def mlp(params, x, y):
    return mlp_with_aux(params, x, y)[0]


PARAMS = {"w1": normal(0, 5, 7), "b1": jnp.zeros(7), "w2": normal(1, 7, 2)}
X, Y = normal(2, 6, 5), normal(3, 6, 2)
PADDING = jnp.array([False, True, False, False, True, True])
on_mlp = functools.partial(compare, mlp, (PARAMS, X, Y), batch_argnums=(1, 2))


def options():
    flags = itertools.product([False, True], repeat=4)
    for number, (aux, values, norms, rescale) in enumerate(flags):
        compare(
            mlp_with_aux if aux else mlp,
            (PARAMS, X, Y),
            batch_argnums=(1, 2),
            l2_clip_norm=0.7,
            has_aux=aux,
            return_values=values,
            return_grad_norms=norms,
            rescale_to_unit_norm=rescale,
            normalize_by=(1.0, 4.0)[number % 2],
            microbatch_size=(None, 2, 3)[number % 3],
            keep_batch_dim=number % 5 < 3,
        )
    for bound, rescale in itertools.product([0.0, 1e-3, 100, np.inf], [False, True]):
        on_mlp(l2_clip_norm=bound, rescale_to_unit_norm=rescale)
    on_mlp(l2_clip_norm=0.7, jit=False)
    on_mlp(l2_clip_norm=0.7, dtype=jnp.float32, nan_safe=False)
    for size in (None, 1, 3):
        on_mlp({"is_padding_example": PADDING}, l2_clip_norm=0.7, microbatch_size=size)
    everything = {"return_values": True, "return_grad_norms": True, "l2_clip_norm": 0.7}
    on_mlp({"is_padding_example": PADDING}, **everything)
    unused = {**PARAMS, "unused": jnp.ones(3)}
    compare(mlp, (unused, X, Y), batch_argnums=(1, 2), l2_clip_norm=0.7)


def arguments():
    def product(a, b, x, y, scale):
        return jnp.mean((jnp.tanh(x @ a) @ b * scale - y) ** 2)

    a, b = PARAMS["w1"], PARAMS["w2"]
    for argnums in (0, 1, (0, 1), (1, 0), (0,)):
        compare(
            *(product, (a, b, X, Y, 2.0)),
            argnums=argnums,
            batch_argnums=(2, 3),
            l2_clip_norm=0.3,
            jit=argnums != 0,
        )

    def noisy(params, x, key):
        return jnp.mean(params["w"] * x + params["b"] + jax.random.normal(key, x.shape))

    floats = {"w": 2.5, "b": 1.0}
    for key in (KEY, jax.random.PRNGKey(0)):
        args = floats, jnp.array([10.0, 20, 30]), key
        compare(noisy, args, l2_clip_norm=1.0, prng_argnum=2, return_values=True)
        compare(noisy, args, l2_clip_norm=1.0, return_values=True)

    def weighted(params, x, *, weight):
        return jnp.mean((x @ params["w1"]) ** 2) * weight

    compare(weighted, (PARAMS, X), {"weight": jnp.arange(6.0)}, l2_clip_norm=0.5)

    def as_keras_calls_it(trained, state, x, y, sample_weight, training, rest):
        assert training is True
        assert y is None
        out = x @ trained[0] + state[0]
        return jnp.mean(out**2 * sample_weight), (jnp.float32(1.0), out, list(state))

    compare(
        as_keras_calls_it,
        ([a], [jnp.ones(7)], X, None, jnp.ones(6), True, [jnp.ones(3)]),
        has_aux=True,
        return_values=True,
        batch_argnums=(2, 3, 4),
        microbatch_size=2,
        l2_clip_norm=0.5,
        jit=False,
    )
    groups = normal(7, 3, 4, 5), normal(8, 3, 4, 2)
    compare(
        *(mlp, (PARAMS, *groups)),
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        return_grad_norms=True,
        l2_clip_norm=0.5,
    )

    def other_tree(grad):
        return [jnp.concatenate([0.1 * grad["w1"].ravel(), grad["b1"]]), grad["w2"]]

    for size, transform in ((None, other_tree), (2, other_tree), (None, lambda grad: grad)):
        on_mlp(
            pre_clipping_transform=transform,
            microbatch_size=size,
            return_grad_norms=True,
            l2_clip_norm=0.5,
        )


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.GroupNorm(2)(nn.avg_pool(x, (2, 2), (2, 2)))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.1), (5, 8))
        mixed = nn.SelfAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + nn.Dropout(0.2, deterministic=False)(mixed)
        return embed.attend(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x)))))


def cnn_loss(params, images, labels):
    logits = CNN().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


IMAGES, LABELS = normal(5, 6, 8, 8, 1), jnp.arange(6) % 3


def models():
    params = CNN().init(KEY, IMAGES[:1])["params"]
    both = {"return_values": True, "return_grad_norms": True, "l2_clip_norm": 0.5}
    compare(cnn_loss, (params, IMAGES, LABELS), batch_argnums=(1, 2), **both)

    tokens = jax.random.randint(KEY, (6, 5), 0, 11)
    params = Decoder().init({"params": KEY, "dropout": KEY}, tokens[:1])["params"]

    def decoder_loss(params, tokens, key):
        logits = Decoder().apply({"params": params}, tokens, rngs={"dropout": key})
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    for size in (None, 3):
        compare(decoder_loss, (params, tokens, KEY), prng_argnum=2, microbatch_size=size, **both)
    # One dropout mask for all examples, as theirs allows.
    compare(decoder_loss, (params, tokens, KEY), **both)

    def scanned(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ weight), None

        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2)

    compare(scanned, (normal(9, 3, 5, 5), X), **both)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (PARAMS, X, Y))
    compare(mlp, narrow, batch_argnums=(1, 2), dtype=jnp.float32, l2_clip_norm=0.5, rtol=0.03)

    def of_two_models(clipped_grad):
        grad_fn = clipped_grad(mlp, l2_clip_norm=0.5, batch_argnums=(1, 2))
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
        return jax.jit(jax.vmap(grad_fn, (0, None, None)))(two, X, Y)

    theirs, own = map(of_two_models, BOTH)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), own, theirs)


def differences():
    """Where theirs lets one example move the sum by more than the bound, ours does not."""
    params = CNN().init(KEY, IMAGES[:1])["params"]
    broken = IMAGES.at[0].set(jnp.nan)
    grad_fn = jax.jit(ours.clipped_grad(cnn_loss, batch_argnums=(1, 2), l2_clip_norm=0.5))
    with_it = grad_fn(params, broken, LABELS)
    without = grad_fn(params, IMAGES, LABELS, is_padding_example=jnp.arange(6) == 0)
    jax.tree.map(np.testing.assert_array_equal, with_it, without)

    # Of a gradient that is partly NaN, theirs adds the rest.
    x = jnp.array([[0.3, jnp.nan], [0.1, 0.2]])
    sums = [fn(lambda w, x: jnp.sum(x @ w), l2_clip_norm=1.0)(jnp.ones(2), x) for fn in BOTH]
    np.testing.assert_allclose(sums, [[0.4, 0.2], [0.1, 0.2]], rtol=1e-5)

    # 258 and 259 are no neighbours in bfloat16, where 259 becomes 260.
    moved = []
    for clipped_grad in BOTH:
        grad_fn = clipped_grad(lambda w, x: jnp.sum(x @ w), l2_clip_norm=8.0)
        one, two = (
            grad_fn(jnp.zeros(64, jnp.bfloat16), jnp.ones((size, 64), jnp.bfloat16))
            for size in (258, 259)
        )
        difference = np.asarray(two, np.float64) - np.asarray(one, np.float64)
        moved.append(np.linalg.norm(difference) / 8)
    print("moved by one more example in bfloat16, in bounds:", *moved)
    assert moved[0] > 1.5
    assert moved[1] < 1.03


for part in (options, arguments, models, differences):
    part()
print(f"{compared} calls agree")
