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
# # User-level privacy
#
# Protect a whole person who has several rows in the data. See what goes wrong if single rows are
# protected, and what the better guarantee costs.
#
# - **You learn** what the unit of privacy is, how to protect users, and how to read their epsilon.
# - **You need** the page [Start](../start.md).
# - **It takes** about a minute on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import dpoptax

# %% [markdown]
# ## The data: people who wear a sensor
#
# The data are simulated. Each person wears a sensor, which makes recordings of 16 numbers. The
# model should tell which of six activities a recording shows. Everybody moves in their own way, so
# the recordings of one person resemble each other. Most people have a few recordings, and some
# have 30.

# %%
FEATURES, ACTIVITIES = 16, 6
rng = np.random.default_rng(0)
typical = rng.normal(size=(ACTIVITIES, FEATURES))  # the typical recording of each activity


def simulate(num_people):
    """Returns recordings, activities, and the person of each recording."""
    counts = np.minimum(rng.geometric(0.12, num_people), 30)
    person = np.repeat(np.arange(num_people), counts)
    own_way = rng.normal(size=(num_people, FEATURES))
    activity = rng.integers(ACTIVITIES, size=len(person))
    noise = rng.normal(size=(len(person), FEATURES))
    recording = (typical[activity] + own_way[person] + noise) / np.sqrt(FEATURES)
    return recording.astype(np.float32), activity.astype(np.int32), person


x, y, person = simulate(1000)
test_x, test_y, _ = simulate(300)
num_people = len(np.unique(person))
rows_of = np.bincount(person)
print(f"{num_people} people have {len(x)} recordings")
print(f"{rows_of.mean():.1f} per person on average, {rows_of.max()} at most")

# %% [markdown]
# The test data are recordings of **other people**. If you split the rows at random, one person is
# on both sides, and the accuracy says too much about new people.

# %% How many recordings the people have
plt.figure(figsize=(7, 2.6))
plt.hist(rows_of, bins=np.arange(1, 32) - 0.5, color="tab:blue")
plt.xlabel("recordings of a person")
plt.ylabel("people")
plt.show()

# %% [markdown]
# ## The wrong unit: a row
#
# A plan protects what its sampler draws. `Poisson` draws rows, so this plan protects one
# recording.


# %%
def loss_fn(params, recording):
    features, activity = recording
    logits = features @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, activity)


start = {"w": jnp.zeros((FEATURES, ACTIVITIES)), "b": jnp.zeros(ACTIVITIES)}
budget = {"num_steps": 100, "epsilon": 1.0, "delta": 1e-5, "clip": 1.0}
row_plan = dpoptax.Plan.calibrate(
    sampler=dpoptax.samplers.Poisson(len(x), expected_batch_size=len(x) / 10), **budget
)
row_result = dpoptax.training.fit(
    loss_fn,
    start,
    (x, y),
    plan=row_plan,
    optimizer=optax.sgd(4.0),
    key=jax.random.key(0),  # for real data, leave this line out
    progress=False,
)


def accuracy(params):
    return jnp.mean(jnp.argmax(test_x @ params["w"] + params["b"], axis=1) == test_y)


print(f"accuracy {accuracy(row_result.params):.3f}")
print("protects one", row_plan.sampler.unit, f"with epsilon {row_plan.epsilon():.2f}")

# %% [markdown]
# ## What that means for a person
#
# A person with k rows is a *group* of k rows. `epsilon(group_size=k)` is what the same run
# guarantees to such a group. It grows faster than k.

# %% The epsilon of a person grows with the number of their rows, far above that of one row
sizes = [1, 2, 4, 8, 16, 30]
of_group = [row_plan.epsilon(group_size=k) for k in sizes]
for k, epsilon in zip(sizes, of_group, strict=True):
    print(f"{k:2} rows: epsilon {epsilon:6.2f}")

plt.plot(sizes, of_group, "o-", color="tab:red", label="of the person")
plt.axhline(1.0, color="tab:blue", label="of one row")
plt.xlabel("rows of a person")
plt.ylabel("epsilon")
plt.yscale("log")
plt.legend()
plt.show()

# %% [markdown]
# ## What an attacker sees
#
# Perhaps a large epsilon is only a weak bound, and the person is safe all the same? No. Suppose
# that one person with 30 recordings wears a rare sensor, which fills a feature that is zero for
# all others. The attacker looks at the weights of this feature in the trained model. Without this
# person, they are noise only.
#
# We train many times with this person and many times with blank recordings in their place, which
# leave these weights alone. If an attacker can tell the two apart, the person is not protected.

# %%
victim = np.argmax(rows_of)
is_victim = person == victim
wide_start = {"w": jnp.zeros((FEATURES + 1, ACTIVITIES)), "b": jnp.zeros(ACTIVITIES)}
with_victim = np.column_stack([x, np.where(is_victim, 3.0, 0.0)]).astype(np.float32)
without_victim = np.where(is_victim[:, None], np.float32(0), with_victim)
always_first = np.where(is_victim, 0, y)  # the victim always shows the first activity


def attack(loss, features, plan, seed):
    """Returns the weight from the rare feature to the first activity, above the other weights."""
    data = (features, always_first)
    if isinstance(plan.sampler, dpoptax.samplers.UserPoisson):
        data = plan.sampler.arrange(data)
    params = dpoptax.training.fit(
        loss,
        wide_start,
        data,
        plan=plan,
        optimizer=optax.sgd(4.0),
        key=jax.random.key(seed),
        progress=False,
    ).params
    weights = params["w"][FEATURES]
    return float(weights[0] - weights[1:].mean())


runs = range(16)
row_scores = [
    [attack(loss_fn, features, row_plan, seed) for seed in runs]
    for features in (with_victim, without_victim)
]

# %% [markdown]
# ## The right unit: a user
#
# `UserPoisson` draws people. `arrange` makes one row of each person: up to `max_examples_per_user`
# recordings, and a mask that says which places are filled. The loss of a row is the mean over the
# recordings of the person. So the clip limits the whole person, who moves the sum by at most
# `clip`.
#
# An example is now a person, and the batch size counts people.


# %%
def user_loss(params, row):
    recordings, present = row
    losses = jax.vmap(loss_fn, (None, 0))(params, recordings)
    return jnp.sum(jnp.where(present, losses, 0)) / jnp.sum(present)


sampler = dpoptax.samplers.UserPoisson(
    person, expected_batch_size=num_people / 10, max_examples_per_user=10
)
user_plan = dpoptax.Plan.calibrate(sampler=sampler, **budget)
by_user = sampler.arrange((x, y))
user_result = dpoptax.training.fit(
    user_loss,
    start,
    by_user,
    plan=user_plan,
    optimizer=optax.sgd(4.0),
    key=jax.random.key(0),
    progress=False,
)
(arranged_x, _), present = by_user
print("rows of the data", x.shape, "arranged by user", arranged_x.shape, "mask", present.shape)
print(f"accuracy {accuracy(user_result.params):.3f}")
print("protects one", user_plan.sampler.unit, f"with epsilon {user_plan.epsilon():.2f}")

# %% [markdown]
# The same attack on this plan:

# %% Weights with and without the person: apart if rows are protected, mixed if users are
user_scores = [
    [attack(user_loss, features, user_plan, seed) for seed in runs]
    for features in (with_victim, without_victim)
]


def distance(scores):
    """Returns how far apart the two kinds of runs are, in standard deviations."""
    inside, outside = map(np.asarray, scores)
    return (inside.mean() - outside.mean()) / np.sqrt((inside.var() + outside.var()) / 2)


figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
for axis, scores, title in zip(
    axes, (row_scores, user_scores), ("Rows are protected", "Users are protected"), strict=True
):
    bins = np.linspace(min(map(min, scores)), max(map(max, scores)), 16)
    axis.hist(scores, bins, label=["with the person", "without"], color=["tab:red", "tab:gray"])
    axis.set_title(title)
    axis.set_xlabel("weight of the rare feature")
axes[0].set_ylabel("runs")
axes[0].margins(y=0.4)  # room for the legend
axes[0].legend(loc="upper center", ncols=2)
plt.show()

loss = user_plan.privacy_loss()
limit = dpoptax.accounting.trade_off.advantage(loss)
print(f"rows protected: {distance(row_scores):.1f} standard deviations apart")
print(f"users protected: {distance(user_scores):.1f} standard deviations apart")
print(f"chance alone makes a distance of about {np.sqrt(2 / len(runs)):.1f} with so few runs")
print(f"users protected: no attack is right in more than {(1 + limit) / 2:.1%} of the cases")

# %% [markdown]
# On the left, one look at the model tells whether this person took part. On the right, the two
# kinds of runs overlap. Epsilon is 1 in both pictures. Only the unit differs.
#
# Data with one row per recording do not fit the plan for users, so you cannot mix up the two:

# %%
try:
    dpoptax.training.fit(loss_fn, start, (x, y), plan=user_plan, optimizer=optax.sgd(4.0))
except ValueError as error:
    print(error)

# %% [markdown]
# ## What it costs
#
# Compare with training without privacy, and with more or fewer recordings per person.
# `max_examples_per_user` changes how good the mean of a person is. It does not change epsilon, as
# the clip acts on the person as a whole.

# %%
for most in (1, 3, 30):
    sampler = dpoptax.samplers.UserPoisson(
        person, expected_batch_size=num_people / 10, max_examples_per_user=most
    )
    plan = user_plan.replace(sampler=sampler)
    data = sampler.arrange((x, y))
    run = {"plan": plan, "optimizer": optax.sgd(4.0), "progress": False}
    scores = [
        accuracy(
            dpoptax.training.fit(user_loss, start, data, key=jax.random.key(seed), **run).params
        )
        for seed in range(3)
    ]
    print(f"{most:2} per person: accuracy {np.mean(scores):.3f}, epsilon {plan.epsilon():.2f}")

not_private = start
mean_grad = jax.jit(jax.grad(lambda params: jax.vmap(loss_fn, (None, 0))(params, (x, y)).mean()))
for _ in range(300):
    not_private = jax.tree.map(lambda p, g: p - 4.0 * g, not_private, mean_grad(not_private))
print(f"rows protected: accuracy {accuracy(row_result.params):.3f}")
print(f"without privacy: accuracy {accuracy(not_private):.3f}")

# %% [markdown]
# Each of these lines with another number of recordings is a run of its own. On real data, such a
# search costs privacy too: see [Choosing hyperparameters](../choosing.md).
#
# ## Another way: single recordings with more noise
#
# `UserExamplesPoisson` also protects people, but draws and clips single recordings, of at most
# `max_examples_per_user` per person. A person then moves the sum by several terms, so it needs
# more noise for the same epsilon. In return, the batches have more terms. What counts is the noise
# of the mean: the noise multiplier divided by the batch size.

# %%
for most in (3, 10):
    examples = dpoptax.samplers.UserExamplesPoisson(
        person, expected_batch_size=len(x) / 10, max_examples_per_user=most
    )
    plan = dpoptax.Plan.calibrate(sampler=examples, **budget)
    result = dpoptax.training.fit(
        loss_fn,
        start,
        examples.arrange((x, y)),
        plan=plan,
        optimizer=optax.sgd(4.0),
        key=jax.random.key(0),
        progress=False,
    )
    relative = plan.noise_multiplier / plan.sampler.expected_batch_size
    print(
        f"{most:2} per person: noise multiplier {plan.noise_multiplier:5.1f}, noise of the mean "
        f"{relative:.4f}, accuracy {accuracy(result.params):.3f}"
    )
relative = user_plan.noise_multiplier / user_plan.sampler.expected_batch_size
print(
    f"UserPoisson:   noise multiplier {user_plan.noise_multiplier:5.1f}, noise of the mean "
    f"{relative:.4f}, accuracy {accuracy(user_result.params):.3f}"
)

# %% [markdown]
# ## The report
#
# The report names the unit. Check this line before you publish a number.

# %%
print(user_result.report())

# %% [markdown]
# ## Where to go next
#
# - [User-level privacy](../user_level.md): the guide, from the choice of the unit to the report.
# - [What epsilon means here](../epsilon.md): the report, line by line.
# - [Which sampler, which epsilon](../which_sampler.md): what each sampler costs.
# - [A transformer on text](transformer_linen.md): the same question for texts.
