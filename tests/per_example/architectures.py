"""Models for the tests of gradient forms: a name; a loss of one example, parameters, a batch."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KEY = jax.random.key(0)


def floats(batch, *shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=(batch, *shape)), jnp.float32)


def ids(batch, length=9, vocabulary=6):
    return jnp.asarray(np.random.default_rng(2).integers(vocabulary, size=(batch, length)))


def narrow(batch):
    """Of fewer bits than it takes to count the rows of a table of 300."""
    return (100 + ids(batch, 16, 150)).astype(jnp.uint8)


def by_leaf(weights, tree):
    """Other weights for each leaf, so that a mistaken leaf is found: a tree of `(batch,)`."""
    leaves, structure = jax.tree.flatten(tree)
    rolled = [jnp.roll(jnp.asarray(weights), number) for number in range(len(leaves))]
    return jax.tree.unflatten(structure, rolled)


def energy(outputs):
    """A scalar that every output moves, nonlinearly."""
    return sum(jnp.sum(jnp.tanh(leaf) * (1 + leaf)) for leaf in jax.tree.leaves(outputs))


def drawn(shapes):
    """Parameters of these shapes: initialisers would take longer than the tests."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(0.0, 0.5, spec.shape), spec.dtype), shapes
    )


def linen(model, data):
    def make(batch):
        examples = data(batch)
        example = jax.tree.map(lambda leaf: leaf[0], data(1))
        params = drawn(jax.eval_shape(model.init, KEY, example)["params"])
        return lambda p, x: energy(model.apply({"params": p}, x)), params, examples

    return make


def of_nnx(build, data, keep=nnx.Param):
    built = functools.cache(lambda: nnx.split(build(nnx.Rngs(0)), keep, ...))

    def make(batch):
        graphdef, params, rest = built()
        return lambda p, x: energy(nnx.merge(graphdef, p, rest)(x)), params, data(batch)

    return make


def of_haiku(forward, data):
    def make(batch):
        model = hk.without_apply_rng(hk.transform(forward))
        params = drawn(jax.eval_shape(model.init, KEY, data(1)[0]))
        return lambda p, x: energy(model.apply(p, x)), params, data(batch)

    return make


def of_equinox(build, data):
    def make(batch):
        params, static = eqx.partition(build(KEY), eqx.is_inexact_array)
        return lambda p, x: energy(eqx.combine(p, static)(x)), params, data(batch)

    return make


def plain(loss_fn, shapes, data):
    def make(batch):
        specs = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        return loss_fn, drawn(specs), data(batch)

    return make


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.gelu(nn.DenseGeneral((2, 3))(x)).reshape(len(x), -1))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(6, 4)
        return embed.attend(nn.tanh(nn.Dense(4)(embed(tokens))))


class Bag(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(2)(nn.Embed(6, 4)(tokens).mean(0))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.Conv(6, (2, 3), kernel_dilation=2, feature_group_count=3, padding="VALID")(x)
        x = nn.Conv(12, (3, 3), feature_group_count=6, padding="CIRCULAR")(x)
        x = nn.GroupNorm(2)(nn.ConvTranspose(4, (3, 3), strides=(2, 2), transpose_kernel=False)(x))
        return nn.Dense(2)(nn.avg_pool(x, (2, 2)).reshape(-1))


class Deep(nn.Module):
    """Layers of one kind, scanned over depth."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.remat(nn.Dense)(4)(x)), None

        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack()(x, None)[0]


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(nnx.relu(self.first(x))))


class NnxConv(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.ConvTranspose(6, 4, (3, 3), strides=(2, 2), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


class NnxText(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(6, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.attention(self.embed(tokens)).mean(0))


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(4, 5, rngs=rngs))

    def __call__(self, x):
        return self.rnn(x, initial_carry=jnp.zeros(5))


def convolved_on_condition(w, x):
    branches = (lambda x: convolved(w, x), lambda x: 2 * convolved(w, x))
    return energy(jax.lax.cond(x[0, 0, 0] > 0, *branches, x))


def standardised_convolution(w, x):
    """The kernel is no plain leaf where it meets data."""
    kernel = (w - w.mean()) / jnp.std(w)
    return energy(jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME"))


def convolved(kernel, x):
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME")


def decayed_convolution(w, x):
    """The kernel meets data, and itself."""
    return energy(convolved(w, x)) + 0.1 * jnp.sum(w**2)


def dynamic_filter(w, x):
    """A convolution whose kernel follows from the example."""
    kernel = jnp.tanh(x @ w).reshape(1, 1, 3)
    image = x.reshape(1, 1, len(x))
    return energy(jax.lax.conv_general_dilated(image, kernel, (1,), "SAME"))


def nested_scans(w, x):
    def outer(carry, w):
        inner = jax.lax.scan(lambda c, t: (jnp.tanh(c @ w + t), c), carry, x, reverse=True)
        return inner[0], None

    return energy(jax.lax.scan(outer, jnp.ones(4), w)[0])


def haiku_recurrent(x):
    outputs, _ = hk.dynamic_unroll(hk.LSTM(5), x, hk.LSTM(5).initial_state(None))
    return hk.Linear(2)(outputs)


def equinox_convolutions(key):
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 6, 3, key=keys[0]),
            eqx.nn.GroupNorm(2, 6),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(6, 4, 2, stride=2, key=keys[1]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4, 3, key=keys[2]),
        ]
    )


def joined(w, x):
    """Weights side by side: along the free axis, along the contracted axis, and transposed."""
    y = x @ jnp.concatenate([w["a"], w["b"]], 1) + jnp.concatenate([w["p"], w["q"]]).reshape(1, -1)
    z = jnp.tanh(y) @ jnp.concatenate([w["c"], w["d"]], 0)
    return energy(z @ jnp.concatenate([w["c"], w["d"]], 0).T)


def tied_to_probabilities(w, i):
    rows = w[i]
    return energy(jax.nn.softmax(jnp.tanh(rows) @ jnp.ones((4, 6))) @ w) + energy(rows)


def printed(w, x):
    jax.debug.callback(lambda _: None, w[0])
    return energy(x @ w)


def switch(w, x):
    branches = [
        lambda x: jnp.tanh(x @ w["a"]),
        lambda x: jnp.tanh(x @ w["b"]) @ w["b"],
        lambda x: x * 2,
    ]
    return energy(jax.lax.switch(jnp.int32(3 * jax.nn.sigmoid(x[0])), branches, x))


@jax.custom_vjp
def doubled_gradient(x):
    return x


doubled_gradient.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def nested_grad(w, x):
    """A penalty on the gradient with respect to the input."""
    return jnp.sum(jax.grad(lambda x: energy(jnp.tanh(x @ w)))(x) ** 2) + energy(x @ w)


def rotated(x):
    """Rotary embeddings of `(tokens, heads, width)`."""
    tokens, _, width = x.shape
    angles = jnp.arange(tokens)[:, None] / 100 ** (jnp.arange(width // 2) / width)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def root_mean_square(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def decoder(w, tokens):
    """RMSNorm, grouped queries, rotary embeddings, a gated MLP, a tied table; scanned layers."""

    @jax.checkpoint
    def layer(x, w):
        h = root_mean_square(x, w["before"])
        q, k, v = (jnp.einsum("td,dhk->thk", h, w[name]) for name in "qkv")
        attended = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + jnp.einsum("thk,hkd->td", attended, w["o"])
        h = root_mean_square(x, 1 + w["between"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(layer, w["table"][tokens] * 2.0, w["layers"])
    logits = root_mean_square(x, w["last"]) @ w["table"].T
    return jnp.mean(jax.nn.logsumexp(logits[:-1], axis=-1) - logits[0, tokens[1:]])


DECODER = {
    "layers": {
        "before": (2, 4), "between": (2, 4), "q": (2, 4, 4, 2), "k": (2, 4, 2, 2),
        "v": (2, 4, 2, 2), "o": (2, 4, 2, 4), "gate": (2, 4, 6), "up": (2, 4, 6),
        "down": (2, 6, 4),
    },
    "table": (6, 4),
    "last": (4,),
}  # fmt: skip


ARCHITECTURES = {
    "linen mlp": linen(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]), lambda b: floats(b, 4)),
    "linen mlp over time": linen(
        nn.Sequential([nn.Dense(40), nn.LayerNorm(), nn.softplus, nn.Dense(3, use_bias=False)]),
        lambda b: floats(b, 7, 30),
    ),
    "linen wide over time": linen(nn.Dense(300), lambda b: floats(b, 3, 200)),
    "linen attention": linen(Attention(), lambda b: floats(b, 5, 4)),
    "linen convolutions": linen(Convolutions(), lambda b: floats(b, 13, 12, 3)),
    "linen 1-d convolution": linen(nn.Conv(5, (4,), strides=2), lambda b: floats(b, 11, 3)),
    "linen 3-d convolution": linen(nn.Conv(2, (2, 3, 2)), lambda b: floats(b, 5, 4, 6, 2)),
    "linen wide convolution": linen(nn.Conv(128, (3, 3)), lambda b: floats(b, 4, 4, 40)),
    "linen transposed kernel": linen(
        nn.ConvTranspose(3, (2, 3), transpose_kernel=True), lambda b: floats(b, 5, 4, 2)
    ),
    "linen lstm": linen(nn.RNN(nn.LSTMCell(6)), lambda b: floats(b, 7, 4)),
    "linen concatenated lstm": linen(nn.RNN(nn.OptimizedLSTMCell(6)), lambda b: floats(b, 7, 4)),
    "linen gru": linen(nn.RNN(nn.GRUCell(6), reverse=True), lambda b: floats(b, 7, 4)),
    "linen embedding": linen(Bag(), ids),
    "linen tied embedding": linen(Tied(), ids),
    "linen depth": linen(Deep(), lambda b: floats(b, 4)),
    "linen weight norm": linen(nn.WeightNorm(nn.Dense(3)), lambda b: floats(b, 4)),
    "nnx mlp": of_nnx(NnxMlp, lambda b: floats(b, 4)),
    "nnx convolution": of_nnx(NnxConv, lambda b: floats(b, 8, 8, 3)),
    "nnx text": of_nnx(NnxText, ids),
    "nnx gru": of_nnx(NnxRecurrent, lambda b: floats(b, 7, 4)),
    "nnx lora": of_nnx(
        lambda rngs: nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs),
        lambda b: floats(b, 4),
        nnx.LoRAParam,
    ),
    "haiku mlp": of_haiku(lambda x: hk.nets.MLP([6, 3])(x), lambda b: floats(b, 4)),
    "haiku lstm": of_haiku(haiku_recurrent, lambda b: floats(b, 5, 4)),
    "equinox convolutions": of_equinox(equinox_convolutions, lambda b: floats(b, 2, 8, 8)),
    "decoder": plain(decoder, DECODER, ids),
    "joined": plain(
        joined,
        {"a": (4, 3), "b": (4, 5), "p": (3,), "q": (5,), "c": (3, 6), "d": (5, 6)},
        lambda b: floats(b, 7, 4),
    ),
    "sliced": plain(
        lambda w, x: energy(jnp.tanh(x @ w[:, :4]) @ w[:, 4:]), (4, 7), lambda b: floats(b, 3, 4)
    ),
    "tied to probabilities": plain(tied_to_probabilities, (6, 4), ids),
    "heads": plain(
        lambda w, x: energy(jnp.einsum("bi,bij->bj", x, w)), (3, 4, 5), lambda b: floats(b, 3, 4)
    ),
    "used twice": plain(
        lambda w, x: energy(jnp.tanh(x @ w) @ w), (4, 4), lambda b: floats(b, 4)
    ),
    "used transposed": plain(
        lambda w, x: energy(jnp.tanh(x @ w) @ w.T), (4, 6), lambda b: floats(b, 7, 4)
    ),
    "used in pieces": plain(
        lambda w, x: energy(x[:2] @ w[:2]) + energy(x * w[1]), (4, 4), lambda b: floats(b, 4)
    ),
    "broadcast weight": plain(
        lambda w, x: energy(x @ jnp.broadcast_to(w, (4, 3))), (3,), lambda b: floats(b, 4)
    ),
    "product of weights": plain(
        lambda w, x: energy(x @ (w["a"] @ w["b"])), {"a": (4, 2), "b": (2, 3)},
        lambda b: floats(b, 4),
    ),
    "standardised convolution": plain(
        standardised_convolution, (3, 2, 3, 3), lambda b: floats(b, 2, 5, 5)
    ),
    "nested scans": plain(nested_scans, (2, 4, 4), lambda b: floats(b, 3, 4)),
    "switch": plain(switch, {"a": (4, 4), "b": (4, 4)}, lambda b: floats(b, 4)),
    "checkpoint": plain(
        lambda w, x: energy(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x)),
        (4, 4),
        lambda b: floats(b, 4),
    ),
    "custom derivative": plain(
        lambda w, x: energy(doubled_gradient(x @ w["a"])) + energy(doubled_gradient(w["b"]) * x),
        {"a": (4, 3), "b": (4,)},
        lambda b: floats(b, 4),
    ),
    "nested grad": plain(nested_grad, (4, 3), lambda b: floats(b, 4)),
    "lookup beside arithmetic": plain(
        lambda w, i: energy(w[i]) + energy(w[i[0]] * 2), (6, 3), ids
    ),
    "a part repeated as often as others are dropped": plain(
        lambda w, x: energy(jnp.broadcast_to(w[:1], (4, 3)).T @ x), (4, 3), lambda b: floats(b, 4)
    ),
    "a convolution with weight decay": plain(
        decayed_convolution, (3, 2, 3, 3), lambda b: floats(b, 2, 5, 5)
    ),
    "a convolution by two kernels joined": plain(
        lambda w, x: energy(convolved(jnp.concatenate([w["a"], w["b"]]), x)),
        {"a": (3, 2, 3, 3), "b": (1, 2, 3, 3)},
        lambda b: floats(b, 2, 5, 5),
    ),
    "a convolution of two activations": plain(
        dynamic_filter, (8, 3), lambda b: 0.3 * floats(b, 8)
    ),
    "a cond that holds a convolution": plain(
        convolved_on_condition,
        (3, 1, 3, 3),
        lambda b: floats(b, 1, 5, 5),
    ),
    "lookup by narrow whole numbers": plain(
        lambda w, i: energy(jnp.take(w, i, axis=0)), (300, 64), narrow
    ),
    "tied lookup by narrow whole numbers": plain(
        lambda w, i: jax.nn.logsumexp(w @ jnp.take(w, i, axis=0).mean(0)), (300, 64), narrow
    ),
    "printed": plain(printed, (4, 3), lambda b: floats(b, 4)),
    "by platform": plain(
        lambda w, x: energy(jax.lax.platform_dependent(x, w, default=jnp.dot)),
        (4, 3),
        lambda b: floats(b, 4),
    ),
    "lookup beyond the table, clipped": plain(
        lambda w, i: energy(w.at[i].get(mode="clip")), (4, 3), lambda b: 2 * ids(b) - 3
    ),
    "lookup beyond the table, filled": plain(
        lambda w, i: energy(w.at[i].get(mode="fill", fill_value=0)), (4, 3), ids
    ),
}  # fmt: skip
