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
# # A private CNN in Flax NNX
#
# Train a convolutional network on handwritten digits, first without privacy and then with it, and
# see what privacy costs.
#
# - **You learn** how to turn an NNX model into a private one, what each number of the plan means,
#   and how accuracy depends on epsilon.
# - **You need** to know NNX a little, and `pip install '.[examples]'`.
# - **It takes** about a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import dpoptax

# %% [markdown]
# ## The data
#
# scikit-learn ships small images of handwritten digits. Imagine that each was written by another
# person, and that nobody may find out whether a given person took part. A fifth of the images is
# for testing.
#
# The pixels are divided by 16, because the format of the images says that 16 is the largest
# value. If you divide by the largest value *in the data* instead, you reveal something about the
# image that has it, and no epsilon counts that.

# %%
pixels, labels = load_digits(return_X_y=True)
images = pixels.reshape(-1, 8, 8, 1).astype(np.float32) / 16
order = np.random.default_rng(0).permutation(len(images))
train = images[order[360:]], labels[order[360:]]
test_images, test_labels = images[order[:360]], labels[order[:360]]
print(len(train[0]), "images to train,", len(test_images), "to test")

# %% Ten handwritten digits
figure, axes = plt.subplots(1, 10, figsize=(7, 0.9))
for axis, image, label in zip(axes, *train):
    axis.imshow(image[..., 0], cmap="gray_r")
    axis.set(xticks=[], yticks=[], title=label)
plt.show()

# %% [markdown]
# ## The model
#
# This is an ordinary NNX module. Two choices help privacy:
#
# - `tanh` in place of ReLU. Its output is bounded, so gradients stay small, and clipping removes
#   less of them.
# - No `BatchNorm`. It mixes the examples of a batch, so one person would change the gradients of
#   the others. dpoptax refuses it. `GroupNorm` and `LayerNorm` are fine.


# %%
class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, image):
        x = nnx.avg_pool(jnp.tanh(self.conv1(image)), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(jnp.tanh(self.conv2(x)), (2, 2), strides=(2, 2))
        return self.dense(x.reshape(*x.shape[:-3], -1))


@nnx.jit
def predict(model, images):
    return jnp.argmax(model(images), axis=-1)


def accuracy(model):
    return float(jnp.mean(predict(model, test_images) == test_labels))


# %% [markdown]
# ## Without privacy
#
# First the usual training, to have something to compare with. This is what you write today.

# %%
public_model = Cnn(nnx.Rngs(0))
optimizer = nnx.Optimizer(public_model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def mean_loss(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(mean_loss)(model))


rng = np.random.default_rng(0)
for _ in range(400):
    rows = rng.choice(len(train[0]), 128, replace=False)
    train_step(public_model, optimizer, train[0][rows], train[1][rows])
accuracy_without_privacy = accuracy(public_model)
print(f"accuracy without privacy: {accuracy_without_privacy:.3f}")

# %% [markdown]
# ## The loss of one example
#
# A private step limits what each person can contribute. So it needs the gradient of each person,
# and not only their mean. You write the loss of **one** image, without a batch axis, and
# `dpoptax.nnx.loss_fn` splits the model into a pure function and its parameters.


# %%
def loss(model, example):
    image, label = example
    return optax.softmax_cross_entropy_with_integer_labels(model(image), label)


model = Cnn(nnx.Rngs(0))
loss_fn, params = dpoptax.nnx.loss_fn(model, loss)
print(sum(leaf.size for leaf in jax.tree.leaves(params)), "parameters")

# %% [markdown]
# ## The plan
#
# A plan holds every number that privacy depends on. You say what you want, and `calibrate` finds
# the noise:
#
# - `epsilon` and `delta` are the guarantee: they limit how well somebody who sees the model can
#   tell whether a given image was used. A smaller `epsilon` is more private. `delta` is the
#   probability that we allow for a failure: keep it far below one divided by the number of
#   examples.
# - `clip` is the longest gradient that one image may contribute. Longer ones are scaled down.
# - `expected_batch_size` is large here. The noise is added to the sum over the batch, so a sum
#   over more images stands out more from it.
# - `epochs` says how often each image is used on average. More use needs more noise per step.

# %%
plan = dpoptax.Plan.calibrate(
    num_examples=len(train[0]),
    expected_batch_size=384,
    epochs=60,
    clip=0.5,
    epsilon=3.0,
    delta=1e-5,
)
print(plan.num_steps, "steps, noise multiplier", round(plan.noise_multiplier, 2))

# %% [markdown]
# The noise multiplier is the standard deviation of the noise, divided by `clip`. At this value
# the noise hides the contribution of any one image to a step. The model learns all the same,
# because hundreds of images in a batch agree, and because the noise of many steps averages out.
#
# ## Train
#
# `PrivateRun` draws the batches, clips, adds noise and counts. It takes any Optax optimizer.
# Between the steps you may look at the parameters, which are private already.

# %%
run = dpoptax.training.PrivateRun(
    loss_fn,
    params,
    train,
    plan=plan,
    optimizer=optax.sgd(0.5, momentum=0.9),
    key=jax.random.key(0),  # to repeat this page; for real data, leave this line out
)
spent, accuracies = [], []
while run.steps_left:
    run.step(min(25, run.steps_left))
    nnx.update(model, run.params)
    spent.append(run.epsilon())
    accuracies.append(accuracy(model))
    print(f"step {run.steps_done:3}  epsilon {spent[-1]:.2f}  accuracy {accuracies[-1]:.3f}")

# %% [markdown]
# Epsilon grows with each step, because each step releases something new about the data.

# %% Accuracy grows with epsilon during the run, and stays below the accuracy without privacy
plt.plot(spent, accuracies, "o-", label="private")
plt.axhline(accuracy_without_privacy, color="gray", linestyle="--", label="without privacy")
plt.xlabel("epsilon spent so far")
plt.ylabel("test accuracy")
plt.legend()
plt.show()

# %% [markdown]
# Do not stop the run where this curve looks best and then state the epsilon of that step. The
# results would have decided when to stop, so all planned steps count. The report of a run that
# stops early says so.
#
# ## How accuracy depends on epsilon
#
# The same training with more privacy and with less. Only the noise differs.

# %%
by_epsilon = {3.0: accuracies[-1]}
for epsilon in (1.0, 8.0):
    other_plan = dpoptax.Plan.calibrate(
        sampler=plan.sampler,
        epochs=60,
        clip=0.5,
        epsilon=epsilon,
        delta=1e-5,
    )
    other = dpoptax.training.PrivateRun(
        loss_fn,
        params,
        train,
        plan=other_plan,
        optimizer=optax.sgd(0.5, momentum=0.9),
        key=jax.random.key(int(epsilon)),  # no key is used for two runs
    )
    other.step(other_plan.num_steps)
    other_model = Cnn(nnx.Rngs(0))
    nnx.update(other_model, other.params)
    by_epsilon[epsilon] = accuracy(other_model)
for epsilon in sorted(by_epsilon):
    print(f"epsilon {epsilon:.0f}: accuracy {by_epsilon[epsilon]:.3f}")
print(f"no privacy: accuracy {accuracy_without_privacy:.3f}")

# %% [markdown]
# This data set is very small. The noise does not grow with the number of examples, so with more
# data the loss of accuracy is smaller: the [leaderboard](../leaderboard.md) has a private network
# of this kind on the images of MNIST, a much larger data set.
#
# We may compare three runs because these data are public. On private data each run reveals
# something more, and the guarantee must count all three. [Choosing
# hyperparameters](../choosing.md) shows how to choose without runs, or how to count them.
#
# ## What the private model gets wrong
#
# These are test images that the first private model reads wrongly. Above each are its guess and
# the label.

# %% Test images that the private model reads wrongly
guesses = np.asarray(predict(model, test_images))
wrong = np.flatnonzero(guesses != test_labels)[:10]
figure, axes = plt.subplots(1, 10, figsize=(7, 1.1))
for axis, row in zip(axes, wrong):
    axis.imshow(test_images[row, ..., 0], cmap="gray_r")
    axis.set(xticks=[], yticks=[], title=f"{guesses[row]}, not {test_labels[row]}")
    axis.title.set_fontsize(8)
plt.show()

# %% [markdown]
# ## The report
#
# Publish this text beside the model. It says who is protected, against what, and under which
# conditions. It is made from the objects that ran, so its numbers are those of the run.

# %%
print(run.report())

# %% [markdown]
# ## Where to go next
#
# - [Your own Optax loop, step by step](own_loop.md) shows what happens inside a step.
# - [Flax NNX](../trainers/nnx.md) trains only a part of a model, has dropout, and keeps
#   `nnx.Optimizer`.
# - [Choosing hyperparameters](../choosing.md) suggests a plan for your data.
# - [What epsilon means here](../epsilon.md) explains the guarantee.
