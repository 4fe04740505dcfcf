"""Models: their published sizes, and their likelihoods against direct computations."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.vi import models


class ConvVAE(nn.Module):
    """The convolutional VAE of the d3p paper (arXiv:2103.11648), for CIFAR."""

    latent: int = 50
    features: tuple[int, ...] = (32, 64, 128)
    shape: tuple[int, int, int] = (32, 32, 3)

    def setup(self):
        rows, columns, channels = self.shape
        # Every convolution has stride 2.
        reduced = 2 ** len(self.features)
        self.small = (rows // reduced, columns // reduced, self.features[-1])
        self.down = [nn.Conv(size, (4, 4), strides=2) for size in self.features]
        self.loc, self.log_scale = nn.Dense(self.latent), nn.Dense(self.latent)
        self.wide = nn.Dense(int(np.prod(self.small)))
        upwards = (*reversed(self.features[:-1]), channels)
        self.up = [nn.ConvTranspose(size, (4, 4), strides=(2, 2)) for size in upwards]

    def encode(self, image):
        for layer in self.down:
            image = nn.relu(layer(image))
        flat = image.reshape(-1)
        return self.loc(flat), jnp.exp(self.log_scale(flat))

    def decode(self, latent):
        image = nn.relu(self.wide(latent)).reshape(self.small)
        for layer in self.up[:-1]:
            image = nn.relu(layer(image))
        return self.up[-1](image)

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


SIZES = {
    "dense": (models.DenseVAE(), (784,), 688_884),
    "convolutional": (ConvVAE(), (32, 32, 3), 640_423),
}


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def encode_and_decode(model, image, label=None):
    """Runs encoder and decoder, so that `init` makes all layers."""
    loc, scale = model.encode(image, *([] if label is None else [label]))
    return model.decode(loc + scale, *([] if label is None else [label]))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "shape", "size"), SIZES.values(), ids=SIZES)
def test_sizes_are_the_published_ones_and_gradients_private(model, shape, size):
    image = jnp.zeros(shape)
    params = jax.jit(nn.init(encode_and_decode, model))(jax.random.key(0), image)["params"]
    assert count(params) == size
    grads_fn = dpoptax.per_example_grads(models.bernoulli_vae_loss(model))

    @jax.jit
    def squared_norms(params, images):
        return grads_fn(params, images, key=jax.random.key(1)).squared_norms()

    found = squared_norms(params, jnp.stack([image, image + 1]))
    norms = jnp.stack(jax.tree.leaves(found))
    assert bool(jnp.all(jnp.isfinite(norms)) & jnp.all(norms.sum(0) > 0))


@pytest.mark.slow
def test_encoder_and_decoder_see_the_label():
    model = models.DenseVAE(pixels=12, hidden=8, latent=2, num_classes=3,
                            kernel_init=nn.initializers.lecun_normal())  # fmt: skip
    image, key = jnp.linspace(0, 1, 12), jax.random.key(1)
    params = nn.init(encode_and_decode, model)(jax.random.key(0), image, jnp.array(0))["params"]
    loss_fn = models.bernoulli_vae_loss(model)
    losses = {float(loss_fn(params, (image, jnp.array(label)), key)) for label in range(3)}
    assert len(losses) == 3


@pytest.mark.slow
def test_a_redrawn_image_is_black_and_white_and_the_loss_the_same_on_average():
    """At zero weights the encoder ignores the image, so the loss is linear in the pixels."""
    model = models.DenseVAE(pixels=6, hidden=4, latent=2)
    params = nn.init(encode_and_decode, model)(jax.random.key(0), jnp.zeros(6))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["logits"]["bias"] = jnp.linspace(-2.0, 2.0, 6)
    image = jnp.linspace(0.1, 0.9, 6)
    keys = jax.random.split(jax.random.key(1), 20_000)
    grey = models.bernoulli_vae_loss(model)(params, image, keys[0])
    redrawn = jax.vmap(models.bernoulli_vae_loss(model, redraw=True), (None, None, 0))(
        params, image, keys
    )
    assert abs(float(redrawn.mean() - grey)) < 4.5 * float(redrawn.std()) / math.sqrt(20_000)
    assert len(np.unique(np.round(redrawn, 4))) <= 2**6


@pytest.mark.slow
def test_group_weights_are_integrated_out():
    """Quadrature against an average over a million draws of the group's weights."""
    latent = 0.7 * jax.random.normal(jax.random.key(0), (5, 3))
    x, features = jax.random.normal(jax.random.key(1), (5,)), jnp.array([1.0, -0.5, 0.3])
    log_likelihood = models.hierarchical_logistic_regression()
    weights = latent @ features + jax.random.normal(jax.random.key(2), (1_000_000, 5))
    chance = jax.nn.sigmoid(weights @ x)
    for y, expected in ((1.0, chance.mean()), (0.0, 1 - chance.mean())):
        found = jnp.exp(log_likelihood(latent, (x, features, jnp.array(y))))
        assert abs(float(found - expected)) < 4.5 * float(chance.std()) / 1000
