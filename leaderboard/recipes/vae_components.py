"""A VAE that starts at private principal components, and trains small corrections."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.vi.contrib import average_iterates, polyak_average
from dpoptax.vi.models import bernoulli_vae_loss
from leaderboard.principal_components import private_components, split_budget, together
from leaderboard.recipe import Recipe, Trained

LATENT, HIDDEN, SEEN, CHANGED, BATCH, STEPS = 16, 64, 30, 60, 1024, 500
# The encoder has the largest gradients, but starts well. Scaled down, they leave more of the clip
# bound to the decoder.
ENCODER_SCALE = 0.1


def vae(start):
    class VAE(nn.Module):
        def setup(self):
            zeros = nn.initializers.zeros
            self.encoder, self.decoder = nn.Dense(HIDDEN), nn.Dense(HIDDEN)
            self.posterior = nn.Dense(2 * LATENT, kernel_init=zeros)
            self.change = nn.Dense(CHANGED, kernel_init=zeros)
            self.shift = self.param("shift", zeros, start.bias.shape)

        def encode(self, image):
            scores = (image @ start.whiten - start.offset)[:SEEN]
            hidden = nn.softplus(self.encoder(scores)) - 0.7
            loc, log_scale = jnp.split(ENCODER_SCALE * self.posterior(hidden), 2)
            return scores[:LATENT] + loc, jnp.exp(log_scale - 1.2)

        def decode(self, latent):
            hidden = nn.softplus(self.decoder(latent)) - 0.7
            change = start.basis[:, :CHANGED] @ self.change(jnp.concatenate([latent, hidden]))
            return latent @ start.loadings + start.bias + self.shift + change

        def __call__(self, image):
            return self.decode(self.encode(image)[0])

    return VAE()


def train(data, epsilon, delta, seed):
    images, setting = data.train_inputs, (len(data.train_inputs), BATCH, STEPS, delta)
    noises = split_budget(epsilon, 0.2, *setting)  # a fifth of the squared budget for the start
    key, start_key, init_key = jax.random.split(jax.random.key(seed), 3)
    model = vae(private_components(images, noises[0], delta, start_key, latent=LATENT, low=14))
    result = dpoptax.training.fit(
        bernoulli_vae_loss(model, redraw=True),
        model.init(init_key, images[0])["params"],
        images,
        plan=dpoptax.Plan(sampler=dpoptax.samplers.Poisson(len(images), BATCH), delta=delta,
                          clip=1.0 if noises[1] else math.inf, noise_multiplier=noises[1],
                          num_steps=STEPS),
        optimizer=optax.chain(optax.adam(optax.cosine_decay_schedule(0.03, STEPS, 0.05)),
                              average_iterates(start=STEPS * 4 // 5)),
        key=key,
        progress=False,
    )  # fmt: skip
    params = polyak_average(result.state.opt_state)
    return Trained((model, params), params, together(*noises, *setting))


RECIPE = Recipe(
    name="vae_components",
    task="mnist_vae",
    title="VAE that starts at private principal components",
    tuned="on training examples held out",
    train=train,
    seconds=300,
)
