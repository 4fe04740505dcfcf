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
# # Bayesian regression with NumPyro
#
# Fit a Bayesian logistic regression privately, with intervals that include the noise of privacy.
# Compare the posterior with the one without privacy.
#
# - **You learn** how to choose a clip bound without data, how to train a NumPyro model privately,
#   how to get intervals that cover, and how much wider the noise of privacy makes them.
# - **You need** `pip install '.[numpyro,examples]'`, and an idea of what a posterior is.
# - **It takes** one to two minutes on two CPU cores.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import MCMC, NUTS
from numpyro.infer.autoguide import AutoMultivariateNormal

import dpoptax
from dpoptax import vi

# %% [markdown]
# ## The data
#
# The data are simulated, so you can see whether the intervals contain the truth. 2,000 persons were
# asked for their age, their hours of sport in a week, and whether they smoke. The label says
# whether they have high blood pressure.
#
# Each input is scaled by public constants, to about -1 to 1. A mean of the data would be private.

# %%
NUM_PERSONS = 2000
NAMES = ["age", "sport", "smoker"]
TRUE_WEIGHTS, TRUE_BIAS = np.array([1.0, -0.8, 0.5]), -0.4

rng = np.random.default_rng(0)
age = np.clip(rng.normal(52, 15, NUM_PERSONS), 20, 80)
sport = rng.gamma(2.0, 2.0, NUM_PERSONS).clip(0, 10)
smoker = rng.random(NUM_PERSONS) < 0.25
x = jnp.asarray(np.stack([(age - 50) / 30, (sport - 5) / 5, 2.0 * smoker - 1], axis=1), jnp.float32)
logits = x @ TRUE_WEIGHTS + TRUE_BIAS
y = jnp.asarray(rng.random(NUM_PERSONS) < jax.nn.sigmoid(logits), jnp.float32)
print("persons", len(x), " share with high blood pressure", f"{y.mean():.3f}")


# %% [markdown]
# ## The model
#
# This is a usual NumPyro model. The plate matters: dpoptax reads from it which part of the density
# belongs to one person. That part is clipped and gets noise. The prior is outside of the plate. It
# does not depend on the data, so it is added afterwards, without noise.


# %%
def model(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([3]).to_event(1))
    bias = numpyro.sample("bias", dist.Normal(0, 1))
    with numpyro.plate("persons", NUM_PERSONS, subsample_size=len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)


guide = AutoMultivariateNormal(model)

# %% [markdown]
# ## The objective
#
# `aligned_numpyro_elbo` makes the ELBO of model and guide an objective for `fit`. Only the gradient
# with respect to the latents is made private. The gradient of the scales follows from it, so the
# scales get no noise of their own.
#
# `keep_steps` keeps what the last steps released: the noisy gradients, and the latents at which
# they were taken. The calibrated posterior is computed from them.

# %%
elbo = vi.numpyro.aligned_numpyro_elbo(
    model,
    guide,
    x,
    y,
    num_examples=NUM_PERSONS,
    keep_steps=600,
    init_key=jax.random.key(0),
)


# %% [markdown]
# ## Persons who do not exist
#
# The next steps need simulated persons. The model draws the labels, but not the inputs: for these
# you need an idea from a public source, such as a census. It may be rough. Here, ages are uniform
# and sport is exponential, unlike in the data. `None` stands for the label, which the model draws.


# %%
def public_inputs(key):
    age_key, sport_key, smoker_key = jax.random.split(key, 3)
    age = jax.random.uniform(age_key, minval=20, maxval=80)
    sport = jnp.clip(3.5 * jax.random.exponential(sport_key), 0, 10)
    smoker = jax.random.bernoulli(smoker_key, 0.3)
    return jnp.stack([(age - 50) / 30, (sport - 5) / 5, 2.0 * smoker - 1]), None


simulate = elbo.simulator(public_inputs)

# %% [markdown]
# ## The plan, and its clip bound
#
# The plan states the guarantee, and `calibrate` finds the noise. The noise is proportional to the
# clip bound. A bound that is too large gives much noise. One that is too small biases the
# posterior. The calibrated posterior below corrects a small bias, but not a large one.
# `choose_clip` compares bounds on simulated persons, so it costs no privacy.

# %%
plan = dpoptax.Plan.calibrate(
    num_examples=NUM_PERSONS,
    expected_batch_size=400,
    num_steps=1000,
    clip=1.0,
    epsilon=0.5,
    delta=1e-5,
)
choice = vi.choose_clip(elbo, plan, simulate, key=jax.random.key(1))
plan = plan.replace(clip=choice.clip)
print(choice.statement)

# %% [markdown]
# ## A rehearsal
#
# Will the intervals cover? `calibration_check` simulates whole data sets, trains privately on each,
# and counts how often the interval contains the truth. Use more data sets than here before a real
# release. If the answer is bad, change the plan now. After the run on the real data, each further
# try costs privacy.

# %%
optimizer = optax.adam(0.01)
check = vi.calibration_check(elbo, plan, optimizer, simulate, num_worlds=20, key=jax.random.key(2))
print(check.statement)
print(f"Intervals of the guide alone cover {check.guide_coverage:.1%}.")

# %% [markdown]
# ## Training
#
# This is the only step that touches the private data. For real data leave `key=` out, so that the
# key is secret.

# %%
result = dpoptax.training.fit(
    elbo,
    elbo.init(),
    (x, y),
    plan=plan,
    optimizer=optimizer,
    key=jax.random.key(3),  # for real data, leave this line out
    progress=False,
)
print(f"epsilon {result.epsilon():.2f} at delta {plan.delta}")

# %% [markdown]
# ## The posterior
#
# This run has two posteriors. The first is the guide, as variational inference returns it. Its
# width stands for the sampling error of 2,000 persons, and leaves out the noise of the gradients.
# The width was itself learned from noisy gradients, so it is also inaccurate. The second is the
# calibrated posterior. It contains the sampling error, the noise of privacy and of the batches, and
# the bias of clipping. Both are computed from what was released, and cost no privacy.

# %%
posterior = vi.calibrated_posterior(
    elbo,
    result.params,
    result.state.opt_state,
    plan,
    simulate=simulate,
    key=jax.random.key(4),
)
print(posterior.statement)

calibrated = posterior.sample(jax.random.key(5), 4000)
guide_alone = guide.sample_posterior(
    jax.random.key(6), elbo.constrain(result.params), sample_shape=(4000,)
)

# %% [markdown]
# ## The posterior without privacy
#
# For comparison, NUTS samples the posterior given the data themselves. It has no guarantee. On real
# data these draws must stay with you.

# %%
mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=4000, progress_bar=False)
mcmc.run(jax.random.key(7), x, y)
nonprivate = mcmc.get_samples()

# %% [markdown]
# ## Side by side

# %% 90 % intervals of the four coefficients: NUTS, the guide alone, and the calibrated posterior
posteriors = {
    "without privacy (NUTS)": (nonprivate, "black"),
    "private, guide alone": (guide_alone, "tab:orange"),
    "private, calibrated": (calibrated, "tab:blue"),
}


def column(draws, number):
    return np.asarray(draws["bias"] if number == 3 else draws["weights"][:, number])


truth = [*TRUE_WEIGHTS, TRUE_BIAS]
figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained", sharey=True)
for number, (axis, name) in enumerate(zip(axes, [*NAMES, "bias"], strict=True)):
    for row, (draws, color) in enumerate(posteriors.values()):
        low, middle, high = np.quantile(column(draws, number), [0.05, 0.5, 0.95])
        axis.plot([low, high], [row, row], color=color, linewidth=3)
        axis.plot(middle, row, "o", color=color)
    axis.axvline(truth[number], color="gray", linestyle="--")
    axis.set_title(name)
axes[0].set_yticks(range(3), list(posteriors))
axes[0].set_ylim(2.5, -0.5)
figure.suptitle("90 % intervals; the dashed line is the truth")
plt.show()

# %% [markdown]
# The noise of the run moved the middles of the private intervals. An honest interval must be wide
# enough for that. The guide does not know of the noise, so its intervals have no room for it.
#
# ## What privacy adds to the width
#
# The table has the widths of the 90 % intervals, and the last column divides them by those without
# privacy.

# %%
print(f"{'':8} {'no privacy':>10} {'guide':>10} {'calibrated':>10} {'ratio':>6}")
ratios = []
for number, name in enumerate([*NAMES, "bias"]):
    ends = [np.quantile(column(draws, number), [0.05, 0.95]) for draws, _ in posteriors.values()]
    widths = [high - low for low, high in ends]
    print(f"{name:8} " + " ".join(f"{width:10.2f}" for width in widths), end=" ")
    ratios.append(widths[2] / widths[0])
    print(f"{ratios[-1]:6.2f}")
print(f"\nShare of the variance that is noise of privacy and batches: {posterior.noise_share:.0%}")

# %% [markdown]
# Sampling error shrinks with the square root of the number of persons. The noise of privacy shrinks
# with the number itself, because it is added to a sum and then divided by the number. So with more
# persons the ratio goes to one. The share below the table is an average in which the directions
# that the data determine best count most.
#
# `choose_clip` predicted the ratio before any data were read, for an estimator that makes the best
# of all steps. The rehearsal measured it with the real estimator, on data sets with other
# coefficients. There the ratio differs much between the runs, because each draws its own noise. The
# run on the real data was lucky: its ratio is below that of every run of the rehearsal. Another key
# would probably give wider intervals, so plan with the numbers of the rehearsal.

# %%
rehearsed = (check.worlds.width / check.worlds.width_without_privacy).mean(axis=1)
print(f"mean ratio of this run {np.mean(ratios):.2f}, predicted {choice.privacy_ratio:.2f}")
print(
    f"in the rehearsal {rehearsed.mean():.2f}, from {rehearsed.min():.2f} to {rehearsed.max():.2f}"
)

# %% [markdown]
# ## Release
#
# Publish the calibrated posterior, its statement, and the privacy report.

# %%
print(result.report())

# %% [markdown]
# ## Where to go next
#
# - [Can I trust the intervals?](../trust_intervals.md): how the calibrated posterior works, and its
#   limits.
# - [What of NumPyro works](../numpyro.md): models and guides, one by one.
# - [Variational inference](../variational_inference.md): `DPSVI`, which has the interface of
#   NumPyro's `SVI`.
# - [Private posteriors](../private_posteriors.md): when sufficient statistics or MCMC are better.
