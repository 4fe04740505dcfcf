"""A VAE around principal components, and training of its encoder that costs no privacy.

A released decoder is a public source of images. An encoder may learn from these images without a
cost in privacy, for any number of steps.

Reference: Hinton, Dayan, Frey and Neal 1995, "The wake-sleep algorithm for unsupervised neural
networks", for training on the decoder's own images.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpoptax.vi.models import bernoulli_vae_loss
from leaderboard.principal_components import Components

ZEROS = nn.initializers.zeros
LATENT, HIDDEN, SEEN, CHANGED = 16, 64, 30, 60
# The encoder has the largest gradients, but starts well. Scaled down, they leave more of the clip
# bound to the decoder.
ENCODER_SCALE = 0.1
# log(2), the softplus of 0, nearly: hidden units start around zero.
AT_ZERO = 0.7


def component_vae(start: Components, *, wide: int = 0) -> nn.Module:
    """Returns a linear VAE of principal components with trained changes, which start at zero.

    Args:
        start: the components.
        wide: units of another hidden layer of the encoder, which sees the pixels; 0 for none.

    Returns:
        A module with `encode` and `decode`, as `dpoptax.vi.models.DenseVAE` has them.
    """

    class ComponentVAE(nn.Module):
        def setup(self) -> None:
            self.encoder, self.decoder = nn.Dense(HIDDEN), nn.Dense(HIDDEN)
            self.posterior = nn.Dense(2 * LATENT, kernel_init=ZEROS)
            self.change = nn.Dense(CHANGED, kernel_init=ZEROS)
            self.shift = self.param("shift", ZEROS, start.bias.shape)
            if wide:
                self.wide = nn.Dense(wide)
                self.wide_posterior = nn.Dense(2 * LATENT, kernel_init=ZEROS)

        def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = (image @ start.whiten - start.offset)[:SEEN]
            moved = ENCODER_SCALE * self.posterior(nn.softplus(self.encoder(scores)) - AT_ZERO)
            if wide:
                moved += self.wide_posterior(nn.softplus(self.wide(image)) - AT_ZERO)
            loc, log_scale = jnp.split(moved, 2)
            return scores[:LATENT] + loc, jnp.exp(log_scale - 1.3)

        def decode(self, latent: jax.Array) -> jax.Array:
            features = jnp.concatenate([latent, nn.softplus(self.decoder(latent)) - AT_ZERO])
            change = start.basis[:, :CHANGED] @ self.change(features)
            return latent @ start.loadings + start.bias + self.shift + change

        def __call__(self, image: jax.Array) -> jax.Array:
            return self.decode(self.encode(image)[0])

    return ComponentVAE()


def train_on_own_images(
    model: nn.Module, params: Any, names: tuple[str, ...], key: Any, *, num_steps: int = 1500
) -> Any:
    """Trains some layers on images that the decoder draws. It reads no private data.

    Args:
        model: with `encode` and `decode`.
        params: all of its parameters, released.
        names: of the layers to train, those of the encoder.
        key: for the images.
        num_steps: of Adam, with 256 images each.

    Returns:
        All parameters.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))
    loss_fn = bernoulli_vae_loss(model, redraw=True)
    trained = {name: params[name] for name in names}

    def draw(key: Any) -> jax.Array:
        latent = jax.random.normal(key, (LATENT,))
        return nn.sigmoid(model.apply({"params": params}, latent, method="decode"))

    def mean_loss(trained: Any, key: Any) -> jax.Array:
        image_keys, keys = jax.random.split(key, (2, 256))
        images = jax.vmap(draw)(image_keys)
        return jnp.mean(jax.vmap(loss_fn, (None, 0, 0))(params | trained, images, keys))

    def step(carry: Any, key: Any) -> tuple[Any, None]:
        trained, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(trained, key), state)
        return (optax.apply_updates(trained, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0][0])
    carry = (trained, optimizer.init(trained))
    return params | run(carry, jax.random.split(key, num_steps))
