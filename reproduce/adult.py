"""Bayesian logistic regression on Adult: accuracy over epsilon, for two kinds of gradients.

30,162 complete rows of UCI Adult, from the folder in DPOPTAX_ADULT_DIR; a mean-field guide, prior
N(0, I), 1,000 steps of Adam at 0.02, batches of 512, clip 1, delta 1e-5. The paper
(arXiv:2210.15961) uses epsilon 1, 2, 4, 10 and 4,000 epochs.
"""

import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

import dpoptax
from dpoptax.transforms import average_params
from dpoptax.vi import aligned_elbo, global_elbo, guides
from dpoptax.vi.models import logistic_regression
from reproduce.runs import Record, Run

STEPS, BATCH, RATE, CLIP, DELTA = 1000, 512, 0.02, 1.0, 1e-5
EPSILONS = (1.0, 2.0, 4.0, 10.0)
OBJECTIVES = {"aligned": aligned_elbo, "vanilla": global_elbo}  # as published, of one draw each


@functools.cache
def data() -> Any:
    """Rows in [0, 1] and labels of 0 and 1."""
    import example_data

    return example_data.adult(pathlib.Path(os.environ.get("DPOPTAX_ADULT_DIR", "adult")))


def accuracy(guide: Any, guide_params: Any) -> float:
    """Share of test rows, in percent, that the posterior predictive gets right."""
    keys = jax.random.split(jax.random.key(0), 100)
    draws = jax.vmap(lambda key: guide.apply({"params": guide_params}, key))(keys)
    logits = data().test_inputs @ np.asarray(draws["weights"]).T + np.asarray(draws["bias"])
    chance = np.asarray(jax.nn.sigmoid(jnp.asarray(logits))).mean(axis=1)
    return 100 * float(np.mean((chance > 0.5) == (data().test_labels == 1)))


def train(make: Callable[..., Any], epsilon: float | None, seed: int) -> Record:
    """Trains one model; returns the accuracy of the mean of its last 500 iterates."""
    rows, labels = data().train_inputs, data().train_labels.astype(np.float32)
    sampler = dpoptax.samplers.Poisson(len(rows), BATCH)
    noise = 0.0
    if epsilon is not None:
        noise, _ = dpoptax.accounting.calibrate_noise_multiplier(
            epsilon=epsilon, delta=DELTA, sampler=sampler, num_steps=STEPS
        )
    plan = dpoptax.Plan(
        sampler=sampler,
        clip=math.inf if epsilon is None else CLIP,
        noise_multiplier=noise,
        num_steps=STEPS,
        delta=DELTA,
    )
    guide = guides.MeanField({"weights": jnp.zeros(rows.shape[1]), "bias": jnp.zeros(())})
    result = dpoptax.training.fit(
        make(guide, logistic_regression, num_examples=len(rows), num_samples=1),
        guide.init(jax.random.key(0), jax.random.key(0))["params"],
        (rows, labels),
        plan=plan,
        optimizer=optax.chain(optax.adam(RATE), average_params(start=STEPS // 2)),
        key=jax.random.key(seed),
        progress=False,
    )
    return {
        "accuracy": accuracy(guide, result.averaged_params),
        "noise_multiplier": noise,
    }


def converged() -> Record:
    """scikit-learn's logistic regression under the same prior, to the end."""
    model = LogisticRegression(C=1.0, max_iter=5000)
    model.fit(data().train_inputs, data().train_labels)
    return {"accuracy": 100 * float(model.score(data().test_inputs, data().test_labels))}


def runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs of this part."""
    yield Run("adult: converged", 5, converged)
    for objective, make in OBJECTIVES.items():
        for epsilon in (*EPSILONS, None):
            label = "not private" if epsilon is None else f"epsilon {epsilon:g}"
            for seed in seeds:
                compute = functools.partial(train, make, epsilon, seed)
                yield Run(f"adult: {objective}, {label}, seed {seed}", 10, compute)
