# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A private VAE
#
# Train a variational autoencoder (VAE) privately, so that it does not repeat its training images,
# and look at what it draws.
#
# - **You learn** how to write the ELBO as a loss of one example, how to plan a private run, and how
#   to judge a private generator by numbers and by eye.
# - **You need** `pip install '.[examples]'`, and an idea of what a VAE is.
# - **It takes** about a minute on two CPU cores.

# %%
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

import dpoptax

# %% [markdown]
# ## The data
#
# scikit-learn has small handwritten digits of 8 x 8 pixels. A pixel is a whole number from 0 to 16.
# Divide by this public constant, and not by the largest pixel in the data: a maximum of private
# data reveals something, and no guarantee of the training covers it.

# %%
images = jnp.asarray(load_digits().data, jnp.float32) / 16
train, test = images[:1437], images[1437:]
print("training images", train.shape, " test images", test.shape)


# %% [markdown]
# ## The model
#
# An image has a few latent numbers z. The encoder says which z an image may have: a normal
# distribution with a location and a scale. The decoder turns z into 64 pixels.
#
# The network is small on purpose. Privacy adds noise to the gradient of each parameter, so
# parameters that are not needed only add noise.


# %%
class VAE(nn.Module):
    hidden: int = 40
    latent: int = 5

    def setup(self):
        self.encoder_hidden = nn.Dense(self.hidden)
        self.loc = nn.Dense(self.latent)
        self.log_scale = nn.Dense(self.latent)
        self.decoder_hidden = nn.Dense(self.hidden)
        self.logits = nn.Dense(64)

    def encode(self, image):
        h = nn.softplus(self.encoder_hidden(image))
        return self.loc(h), jnp.exp(self.log_scale(h))

    def decode(self, latent):
        return self.logits(nn.softplus(self.decoder_hidden(latent)))

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


model = VAE()
init_params = model.init(jax.random.key(0), train[0])["params"]
print("parameters", sum(leaf.size for leaf in jax.tree.leaves(init_params)))

# %% [markdown]
# ## The loss of one image
#
# The loss is the negative evidence lower bound (ELBO):
#
#     loss(x) = -E[log p(x | z)] + KL(q(z | x) || N(0, I))
#
# Each image has its own z, so the loss of an image depends on this image alone. Nothing else is
# needed for private training, which must clip the gradient of each image by itself. If the loss
# took a whole batch, with BatchNorm for example, there would be no such gradient.
#
# `local_elbo_loss` needs two functions: the parameters of q(z | x), and log p(x | z). It averages
# over `num_samples` draws of z. More draws take time, but no privacy: they use the same image.


# %%
def encode(params, image):
    return model.apply({"params": params}, image, method="encode")


def log_likelihood(params, latent, image):
    logits = model.apply({"params": params}, latent, method="decode")
    return -jnp.sum(optax.sigmoid_binary_cross_entropy(logits, image))


loss_fn = dpoptax.vi.local_elbo_loss(encode, log_likelihood, num_samples=8)
print("loss of one image", loss_fn(init_params, train[0], jax.random.key(1)))

# %% [markdown]
# ## The plan
#
# The plan states the privacy that you want and the length of the training. `calibrate` finds the
# noise.
#
# - `epsilon=4` with `delta=1e-5` is the guarantee. Delta should be well below one over the number
#   of images.
# - `clip=3` is the most that one image can contribute to the gradient. A larger clip needs more
#   noise.
# - A private run gains from many epochs, since the noise of many steps averages out.

# %%
plan = dpoptax.Plan.calibrate(
    num_examples=len(train),
    expected_batch_size=128,
    epochs=125,
    clip=3.0,
    epsilon=4.0,
    delta=1e-5,
)
print(f"{plan.num_steps} steps, noise multiplier {plan.noise_multiplier:.2f}")

# %% [markdown]
# ## Training
#
# `fit` draws the batches, clips, adds the noise and keeps the account. Any Optax optimizer works.
#
# The key decides the batches and the noise. A fixed key makes this page repeatable, but whoever
# knows it can subtract the noise. For real data leave `key=` out: then it is secret.

# %%
optimizer = optax.adam(7e-3)
private = dpoptax.training.fit(
    loss_fn,
    init_params,
    train,
    plan=plan,
    optimizer=optimizer,
    key=jax.random.key(2),  # for real data, leave this line out
    progress=False,
)
print(f"epsilon {private.epsilon():.2f} at delta {plan.delta}")

# %% [markdown]
# For comparison, train the same model without clipping and without noise. It has no guarantee. (On
# real data you would not keep it, and not even look at it: what you see of it is not covered.)

# %%
nonprivate = dpoptax.training.fit(
    loss_fn,
    init_params,
    train,
    plan=plan.replace(clip=math.inf, noise_multiplier=0.0),
    optimizer=optimizer,
    key=jax.random.key(3),
    progress=False,
)

# %% [markdown]
# ## What privacy costs, in numbers
#
# The test loss is in nats per image, and lower is better. The untrained model shows where the
# training started. The second number is the mean absolute error of reconstructed pixels, from 0 to
# 1.


# %%
def score(params):
    keys = jax.random.split(jax.random.key(4), len(test))
    losses = jax.vmap(loss_fn, in_axes=(None, 0, 0))(params, test, keys)
    pixels = nn.sigmoid(model.apply({"params": params}, test))
    return jnp.mean(losses), jnp.mean(jnp.abs(pixels - test))


trained = {"untrained": init_params, "private": private.params, "not private": nonprivate.params}
for name, params in trained.items():
    loss, error = score(params)
    print(f"{name:12} test loss {loss:5.1f}   error of a pixel {error:.3f}")

# %% [markdown]
# ## What privacy costs, in pictures
#
# Now draw new images. Draw z from N(0, I), decode it, and show the probability of each pixel. The
# real digits are test images, which the models have not seen.


# %% Real digits, digits drawn by the private VAE, and digits drawn by the VAE without privacy
def draw_images(params, key, number):
    latents = jax.random.normal(key, (number, model.latent))
    return nn.sigmoid(model.apply({"params": params}, latents, method="decode"))


def show(panels):
    _, grid = plt.subplots(1, len(panels), figsize=(8, 3.2), layout="constrained")
    for axis, (title, pictures) in zip(grid, panels.items(), strict=True):
        tiles = jnp.pad(pictures.reshape(6, 6, 8, 8), ((0, 0), (0, 0), (0, 1), (0, 1)))
        axis.imshow(tiles.transpose(0, 2, 1, 3).reshape(54, 54), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    plt.show()


show(
    {
        "real": test[:36],
        "drawn, private": draw_images(private.params, jax.random.key(5), 36),
        "drawn, not private": draw_images(nonprivate.params, jax.random.key(5), 36),
    }
)

# %% [markdown]
# ## Does it draw training images?
#
# For each drawn image, find the nearest training image and its distance, the root mean square over
# pixels. Do the same for the test images. If drawn images were much nearer than test images are,
# the model would repeat its training data.
#
# This is a sanity check and not the guarantee. The guarantee is epsilon, and it also holds for
# attacks that nobody has tried. The distances use the training images without noise, so on real
# data they are for your own eyes.


# %%
def distance_to_nearest(pictures):
    squares = jnp.mean((pictures[:, None] - train[None]) ** 2, axis=-1)
    return jnp.mean(jnp.sqrt(jnp.min(squares, axis=1)))


print(f"test images         {distance_to_nearest(test):.3f}")
for name, result in {"private": private, "not private": nonprivate}.items():
    drawn = draw_images(result.params, jax.random.key(6), 360)
    print(f"drawn, {name:12} {distance_to_nearest(drawn):.3f}")

# %% [markdown]
# ## Release
#
# You may publish the private parameters, and as many images as you draw from them: what is computed
# from private parameters costs no further privacy. Publish the report with them.

# %%
print(private.report())

# %% [markdown]
# ## Where to go next
#
# - [Variational inference](../variational_inference.md): other models with latents, also in
#   NumPyro.
# - [Synthetic data](../synthetic_data.md): for a table instead of images.
# - [Choosing hyperparameters](../choosing.md): clip bound, batch size and learning rate.
# - [Is it really private?](../is_it_private.md): attack your own run.
