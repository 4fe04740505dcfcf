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
# # Your own Optax loop, step by step
#
# Put a private training loop together from its parts: sampler, per-example gradients, clipping
# and noise, Adam, and the ledger. Look at what each part does.
#
# - **You learn** what happens inside `fit`, what each number means, and what goes wrong without
#   it.
# - **You need** JAX and Optax, and `pip install '.[examples]'`.
# - **It takes** less than a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import dpoptax

# %% [markdown]
# ## Data: patients
#
# Each row is a patient, with measurements of the cells in a tumour. The label says whether the
# tumour is malignant. We use five of the measurements.
#
# The inputs must have similar sizes. The bounds below come from the public description of these
# measurements, and not from the rows. If you take the minimum and the maximum *of the data*
# instead, each column reveals values of two patients, and no epsilon counts that.

# %%
BOUNDS = {
    "mean radius": (6.0, 30.0),
    "mean texture": (9.0, 40.0),
    "mean smoothness": (0.05, 0.17),
    "mean concavity": (0.0, 0.45),
    "mean symmetry": (0.1, 0.31),
}
table = load_breast_cancer()
columns = [list(table.feature_names).index(name) for name in BOUNDS]
low, high = np.array(list(BOUNDS.values())).T
inputs = 2 * np.clip((table.data[:, columns] - low) / (high - low), 0, 1) - 1  # in [-1, 1]
x, y = jnp.asarray(inputs, jnp.float32), jnp.asarray(table.target == 0, jnp.float32)
order = np.random.default_rng(0).permutation(len(x))
train, test = (x[order[100:]], y[order[100:]]), (x[order[:100]], y[order[:100]])
print(len(train[0]), "patients to train,", len(test[0]), "to test")

# %% [markdown]
# ## Model: the loss of one patient
#
# This is a logistic regression. The loss takes the parameters and **one** example, without a
# batch axis.


# %%
def loss_fn(params, patient):
    features, malignant = patient
    logit = features @ params["w"] + params["b"]
    return optax.sigmoid_binary_cross_entropy(logit, malignant)


def accuracy(params):
    return float(jnp.mean((test[0] @ params["w"] + params["b"] > 0) == (test[1] == 1)))


params = {"w": jnp.zeros(len(BOUNDS)), "b": jnp.zeros(())}

# %% [markdown]
# ## Plan: each number once
#
# A plan holds all numbers that privacy depends on. Every part of the loop below reads them from
# it. So the clip bound that clips is the one that the noise is made for, and the one that is
# accounted. If you type a number twice, the two can differ, and then the stated epsilon is false.

# %%
plan = dpoptax.Plan.calibrate(
    num_examples=len(train[0]),
    expected_batch_size=100,
    epochs=40,
    clip=0.8,
    epsilon=2.0,
    delta=1e-5,
)
print(plan.num_steps, "steps, noise multiplier", round(plan.noise_multiplier, 2))
print(f"each patient is in a batch with probability {plan.sampler.sampling_rate:.3f}")

# %% [markdown]
# Randomness has two purposes: to draw the batches, and to draw the noise. Each gets a key of its
# own, from one root key. Whoever knows this key can subtract the noise.

# %%
root = jax.random.key(0)  # to repeat this page; for real data use dpoptax.random.secure_key()
keys = dpoptax.random.split_by_purpose(root)

# %% [markdown]
# A key serves one run. The parts below are only tried out before the run, so they get other keys.

# %%
trial_keys = dpoptax.random.split_by_purpose(jax.random.key(1))

# %% [markdown]
# ## Part 1: the sampler
#
# A Poisson sampler tosses a coin for each patient at each step. Nobody outside knows who is in a
# batch, so the same noise hides each patient better.
#
# So batches differ in size. JAX wants arrays of one shape, so a batch has room for
# `max_batch_size` rows, and a mask marks the real ones.

# %%
sampler_state = plan.sampler.init(trial_keys.sampling_key)
for _ in range(5):
    sampler_state, batch = plan.sampler.sample(sampler_state)
    print(int(batch.mask.sum()), "patients in a batch with room for", len(batch.mask))

# %% [markdown]
# If you shuffle the data and walk through them in batches of one size, as most loaders do, each
# patient is used exactly once per pass. This epsilon does not hold then. [Which
# sampler](../which_sampler.md) shows what other samplers cost.
#
# `take` gathers the rows of a batch, and keeps the mask with them. Rows without a patient are
# zeros, and no later part counts them.

# %%
examples = dpoptax.samplers.take(train, batch)
features, malignant = examples.examples
print(features.shape, malignant.shape, examples.mask.shape)

# %% [markdown]
# ## Part 2: one gradient for each patient
#
# `jax.grad` of a mean loss mixes the patients, and one of them can dominate the mean. To limit
# each patient, we need one gradient for each. `per_example_grads` returns them in a form that is
# cheap for large models too: for most layers, the gradients of all examples are never in memory
# at once.

# %%
grads_fn = jax.jit(dpoptax.per_example_grads(loss_fn))
grads = grads_fn(params, examples)
norms = jnp.sqrt(grads.global_squared_norms())
l2_clip = plan.clip.l2_clip
num_clipped = int(jnp.sum(norms > l2_clip))
print(f"{num_clipped} of {int(batch.mask.sum())} gradients are longer than {l2_clip}")

# %% Histogram of gradient norms, with the clip bound as a line
plt.hist(np.asarray(norms[grads.mask]), bins=20, color="tab:blue")
plt.axvline(l2_clip, color="tab:red", label="clip")
plt.xlabel("norm of the gradient of one patient")
plt.ylabel("patients")
plt.legend()
plt.show()

# %% [markdown]
# Gradients to the right of the line will be scaled down to the bound. Without a bound, one
# unusual patient could move the model by any amount, and no noise would be large enough to hide
# it.
#
# These norms are **not private**. We look at them because the data are public. With private data,
# do not print them, and do not choose the bound from them.
#
# ## Part 3: clip, sum, add noise, divide
#
# `plan.privatize` is an Optax transformation. It takes the gradients of all patients, and returns
# one private gradient. Here we do the same by hand, except for the noise.

# %%
privatize = plan.privatize(trial_keys.noise_key)
state = privatize.init(params)
private, state = privatize.update(grads, state, params)

weights = jnp.minimum(1.0, l2_clip / norms)  # 1, or less where the gradient is too long
clipped_sum = grads.weighted_sum(weights)
by_hand = jax.tree.map(lambda leaf: leaf / plan.sampler.expected_batch_size, clipped_sum)
noise = jax.tree.map(lambda a, b: a - b, private, by_hand)
print("clipped mean ", by_hand["w"])
print("private mean ", private["w"])
print("noise        ", noise["w"])
stddev = plan.noise_multiplier * l2_clip / plan.sampler.expected_batch_size
print(f"its standard deviation is {stddev:.4f}")

# %% [markdown]
# The noise has the standard deviation `noise_multiplier * clip / expected_batch_size`. The sum is
# divided by the **expected** size, which is public. The real size depends on who took part.
# Dividing by it would give each patient a second way to change the result.
#
# A private step is meant to hide one patient. So let us release this gradient many times, once
# with all patients of the batch and once without one of them, and draw two of its components.

# %%
without_one = dpoptax.samplers.MaskedExamples(
    examples.examples, examples.mask.at[jnp.argmax(norms)].set(False)
)


def release_often(grads, key, times=200):
    """Returns many private versions of the same gradient. A real run releases each one once."""
    privatize = plan.privatize(key)
    update = jax.jit(privatize.update)
    state, released = privatize.init(params), []
    for _ in range(times):
        private, state = update(grads, state, params)
        released.append(private["w"])
    return np.stack(released)


first_key, second_key = jax.random.split(jax.random.key(2))
clouds = {
    "all patients": release_often(grads, first_key),
    "without one patient": release_often(grads_fn(params, without_one), second_key),
}

# %% Two clouds of private gradients, with and without one patient, that lie on each other
figure, axis = plt.subplots(figsize=(5, 3.6))
for (label, cloud), marker in zip(clouds.items(), "ox"):
    axis.scatter(cloud[:, 0], cloud[:, 1], s=12, marker=marker, label=label)
axis.set(xlabel="component of mean radius", ylabel="component of mean texture")
axis.legend()
plt.show()

# %% [markdown]
# The patient who was left out had the longest gradient of the batch, and still the clouds can
# hardly be told apart. Epsilon measures exactly this: how well the two can be told apart, over
# all steps, by somebody who knows everything else.
#
# ## Part 4: Adam
#
# What follows `privatize` sees only its private output. So any optimizer works, and it costs no
# more privacy. `privatize` must come first: an optimizer that sees raw gradients would release
# them through its state. dpoptax refuses other orders.

# %%
tx = optax.chain(plan.privatize(keys.noise_key), optax.adam(0.1))

# %% [markdown]
# ## Part 5: the ledger
#
# The ledger counts the steps. Charge a step **before** it runs. If the program crashes in
# between, epsilon counts a step that nobody saw, which is safe. If you charge afterwards, a crash
# can release a step that nobody counted.
#
# ## The loop
#
# Now all parts together. One step is compiled once, and runs for each batch.


# %%
@jax.jit
def step(params, opt_state, sampler_state):
    sampler_state, batch = plan.sampler.sample(sampler_state)
    grads = grads_fn(params, dpoptax.samplers.take(train, batch))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, sampler_state


ledger = plan.ledger()
trained, opt_state = params, tx.init(params)
sampler_state = plan.sampler.init(keys.sampling_key)
for number in range(1, plan.num_steps + 1):
    ledger.charge(plan.noise_multiplier)
    trained, opt_state, sampler_state = step(trained, opt_state, sampler_state)
    if number % 40 == 0 or number == plan.num_steps:
        print(f"step {number:3}  epsilon {ledger.epsilon():.2f}  accuracy {accuracy(trained):.2f}")

# %% [markdown]
# ## What privacy cost
#
# The same model without privacy, trained on all patients at once:

# %%
public, adam = params, optax.adam(0.1)
adam_state = adam.init(public)


@jax.jit
def public_step(params, state):
    def mean_loss(params):
        return jax.vmap(loss_fn, (None, 0))(params, train).mean()

    updates, state = adam.update(jax.grad(mean_loss)(params), state)
    return optax.apply_updates(params, updates), state


for _ in range(plan.num_steps):
    public, adam_state = public_step(public, adam_state)
print(f"accuracy: private {accuracy(trained):.2f}, without privacy {accuracy(public):.2f}")

# %% The weight of each measurement, in the private model and in the one without privacy
places = np.arange(len(BOUNDS))
plt.barh(places + 0.2, public["w"], 0.4, color="lightgray", label="without privacy")
plt.barh(places - 0.2, trained["w"], 0.4, label="private")
plt.yticks(places, BOUNDS)
plt.xlabel("weight")
plt.legend()
plt.show()

# %% [markdown]
# ## The report
#
# The report is made from the ledger and the plan. Publish it with the model.

# %%
report = dpoptax.Report.from_ledger(
    ledger,
    steps_done=plan.num_steps,
    steps_planned=plan.num_steps,
    noise_multiplier=plan.noise_multiplier,
    mechanism=plan.mechanism,
    prng="threefry2x32, with a key from the caller, who must keep it secret",
)
print(report)

# %% [markdown]
# ## The same with `PrivateRun`
#
# `PrivateRun` contains these parts. It also does what the loop above left to you: it makes no
# more steps than planned, it charges each step before the step runs, and with `resume=` it
# continues after a crash. Use it unless your step needs something else.

# %%
run = dpoptax.training.PrivateRun(
    loss_fn, params, train, plan=plan, optimizer=optax.adam(0.1), key=jax.random.key(3)
)
run.step(plan.num_steps)
print(f"epsilon {run.epsilon():.2f}, accuracy {accuracy(run.params):.2f}")

# %% [markdown]
# ## Where to go next
#
# - [Make your loop private](../adoption.md) has the rules behind this loop, for Flax, Equinox and
#   plain JAX.
# - [A plain Optax loop](../trainers/optax.md) has shorter programs of this kind.
# - [Clip rules](../clipping.md), [samplers](../which_sampler.md) and
#   [optimizers](../optimizers.md) that fit into it.
# - [Long runs](../long_runs.md): runs that resume after a crash.
# - [Large data, many devices](../scaling.md): data that do not fit into memory, and several GPUs.
