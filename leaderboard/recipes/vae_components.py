"""A VAE that starts at private principal components. Its encoder also learns without the data."""

import math

import jax
import optax

import dpoptax
from dpoptax.transforms import average_params
from dpoptax.vi.models import bernoulli_vae_loss
from leaderboard.component_vae import LATENT, component_vae, train_on_own_images
from leaderboard.principal_components import private_components, split_budget, together
from leaderboard.recipe import Recipe, Trained

BATCH, STEPS = 1024, 600


def train(data, epsilon, delta, seed):
    images, setting = data.train_inputs, (len(data.train_inputs), BATCH, STEPS, delta)
    noises = split_budget(epsilon, 0.3, *setting)  # of the squared budget, for the components
    key, start_key, init_key, own_key = jax.random.split(jax.random.key(seed), 4)
    start = private_components(images, noises[0], delta, start_key, latent=LATENT, low=14)
    model = component_vae(start)
    result = dpoptax.training.fit(
        bernoulli_vae_loss(model, redraw=True),
        model.init(init_key, start.bias)["params"],
        images,
        plan=dpoptax.Plan(sampler=dpoptax.samplers.Poisson(len(images), BATCH), delta=delta,
                          clip=1.0 if noises[1] else math.inf, noise_multiplier=noises[1],
                          num_steps=STEPS),
        optimizer=optax.chain(optax.adam(optax.cosine_decay_schedule(0.05, STEPS, 0.05)),
                              average_params(start=STEPS * 4 // 5)),
        key=key,
        progress=False,
    )  # fmt: skip
    # After the private steps: more layers for the encoder, and training on the decoder's images.
    model = component_vae(start, wide=256)
    params = model.init(init_key, start.bias)["params"] | result.averaged_params
    params = train_on_own_images(model, params, ("wide", "wide_posterior"), own_key)
    return Trained((model, params), params, together(*noises, *setting), result)


RECIPE = Recipe(name="vae_components", task="mnist_vae", train=train, seconds=300,
                title="VAE that starts at private principal components",
                tuned="on training examples held out",
                notes="About 25 runs and 30 untrained starts chose the settings.")  # fmt: skip
