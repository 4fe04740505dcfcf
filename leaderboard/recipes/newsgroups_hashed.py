"""A linear model on hashed words. Nothing is fitted to the texts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.preprocessing import normalize

import dpoptax
from dpoptax.transforms import average_params
from leaderboard.recipe import Recipe, Trained, plan_for

# A word's place is its hash; the list of stop words is that of scikit-learn. So there is neither a
# vocabulary nor a document frequency, which would be statistics of private texts.
WORDS = HashingVectorizer(n_features=2048, stop_words="english", norm=None)


def features(texts):
    counts = WORDS.transform(texts)
    counts.data = np.sign(counts.data) * np.sqrt(np.abs(counts.data))
    return normalize(counts).toarray().astype(np.float32)


def logits(params, row):
    return row @ params["weights"]


def loss_fn(params, example):
    row, label = example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, row), label)


def train(data, epsilon, delta, seed):
    count, steps = len(data.train_labels), 20 + int(10 * min(epsilon, 8))
    plan = plan_for(num_examples=count, expected_batch_size=min(4096, count), num_steps=steps,
                    epsilon=epsilon, delta=delta, clip=1.0)  # fmt: skip
    result = dpoptax.training.fit(
        loss_fn,
        {"weights": jnp.zeros((2048, 20))},
        (features(data.train_inputs), data.train_labels),
        plan=plan,
        optimizer=optax.chain(optax.sgd(15.0, momentum=0.9), average_params(start=steps // 2)),
        key=jax.random.key(seed),
        progress=False,
    )
    params = result.averaged_params
    return Trained(lambda texts: logits(params, features(texts)), params, result.epsilon(), result)


RECIPE = Recipe(name="newsgroups_hashed", task="newsgroups", train=train, seconds=60,
                title="linear model on hashed words, large batches",
                tuned="on training examples held out",
                notes="About 20 runs; test posts are later.")  # fmt: skip
