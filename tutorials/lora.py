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
# # Adapters on a frozen backbone (LoRA)
#
# Train a network on public images without privacy, freeze it, and adapt it to private images with
# low-rank adapters. Compare accuracy and memory with private training of all parameters.
#
# - **You learn** how to freeze a part of a model, why few trained parameters suit private
#   training, and what must be public.
# - **You need** the page [Start](../start.md), and some Flax NNX.
# - **It takes** about a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy import ndimage
from sklearn.datasets import load_digits

import dpoptax

# %% [markdown]
# ## Public images and private images
#
# scikit-learn's handwritten digits play both parts. 800 of them are public, for example from an
# old study. The others are private, and come from another scanner: they are turned by 20 degrees
# and noisy. No image is in both parts. This matters: **the backbone remembers its training images,
# so each of them must be public.**

# %%
images, digits = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
images, digits = images[order].reshape(-1, 8, 8) / 16, digits[order].astype(np.int32)

turned = ndimage.rotate(images[800:], 20, axes=(1, 2), reshape=False, order=1)
scanned = np.clip(turned + 0.1 * rng.normal(size=turned.shape), 0, 1)


def flat(pictures):
    return pictures.reshape(-1, 64).astype(np.float32)


public = (flat(images[:800]), digits[:800])
private = (flat(scanned[:700]), digits[800:1500])
test = (flat(scanned[700:]), digits[1500:])
print(f"{len(public[0])} public, {len(private[0])} private, {len(test[0])} test images")

# %% Digits of the public data, and digits of the private data, which are turned and noisy
figure, axes = plt.subplots(2, 8, figsize=(7, 2.2))
for row, (name, pictures) in zip(axes, (("public", public), ("private", test)), strict=True):
    for axis, picture in zip(row, pictures[0], strict=False):
        axis.imshow(picture.reshape(8, 8), cmap="gray_r")
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
plt.show()

# %% [markdown]
# The picture shows test images in the second row, and no image that we train on privately. A
# picture of a private image would be a release without noise.
#
# ## The backbone: ordinary training
#
# Three layers, trained on the public images without clip and noise.

# %%
WIDTH = 200


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, image):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(image)))))


def loss(model, example):
    image, digit = example
    return optax.softmax_cross_entropy_with_integer_labels(model(image), digit)


def accuracy(model, data):
    return float(jnp.mean(jnp.argmax(model(data[0]), axis=1) == data[1]))


def train_without_privacy(model, wrt, data, learning_rate):
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        def mean_loss(model):
            return jnp.mean(loss(model, data))

        optimizer.update(model, nnx.grad(mean_loss, argnums=nnx.DiffState(0, wrt))(model))

    for _ in range(150):
        step(model, optimizer)
    return model


backbone = train_without_privacy(Network(nnx.Rngs(0)), nnx.Param, public, 1e-3)
print(f"accuracy on public images, which it has seen: {accuracy(backbone, public):.3f}")
print(f"accuracy on images of the other scanner:      {accuracy(backbone, test):.3f}")

# %% [markdown]
# ## The adapters
#
# An adapter adds a product A B to a frozen weight: A has `RANK` columns and B has `RANK` rows. B
# starts at zero, so that the adapted network starts as the backbone. `nnx.LoRA` makes both.
#
# `wrt` names what is trained. All other variables are constants of the loss: they have no gradient
# and get no noise. We train the adapters, which are of the type `nnx.LoRAParam`, and the last
# layer, `head`. `nnx.Param` would train the whole backbone too.

# %%
RANK = 4


def with_adapters(model):
    rngs = nnx.Rngs(1)
    model = nnx.clone(model)
    model.first = nnx.LoRA(64, RANK, WIDTH, base_module=model.first, rngs=rngs)
    model.second = nnx.LoRA(WIDTH, RANK, WIDTH, base_module=model.second, rngs=rngs)
    return model


adapters = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))
adapted = with_adapters(backbone)
same = jnp.array_equal(adapted(test[0]), backbone(test[0]))
print("starts as the backbone:", bool(same))

# %% [markdown]
# ## Private training, three ways
#
# The same plan for all: the epsilon depends on sampling, noise and steps, and not on how many
# parameters there are. But the more parameters there are, the more harm the noise
# does: each of them gets noise, while the clip bounds the gradient as a whole.
#
# - **adapters and head**: the backbone is frozen.
# - **all parameters, from the backbone**: nothing is frozen.
# - **all parameters, from scratch**: no public images.

# %%
plan = dpoptax.Plan.calibrate(
    num_examples=len(private[0]),
    expected_batch_size=100,
    num_steps=100,
    epsilon=1.0,
    delta=1e-4,
    clip=1.0,
)


def train_privately(model, wrt, learning_rate):
    """Trains a copy of the model; returns it, and the result of the run."""
    model = nnx.clone(model)
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=wrt)
    result = dpoptax.training.fit(
        loss_fn,
        params,
        private,
        plan=plan,
        optimizer=optax.adam(learning_rate),
        key=jax.random.key(2),  # for real data, leave this line out
        progress=False,
    )
    nnx.update(model, result.params)
    return model, result


ways = {
    "adapters and head": (adapted, adapters),
    "all, from the backbone": (backbone, nnx.Param),
    "all, from scratch": (Network(nnx.Rngs(3)), nnx.Param),
}
found = {}
for name, (model, wrt) in ways.items():
    runs = [train_privately(model, wrt, rate) for rate in (0.003, 0.01, 0.03)]
    found[name] = max(runs, key=lambda run: accuracy(run[0], test))
    rates = ", ".join(f"{accuracy(model, test):.3f}" for model, _ in runs)
    print(f"{name:24} accuracy {rates} with learning rates 0.003, 0.01, 0.03")

# %% [markdown]
# From here on, each way has its best learning rate. The test images are not private here, so the
# choice is free. On private data, each of these runs would count: see [Choosing
# hyperparameters](../choosing.md#if-you-do-compare-settings).
#
# ## Memory
#
# Noise, gradient and the two moments of Adam each have one number per trained parameter.

# %%
names, scores = ["backbone, not adapted"], [accuracy(backbone, test)]
for name, (model, result) in found.items():
    trained = sum(leaf.size for leaf in jax.tree.leaves(result.params))
    kilobytes = 4 * 4 * trained / 1000  # four numbers of four bytes
    names.append(name)
    scores.append(accuracy(model, test))
    print(f"{name:24} {trained:6,} parameters, {kilobytes:7,.0f} kB for noise, gradient and Adam")
open_adapters = train_without_privacy(with_adapters(backbone), adapters, private, 3e-3)
names.append("adapters, without privacy")
scores.append(accuracy(open_adapters, test))
standard_error = np.sqrt(0.8 * 0.2 / len(test[0]))
print(f"an accuracy near 0.8 has a standard error of {standard_error:.3f}")

# %% Accuracy on test images of the other scanner
colors = ["tab:gray", "tab:blue", "tab:orange", "tab:orange", "black"]
bars = plt.barh(names[::-1], scores[::-1], color=colors[::-1])
plt.bar_label(bars, fmt="%.2f", padding=3)
plt.xlim(0, 1.1)
plt.xlabel(f"accuracy, private ones at epsilon {plan.epsilon():.1f}")
plt.show()

# %% [markdown]
# There are few test images, so differences of about one standard error are chance. The adapters do
# not lose accuracy against all parameters from the same backbone, and need a small part of the
# memory. Without public images, the network learns less at this epsilon.
#
# ## The report
#
# It is about the private images. The backbone is not in it: whoever was in the public images has
# no guarantee.

# %%
print(found["adapters and head"][1].report())

# %% [markdown]
# ## Where to go next
#
# - [Fine-tune a language model with adapters](../trainers/lora.md): a real pretrained model, and
#   what a step costs.
# - [Make your loop private](../adoption.md): the same in your own loop.
# - [Large models](../large_models.md): when all parameters are trained.
# - [A transformer on text](transformer_linen.md): a model without a public backbone.
