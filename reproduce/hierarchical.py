"""Hierarchical logistic regression on synthetic data: accuracy over epsilon and data size.

Three groups share one map M from group features to weights (arXiv:2103.11648, section 5). The guide
is for M only. 100,000 steps, Adam at 1e-3, clip 1, delta = 1 / N.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import dpoptax
from dpoptax.vi import aligned_elbo, guides
from dpoptax.vi.models import hierarchical_logistic_regression
from reproduce.runs import Record, Run

INPUTS, GROUPS, FEATURES = 5, 3, 3
PRIOR_SCALE = 4.0
STEPS, RATE = 100_000, 0.01
SIZES = (100, 200, 500, 1000)
EPSILONS = (1.0, 2.0, 4.0, 8.0)


def data(
    num_examples: int, seed: int, num_test: int = 5000
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Training and test examples (x, features of the group, y) of one draw of the world."""
    rng = np.random.default_rng(seed)
    mapping = PRIOR_SCALE * rng.normal(size=(INPUTS, FEATURES))
    features = rng.normal(size=(GROUPS, FEATURES))
    weights = features @ mapping.T + rng.normal(size=(GROUPS, INPUTS))

    def draw(count: int) -> tuple[np.ndarray, ...]:
        group = rng.integers(GROUPS, size=count)
        x = rng.normal(size=(count, INPUTS))
        chance = 1 / (1 + np.exp(-np.sum(weights[group] * x, axis=1)))
        y = rng.uniform(size=count) < chance
        return x.astype(np.float32), features[group].astype(np.float32), y.astype(np.float32)

    return draw(num_examples), draw(num_test)


def train(num_examples: int, epsilon: float | None, seed: int) -> Record:
    """Trains one model; returns the area under its curve on new people of the same world."""
    train_data, (x, features, y) = data(num_examples, seed)
    sampler = dpoptax.samplers.Poisson(num_examples, max(1.0, RATE * num_examples))
    noise = 0.0
    if epsilon is not None:
        noise, _ = dpoptax.accounting.calibrate_noise_multiplier(
            epsilon=epsilon, delta=1 / num_examples, sampler=sampler, num_steps=STEPS
        )
    plan = dpoptax.Plan(
        sampler=sampler,
        clip=1.0,
        noise_multiplier=noise,
        num_steps=STEPS,
        delta=1 / num_examples,
    )
    guide = guides.MeanField(jnp.zeros((INPUTS, FEATURES)))
    result = dpoptax.training.fit(
        aligned_elbo(
            guide,
            hierarchical_logistic_regression(),
            PRIOR_SCALE,
            num_examples=num_examples,
            num_samples=1,
        ),
        guide.init(jax.random.key(0), jax.random.key(0))["params"],
        train_data,
        plan=plan,
        optimizer=optax.adam(1e-3),
        key=jax.random.key(seed),
        progress=False,
    )
    scores = np.einsum("nd,dk,nk->n", x, np.asarray(result.params["loc"]), features)
    return {"auc": float(roc_auc_score(y, scores)), "noise_multiplier": noise}


def plain(num_examples: int, seed: int) -> Record:
    """scikit-learn's logistic regression, which knows of no groups and no privacy."""
    (x, _, y), (test_x, _, test_y) = data(num_examples, seed)
    scores = LogisticRegression().fit(x, y).decision_function(test_x)
    return {"auc": float(roc_auc_score(test_y, scores))}


def runs(seeds: tuple[int, ...]) -> Iterator[Run]:
    """All runs of this part."""
    for num_examples in SIZES:
        for seed in seeds:
            name = f"hierarchical: N {num_examples}, seed {seed}"
            yield Run(f"{name}, plain", 0.1, functools.partial(plain, num_examples, seed))
            for epsilon in (*EPSILONS, None):
                label = "not private" if epsilon is None else f"epsilon {epsilon:g}"
                compute = functools.partial(train, num_examples, epsilon, seed)
                yield Run(f"{name}, {label}", 15, compute)
