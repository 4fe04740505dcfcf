"""The nine models of the benchmarks, each with a loss of one example, parameters and a batch.

Six are those of "Enabling Fast Differentially Private SGD via Just-in-Time Compilation and
Vectorization" (arXiv:2010.09063), and one is the MNIST VAE of d3p (arXiv:2103.11648), with the same
parameter counts. The eighth is a small transformer. In the ninth this transformer is frozen, and
low-rank adapters and a new head are trained (LoRA, arXiv:2106.09685). The data are synthetic,
because speed does not depend on their content.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss


class Workload(NamedTuple):
    """A model with data of its shape.

    Attributes:
        loss_fn: of one example, `loss_fn(params, example)` or with a key.
        params: its parameters.
        examples: a batch.
        key: for a loss that draws, else None.
    """

    loss_fn: Callable[..., jax.Array]
    params: Any
    examples: Any
    key: jax.Array | None


PARAMETER_COUNTS = {
    "logistic": 105,
    "fcnn": 5_352,
    "vae": 688_884,
    "mnist": 26_010,
    "embedding": 160_098,
    "cifar": 605_226,
    "lstm": 1_081_002,
    "transformer": 1_053_442,
    "lora": 8_450,
}


class Logistic(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)[0]


class Fcnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(50)(x)))


class MnistCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (8, 8), strides=2, padding="SAME")(x))
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        x = nn.relu(nn.Conv(32, (4, 4), strides=2, padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), strides=(1, 1))
        return nn.Dense(10)(nn.relu(nn.Dense(32)(x.reshape(-1))))


class CifarCnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (32, 64, 128):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(256, (3, 3))(x))
        return nn.Conv(10, (3, 3))(x).mean((0, 1))


class Embedding(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(2)(nn.Embed(10_004, 16)(ids).mean(0))


class Lstm(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(2)(nn.RNN(nn.LSTMCell(100))(nn.Embed(10_004, 100)(ids)).mean(0))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        positions = self.param("positions", nn.initializers.normal(0.02), (128, 128))
        x = nn.Embed(5_000, 128)(ids) + positions
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.Dense(2)(nn.LayerNorm()(x).mean(0))


class LoraBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)

        def heads(name, adapted):
            z = nn.Dense(128, name=name)(y)
            if adapted:
                low = nn.Dense(8, use_bias=False, name=f"adapter_{name}_in")(y)
                z += nn.Dense(128, use_bias=False, name=f"adapter_{name}_out")(low)
            return z.reshape(-1, 4, 32)

        attended = nn.dot_product_attention(
            heads("query", True), heads("key", False), heads("value", True)
        )
        x = x + nn.Dense(128)(attended.reshape(x.shape))
        return x + nn.Dense(128)(nn.gelu(nn.Dense(512)(nn.LayerNorm()(x))))


class LoraTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        positions = self.param("positions", nn.initializers.normal(0.02), (128, 128))
        x = nn.Embed(5_000, 128)(ids) + positions
        for _ in range(2):
            x = LoraBlock()(x)
        return nn.Dense(2, name="adapter_head")(nn.LayerNorm()(x).mean(0))


MODELS = {
    "logistic": (Logistic(), (104,), None, None),
    "fcnn": (Fcnn(), (104,), None, 2),
    "vae": (DenseVAE(), (784,), None, None),
    "mnist": (MnistCnn(), (28, 28, 1), None, 10),
    "embedding": (Embedding(), (256,), 10_004, 2),
    "cifar": (CifarCnn(), (32, 32, 3), None, 10),
    "lstm": (Lstm(), (256,), 10_004, 2),
    "transformer": (Transformer(), (128,), 5_000, 2),
    "lora": (LoraTransformer(), (128,), 5_000, 2),
}


def bare(model: nn.Module, x: jax.Array) -> Workload:
    """A model or a layer on its own, under a loss that uses all its outputs."""
    params = model.init(jax.random.key(1), x[0])["params"]

    def loss_fn(params, example):
        return jnp.sum(jnp.square(model.apply({"params": params}, example)))

    return Workload(loss_fn, params, x, None)


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a parameter of the ninth model is trained."""
    return any(part.startswith("adapter") for part in path)


def workload(name: str, batch: int) -> Workload:
    """Builds one of `MODELS` with a batch of synthetic data."""
    model, shape, vocabulary, classes = MODELS[name]
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    if vocabulary is None:
        x = jax.random.uniform(x_key, (batch, *shape))
    else:
        x = jax.random.randint(x_key, (batch, *shape), 0, vocabulary)
    # Compiled: as single operations, the layers take longer to compile than all of `init`.
    params, frozen = jax.jit(model.init)(key, x[0])["params"], {}
    if name == "lora":
        leaves = flatten_dict(params)
        params, frozen = (
            {path: leaf for path, leaf in leaves.items() if is_adapter(path) == trained}
            for trained in (True, False)
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if count != PARAMETER_COUNTS[name]:
        raise AssertionError(f"{name} has {count} parameters, not {PARAMETER_COUNTS[name]}")
    if name == "vae":
        return Workload(bernoulli_vae_loss(model), params, x, key)
    if classes is None:
        y = jax.random.bernoulli(y_key, 0.5, (batch,)).astype(jnp.float32)
        loss_of = optax.sigmoid_binary_cross_entropy
    else:
        y = jax.random.randint(y_key, (batch,), 0, classes)
        loss_of = optax.softmax_cross_entropy_with_integer_labels

    def loss_fn(params, example):
        whole = unflatten_dict({**frozen, **params}) if frozen else params
        return loss_of(model.apply({"params": whole}, example[0]), example[1])

    return Workload(loss_fn, params, (x, y), None)
