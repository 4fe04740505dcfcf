"""A private `PeftTrainer`, in an environment with Tunix."""

import pytest
from pages import program_of

pytestmark = pytest.mark.trainer
REQUIREMENTS = ["google-tunix>=0.1.7,<0.2"]

CHECK_PAGE = """
logger = private.metrics_logger
losses = logger.get_metric_history("", "loss", "eval")
assert losses[-1] < 0.7 * losses[0], losses
epsilons = logger.get_metric_history("", "epsilon", "train")
assert len(epsilons) == 4
assert private.epsilon() == plan.epsilon() == epsilons[-1] <= 6.0
for name in ("loss", "perplexity", "grad_norm"):
    assert not logger.metric_exists("", name, "train"), name
start = Model(nnx.Rngs(0))
for kind, same in ((nnx.LoRAParam, False), (nnx.Not(nnx.LoRAParam), True)):
    pairs = zip(*(jax.tree.leaves(nnx.state(m, kind)) for m in (start, model)), strict=True)
    assert all(bool(jnp.array_equal(a, b)) == same for a, b in pairs), kind
"""

# It starts from the definitions of the page.
SETUP = (
    program_of("tunix").split("plan = ")[0]
    + """
import sys
import numpy as np
from tunix.sft import hooks

rows = jax.tree.map(lambda leaf: leaf[:40], train)


def make(model=None, optimizer=None, trainer=PeftTrainer, **config):
    model = Model(nnx.Rngs(0)) if model is None else model
    made = trainer(
        model, optimizer or optax.adam(0.1), TrainingConfig(eval_every_n_steps=2, **config)
    )
    return made.with_gen_model_input_fn(model_inputs)


def plan(clip=float("inf"), noise=0.0, steps=3):
    sampler = dpoptax.samplers.FixedSize(40, 40)
    return dpoptax.Plan(
        sampler=sampler, clip=clip, noise_multiplier=noise, num_steps=steps, delta=1e-3
    )


def private(trainer, plan=plan(), **settings):
    return dpoptax.tunix.make_private(trainer, plan, key=jax.random.key(0), **settings)


def weights(trainer, kind=nnx.Param):
    leaves = jax.tree.leaves(nnx.state(trainer.model, kind))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])
"""
)

# Without clip and noise, and with all examples in each batch, a private run is that of Tunix.
SAME_STEPS = """
class Plain(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, tokens, positions, cache, attention_mask):
        return self.embed.attend(self.embed(tokens)), cache


def loss(model, input_tokens, input_mask, positions, attention_mask):
    logits, _ = model(input_tokens, None, None, None)
    found = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], input_tokens[:, 1:])
    return found.mean(), {"largest": logits.max()}


for start in (lambda: Model(nnx.Rngs(0)), Plain):
    for own_loss in (False, True):
        own, ours = (make(start()) for _ in range(2))
        if own_loss:
            own, ours = (trainer.with_loss_fn(loss, has_aux=True) for trainer in (own, ours))
        before = weights(own)
        own.train([rows] * 3)
        ours = private(ours)
        ours.train(rows, [rows])
        assert np.abs(weights(own) - before).max() > 1e-2
        np.testing.assert_allclose(weights(ours), weights(own), atol=1e-4)
        assert ours.train_steps == 3
"""

# Clip and noise are those of the plan.
PRIVATE_STEPS = """
clipped = private(make(optimizer=optax.sgd(0.1)), plan(clip=0.01, steps=1))
before = weights(clipped)
clipped.train(rows)
assert 0.1 * 0.1 * 0.01 < np.linalg.norm(weights(clipped) - before) <= 0.1 * 0.01 * 1.04

noisy = private(make(optimizer=optax.sgd(1.0)), plan(clip=4.0, noise=10.0, steps=1))
before = weights(noisy, nnx.LoRAParam)
noisy.train(rows)
noise = weights(noisy, nnx.LoRAParam) - before
assert len(noise) == 96
# The standard error is 7 %. The gradients move the sum by less than the clip.
assert 0.75 < np.std(noise) < 1.25, np.std(noise)
"""

# A run that stopped continues where it was, and counts all steps.
RESUMED = """
folder = sys.argv[1]


def fit(name, resume=None, **config):
    sampler = dpoptax.samplers.Poisson(40, 10)
    made = dpoptax.Plan(sampler=sampler, clip=1.0, noise_multiplier=1.0, num_steps=6, delta=1e-3)
    tunix = folder + "/tunix-" + name
    trainer = make(checkpoint_root_directory=tunix, **config)
    found = private(trainer, made, resume=folder + "/" + (resume or name))
    found.train(rows, [rows])
    return found


once, first = fit("once"), fit("twice", max_steps=2)
assert first.train_steps == 2 and first.epsilon() == first.plan.epsilon(2)
second = fit("twice")
assert second.train_steps == 6 and second.epsilon() == once.epsilon() == once.plan.epsilon()
assert np.array_equal(weights(once), weights(second))
assert not np.array_equal(weights(once), weights(first))

# Weights of steps that nobody counted: the checkpoints of one run with the folder of another.
try:
    fit("twice", resume="new")
except ValueError as error:
    assert "privacy that is not counted" in str(error), error
else:
    raise AssertionError
"""

REFUSALS = """
def refused(message, function, kind=ValueError):
    try:
        function()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


class Hooks(hooks.DataHooks):
    def load_next_train_batch(self, trainer):
        return rows

    def load_next_eval_batch(self, trainer):
        return None


class Other(PeftTrainer):
    pass


accumulating = make(gradient_accumulation_steps=2)
refused("averages gradients before they are clipped", lambda: private(accumulating))
refused("got Other", lambda: private(make(trainer=Other)), TypeError)
refused("number of steps of the plan; got 4", lambda: private(make(max_steps=4)))
hooked = make()
hooked.with_data_hooks(Hooks())
refused("hooks that load them", lambda: private(hooked))
refused("hooks that load them", lambda: private(make()).with_data_hooks(Hooks()))
refused("resume=folder", lambda: private(make(checkpoint_root_directory=sys.argv[1] + "/a")))
started = make()
started.train([rows])
refused("before its first step; got one after 1", lambda: private(started))
refused("got list. A loader or a list", lambda: private(make()).train([rows] * 40), TypeError)
refused("40", lambda: private(make()).train(train))
refused("got list_iterator", lambda: private(make()).train(iter([rows])), TypeError)
clipping = dpoptax.dp_sgd(
    0.1, 1.0, noise_multiplier=1.0, expected_batch_size=4, key=jax.random.key(1)
)
refused("plain transformation", lambda: private(make(optimizer=clipping)).train(rows))
done = private(make())
refused("call of train before", done.report)
done.train(rows)
refused("one call of train", lambda: done.train(rows))
"""

PROGRAMS = {
    "same steps": SETUP + SAME_STEPS,
    "private steps": SETUP + PRIVATE_STEPS,
    "resumed": SETUP + RESUMED,
    "refusals": SETUP + REFUSALS,
}


def test_the_programs_of_the_page_train_privately(run_program):
    run_program(REQUIREMENTS, program_of("tunix") + CHECK_PAGE)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_private_trainer(run_program, name, tmp_path):
    run_program(REQUIREMENTS, PROGRAMS[name], str(tmp_path))
