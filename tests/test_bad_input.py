"""Errors for wrong arguments: raised before anything private is computed, with a remedy.

Every error says what was expected, what came and what to do about it.
"""

import inspect
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

import dpoptax
from dpoptax import Plan, accounting, clipping, samplers
from dpoptax.per_example._stacked import as_per_example_grads

KEY = jax.random.key(0)
SAMPLER = samplers.Poisson(100, 10)


def quadratic(params, example):
    return jnp.sum((params - example) ** 2)


def grads(loss_fn=quadratic, params=None, examples=None, **options):
    params = jnp.zeros(3) if params is None else params
    examples = jnp.ones((4, 3)) if examples is None else examples
    return dpoptax.per_example_grads(loss_fn)(params, examples, **options)


def privatize(clip=1.0, noise_multiplier=1.0, expected_batch_size=8):
    return dpoptax.privatize(
        clip, noise_multiplier, expected_batch_size=expected_batch_size, key=KEY
    )


def plan(**changes):
    fields = {
        "sampler": SAMPLER,
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "num_steps": 5,
        "delta": 1e-5,
    }
    return Plan(**(fields | changes))


def fit(loss_fn=quadratic, params=None, data=None, key=KEY, **changes):
    return dpoptax.training.fit(
        loss_fn,
        jnp.zeros(3) if params is None else params,
        jnp.ones((100, 3)) if data is None else data,
        plan=plan(**changes),
        optimizer=optax.sgd(0.1),
        key=key,
        progress=False,
    )


PARAMS, DATA = jnp.full(3, 8274.5), jnp.full((100, 3), 8274.5)


def train(loss_fn=quadratic, params=PARAMS, **changes):
    options = {"plan": plan(), "optimizer": optax.sgd(0.1), "key": KEY, "progress": False}
    return dpoptax.training.fit(loss_fn, params, DATA, **(options | changes))


def histogram(grads, edges=(0.0, 1.0), **options):
    return dpoptax.mechanisms.norm_histogram(grads, edges, 1.0, KEY, **options)


class LinenBatchNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x[None])).sum()


class NnxBatchNorm(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x[None]).sum()


class LooseClip(clipping.FlatClip):
    """A rule that understates its bound: one example moves the sum by more than l2_clip."""

    def sensitivity(self, relation):
        return 2 * super().sensitivity(relation)


LINEN = LinenBatchNorm()
LINEN_VARIABLES = LINEN.init(KEY, jnp.ones(3))
NNX_MODEL = NnxBatchNorm()


def effectful(params, example):
    jax.experimental.io_callback(print, None, example, ordered=True)
    return jnp.sum(params * example)


# name: (a wrong call, a pattern that its error must match)
WRONG_CALLS = {
    # clip, noise, normaliser, key
    "clip zero": (lambda: clipping.FlatClip(0.0), "must be positive; got 0.0"),
    "clip negative": (lambda: clipping.FlatClip(-1.0), "must be positive; got -1.0"),
    "clip nan": (lambda: clipping.FlatClip(float("nan")), "must be a number; got nan"),
    "clip too small for float32": (lambda: clipping.FlatClip(1e-20), "float32 squares vanish"),
    "clip with too large a sensitivity": (
        lambda: dpoptax.privatize(LooseClip(1.0), 1.0, expected_batch_size=8, key=KEY),
        "one example more moves the sum by 2.0: make l2_clip as large as that",
    ),
    "noise negative": (
        lambda: dpoptax.privatize(1.0, -0.5, expected_batch_size=8, key=KEY),
        "noise_multiplier must be zero or more",
    ),
    "no groups": (lambda: clipping.GroupClip({}), "a bound for at least one group; got none"),
    "bound of a group zero": (
        lambda: clipping.GroupClip({"a": 1.0, "b": {"w": 0.0}}),
        "the bound of b/w bounds a norm and must be positive; got 0.0",
    ),
    "text for the bound of a group": (
        lambda: clipping.GroupClip({"a": "high"}),
        "the bound of a must be a real number",
    ),
    "groups that overlap": (
        lambda: clipping.GroupClip({"a": 1.0, "a/w": 2.0}),
        "groups must not overlap, .*; got a and its part a/w. Leave one of them out",
    ),
    "groups of other parameters": (
        lambda: privatize(clipping.GroupClip({"a": 1.0, "b": 2.0})).init(
            {"a": jnp.zeros(2), "c": {"w": jnp.zeros(2)}}
        ),
        r"without a group: \[c/w\]; groups without a parameter: \[b\]. Name each group by the path",
    ),
    "groups for parameters without names": (
        lambda: privatize(clipping.GroupClip([1.0, 2.0, 3.0])).init([jnp.zeros(2), jnp.zeros(2)]),
        r"without a group: \[\]; groups without a parameter: \[2\]",
    ),
    "groups in an update": (
        lambda: dpoptax.clipping.GroupClip({"a": 1.0}).weights({"b": jnp.ones(2)}),
        r"without a group: \[b\]; groups without a parameter: \[a\]",
    ),
    "sizes of other parameters": (
        lambda: privatize(clipping.PerLayerClip.by_size(1.0, {"a": jnp.zeros(2)})).init(
            {"a": {"w": jnp.zeros(2), "b": jnp.zeros(2)}}
        ),
        r"sizes must have one entry for each parameter array; got 1 entries for 2 arrays",
    ),
    "size zero": (lambda: clipping.PerLayerClip(1.0, {"a": 0}), "a size must be at least 1; got 0"),
    "share of a clip too small": (
        lambda: privatize(clipping.PerLayerClip(1e-12)).init([jnp.zeros(2)] * 4),
        "the smallest share of l2_clip must be at least 1e-12",
    ),
    "automatic clip without a bound": (
        lambda: clipping.AutoSClip(float("inf")),
        "scales small gradients up to it; got inf",
    ),
    "gamma zero": (lambda: clipping.AutoSClip(1.0, 0.0), "gamma must lie between 1e-12 and 1e"),
    "r infinite": (
        lambda: clipping.PsacClip(1.0, float("inf")),
        "r must lie between 1e-12 .*; got inf",
    ),
    "noise without clip": (
        lambda: dpoptax.privatize(np.inf, 1.0, expected_batch_size=8, key=KEY),
        "finite l2_clip.*noise_multiplier=0",
    ),
    "complex gradients": (
        lambda: as_per_example_grads({"w": jnp.ones((2, 3), complex)}),
        r"real floating-point arrays; got updates\['w'\] of complex64",
    ),
    "integer gradients": (
        lambda: as_per_example_grads(jnp.ones((2, 3), int)),
        "real floating-point arrays; got updates of int32",
    ),
    "too many examples for bins": (
        lambda: samplers.BallsInBins(2**31, 4),
        r"must be below 2\*\*31",
    ),
    "loss with a default key": (
        lambda: dpoptax.training.make_train_step(
            lambda w, x, key=None: 0.0, tx=optax.sgd(1.0), sampler=dpoptax.samplers.Poisson(9, 3)
        ),
        "has a default for its third argument, key.*Remove the default",
    ),
    "batch size zero": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=0, key=KEY),
        "expected_batch_size must be positive",
    ),
    "batch size nan": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=float("nan"), key=KEY),
        "expected_batch_size must be a number",
    ),
    "rate for a batch size": (
        lambda: privatize(expected_batch_size=0.05),
        r"number of examples, at least 1; got 0.05. .*sampling rate of 0.05 pass 0.05 \* num_exam",
    ),
    "rate in a schedule of batch sizes": (
        lambda: privatize(expected_batch_size=dpoptax.schedules.Schedule((8.0, 0.5), (1, 1))),
        "number of examples, at least 1; got 0.5",
    ),
    "no clip": (
        lambda: privatize(clip=None),
        "clip must be a number, a schedule or a clip rule; got None. .*noise_multiplier=0",
    ),
    "dict for a clip": (
        lambda: privatize(clip={"w": 1.0}),
        r"clip must be a number, .* got a dict of 1 entry. .*GroupClip\(bounds\)",
    ),
    "parameters first": (
        lambda: clipping.PerLayerClip.by_size({"w": jnp.ones(2)}, 1.0),
        r"params must be a tree of arrays; got 1.0. Pass PerLayerClip.by_size\(l2_clip, params\)",
    ),
    "number of runs": (
        lambda: dpoptax.Report.from_plan(
            Plan(
                sampler=samplers.Poisson(9, 3),
                clip=1.0,
                noise_multiplier=1.0,
                num_steps=1,
                delta=1e-3,
            ),
            runs=3,
        ),
        r"runs must be a dpoptax.accounting.RandomRuns; got 3",
    ),
    "examples for a mask": (
        lambda: dpoptax.per_example_grads(lambda p, e: p * e)(
            jnp.ones(()),
            jnp.ones(2),
            mask=dpoptax.samplers.MaskedExamples(jnp.ones(2), jnp.ones(2)),
        ),
        "mask must be a boolean array; got MaskedExamples.*Pass all of it as the examples",
    ),
    "text for a clip": (lambda: privatize(clip="high"), "clip must be a real number; got 'high'"),
    "Optax schedule for a clip": (
        lambda: privatize(clip=optax.constant_schedule(1.0)),
        "clip as an Optax schedule .*tabulate",
    ),
    "old key": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=jax.random.PRNGKey(0)),
        r"typed PRNG key; got an array of uint32.*wrap_key_data",
    ),
    "array of keys": (
        lambda: inspect.unwrap(dpoptax.privatize)(
            1.0, 1.0, expected_batch_size=8, key=jax.random.split(KEY)
        ),
        "must be one key",
    ),
    # examples and masks
    "ragged batch": (
        lambda: grads(lambda p, e: jnp.sum(p), examples={"x": jnp.ones((4, 3)), "y": jnp.ones(5)}),
        r"share one leading batch axis; got examples\['x'\]: 4, examples\['y'\]: 5",
    ),
    "scalar example": (
        lambda: grads(lambda p, e: jnp.sum(p), examples={"x": jnp.ones((4, 3)), "y": jnp.ones(())}),
        r"leading batch axis; got examples\['y'\], which is a scalar",
    ),
    "no examples": (
        lambda: grads(lambda p, e: jnp.sum(p), examples={}),
        "examples must have at least one array.*got examples without arrays",
    ),
    "mask length": (
        lambda: grads(mask=jnp.ones(3, bool)),
        r"mask must have shape \(4,\).*got \(3,\)",
    ),
    "mask dtype": (lambda: grads(mask=jnp.ones(4)), r"mask must be boolean.*astype\(bool\)"),
    "grads key old": (
        lambda: grads(lambda p, e, k: quadratic(p, e), key=jax.random.PRNGKey(0)),
        "typed PRNG key",
    ),
    # losses and parameters
    "loss vector": (
        lambda: grads(lambda p, e: p - e),
        r"must return a scalar.*got shape \(3,\)",
    ),
    "loss with aux": (lambda: grads(lambda p, e: (quadratic(p, e), p)), "must return one scalar"),
    "loss integer": (lambda: grads(lambda p, e: jnp.int32(1)), "real floating-point loss"),
    "integer params": (
        lambda: grads(lambda p, e: jnp.sum(p["w"]), params={"w": jnp.ones(3), "n": jnp.arange(3)}),
        r"params\['n'\] must be a real floating-point array.*int32",
    ),
    "linen state in params": (
        lambda: grads(
            lambda v, e: LINEN.apply(v, e, mutable=["batch_stats"])[0], params=LINEN_VARIABLES
        ),
        r"'batch_stats' in addition to 'params'.*variables\['params'\]",
    ),
    "linen state updated": (
        lambda: grads(
            lambda p, e: LINEN.apply({**LINEN_VARIABLES, "params": p}, e),
            params=LINEN_VARIABLES["params"],
        ),
        "changes the state of a Flax module.*GroupNorm",
    ),
    "linen state returned": (
        lambda: grads(
            lambda p, e: LINEN.apply({**LINEN_VARIABLES, "params": p}, e, mutable=["batch_stats"]),
            params=LINEN_VARIABLES["params"],
        ),
        "must return one scalar.*batch statistics mix examples",
    ),
    "nnx module as params": (
        lambda: grads(lambda m, e: m(e), params=NNX_MODEL),
        r"is a BatchStat, not a parameter.*nnx\.split",
    ),
    "nnx state updated": (
        lambda: grads(lambda p, e: NNX_MODEL(e) * jnp.sum(p)),
        "changes the state of a Flax module.*GroupNorm",
    ),
    # privatize's input
    "averaged gradient": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).update(
            {"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
            dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).init(None),
            {"w": jnp.ones((3, 2)), "b": jnp.ones(2)},
        ),
        "got the shapes of the parameters: these look like gradients that are averaged",
    ),
    "averaged gradient of one leaf": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).update(
            jnp.ones((3, 2)),
            dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).init(None),
            jnp.ones((3, 2)),
        ),
        "got the shapes of the parameters.*cannot be clipped per example",
    ),
    "gradients of another structure": (
        lambda: dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).update(
            {"w": jnp.ones((3, 2))},
            dpoptax.privatize(1.0, 1.0, expected_batch_size=8, key=KEY).init(None),
            [jnp.ones(2)],
        ),
        "same tree structure",
    ),
    "averaged gradients in a histogram": (
        lambda: histogram({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}),
        "got leaves that do not share one. Gradients that are averaged.*per_example_grads",
    ),
    "an averaged scalar in a histogram": (
        lambda: histogram({"w": jnp.ones((3, 2)), "b": jnp.ones(())}),
        "got leaves that do not share one",
    ),
    "averaged gradients of one shape in a histogram": (
        lambda: histogram({"w": jnp.ones((3, 2))}, params={"w": jnp.ones((3, 2))}),
        "got the shapes of the parameters: these look like gradients that are averaged",
    ),
    "edges that fall": (
        lambda: histogram(jnp.ones((3, 2)), edges=(0.0, -1.0)),
        "edges must incr",
    ),
    # samplers
    "rate for a size": (
        lambda: samplers.Poisson(60_000, 0.01),
        r"For a sampling rate of 0.01 pass 0.01 \* num_examples = 600",
    ),
    "batch beyond the data": (lambda: samplers.Poisson(10, 20), "cannot exceed num_examples"),
    "no data": (lambda: samplers.Poisson(0, 1), "num_examples must be at least 1; got 0"),
    "too much data": (lambda: samplers.Poisson(2**31, 10), r"below 2\*\*31"),
    "rate for a fixed size": (
        lambda: samplers.FixedSize(60_000, 0.01),
        r"batch_size is a number .* For a sampling rate of 0.01 pass 0.01 \* num_examples = 600",
    ),
    "rate for an epoch's batch": (lambda: samplers.Shuffled(1000, 0.1), "num_examples = 100"),
    "fractional batch size": (
        lambda: samplers.FixedSize(100, 10.5),
        "batch_size must be a whole number",
    ),
    "fixed size beyond the data": (lambda: samplers.FixedSize(10, 20), "cannot exceed"),
    "more steps than examples": (lambda: samplers.BallsInBins(10, 20), "steps_per_round cannot"),
    "no bins": (lambda: samplers.BallsInBins(10, 0), "steps_per_round must be at least 1"),
    "more groups than examples": (lambda: samplers.CyclicPoisson(10, 1, 20), "num_groups cannot"),
    "batch beyond its group": (
        lambda: samplers.CyclicPoisson(100, 30, 5),
        "expected_batch_size cannot exceed the size of a group; got 30 and 100 examples in 5",
    ),
    "user_ids in a table": (
        lambda: samplers.UserPoisson([[1, 2]], 1, 1),
        r"array of shape \(1, 2\)",
    ),
    "no users": (lambda: samplers.UserPoisson([], 1, 1), "user_ids must name the user"),
    "user_ids for other data": (
        lambda: samplers.UserPoisson([1, 2, 1], 1, 2).arrange(jnp.ones((4, 2))),
        "got 4 rows and 3 entries",
    ),
    "permutation of nothing": (
        lambda: samplers._feistel.permute(KEY, jnp.arange(3), 0),
        "num_examples must be at least 1",
    ),
    "permutation too large": (
        lambda: samplers._feistel.permute(KEY, jnp.arange(3), 2**31 + 1),
        r"at most 2\*\*31",
    ),
    "negative step": (lambda: SAMPLER.init(KEY, step=-1), "step must be at least 0"),
    "shuffled under add_or_remove_one": (
        lambda: samplers.Shuffled(100, 10).event(1.0, 5, "add_or_remove_one"),
        "Sample with Poisson.*relation='replace_special'",
    ),
    "max_batch_size zero": (
        lambda: samplers.Poisson(10, 2, 0),
        "max_batch_size must be at least 1",
    ),
    # accounting
    "delta zero": (lambda: plan(delta=0.0), "delta must lie strictly between 0 and 1"),
    "delta one": (lambda: plan(delta=1.0), "delta must lie strictly between 0 and 1"),
    "steps negative": (lambda: plan(num_steps=-1), "num_steps must be at least 0"),
    "epsilon zero": (
        lambda: accounting.calibrate_noise_multiplier(
            epsilon=0.0, delta=1e-5, sampler=SAMPLER, num_steps=5
        ),
        "epsilon must be positive",
    ),
    "no steps to calibrate": (
        lambda: accounting.calibrate_noise_multiplier(
            epsilon=1.0, delta=1e-5, sampler=SAMPLER, num_steps=0
        ),
        "num_steps must be at least 1",
    ),
    "group of size zero": (lambda: plan().epsilon(group_size=0), "group_size must be at least 1"),
    "Optax schedule that is not tabulated": (
        lambda: dpoptax.privatize(
            1.0, optax.constant_schedule(1.0), expected_batch_size=5.0, key=jax.random.key(0)
        ),
        "must be known for every step in advance.*tabulate",
    ),
    "schedule of negative noise": (
        lambda: plan(noise_multiplier=optax.constant_schedule(-1.0)),
        "values must be zero or more",
    ),
    "schedule with too few lengths": (
        lambda: dpoptax.schedules.Schedule((1.0, 2.0), (5,)),
        "same number of entries, at least one; got 2 values and 1 lengths",
    ),
    "schedule of a clip of zero": (
        lambda: dpoptax.clipping.FlatClip(dpoptax.schedules.Schedule((1.0, 0.0), (5, 5))),
        "l2_clip bounds a norm and must be positive",
    ),
    "stages of different data": (
        lambda: samplers.PoissonSchedule(
            [(samplers.Poisson(10, 2), 1), (samplers.Poisson(11, 2), 1)]
        ),
        r"stages must draw from the same examples.*\[10, 11\]",
    ),
    "no stages": (lambda: samplers.PoissonSchedule(()), "stages must draw from the same examples"),
    "charge of something else than an event": (
        lambda: plan().ledger().charge_event(0.3),
        "expected a dp_accounting.DpEvent; got 0.3",
    ),
    "negative noise in a ledger": (
        lambda: plan().ledger().charge(-1.0),
        "noise_multiplier must be zero or more",
    ),
    "shuffled under add_or_remove_one, in a plan": (
        lambda: plan(sampler=samplers.Shuffled(100, 10)).event(relation="add_or_remove_one"),
        "shuffled batches have no guarantee under add_or_remove_one",
    ),
    "delta one in a filter": (
        lambda: accounting.RdpFilter(epsilon=1.0, delta=1.0),
        "delta must lie strictly between 0 and 1",
    ),
    "noise zero for steps": (
        lambda: accounting.calibrate_num_steps(
            epsilon=1.0, delta=1e-5, sampler=SAMPLER, noise_multiplier=0.0
        ),
        "noise_multiplier must be positive",
    ),
    "unknown relation": (
        lambda: plan().epsilon(relation="add_remove"),
        "relation must be one of add_or_remove_one, replace_one, replace_special; got 'add_remove'",
    ),
    "epochs and steps": (
        lambda: Plan.calibrate(
            num_examples=10,
            expected_batch_size=2,
            epochs=1,
            num_steps=2,
            epsilon=1.0,
            delta=0.1,
            clip=1.0,
        ),
        "either epochs or num_steps",
    ),
    # training
    "data of another size": (
        lambda: fit(data=jnp.ones((99, 3))),
        "the plan is for 100 examples and data has 99",
    ),
    "fit, vector loss": (lambda: fit(lambda p, e: p - e), "must return a scalar"),
    "fit, four arguments": (lambda: fit(lambda p, e, k, t: 0.0), "requires 4 arguments"),
    "fit, batch norm": (
        lambda: fit(
            lambda p, e: LINEN.apply({**LINEN_VARIABLES, "params": p}, e),
            params=LINEN_VARIABLES["params"],
        ),
        "changes the state of a Flax module",
    ),
    "settings for a plan": (
        lambda: train(plan={"clip": 1.0}),
        r"plan must be a dpoptax.Plan; got a dict of 1 entry. .*Plan\(\*\*settings\)",
    ),
    "file for a plan": (lambda: train(plan="plan.json"), r"Plan.from_json\(path.read_text\(\)\)"),
    "no plan in a run": (
        lambda: dpoptax.training.PrivateRun(
            None, PARAMS, DATA, plan=None, optimizer=optax.sgd(0.1)
        ),
        "plan must be a dpoptax.Plan; got None",
    ),
    "loss and parameters as a pair": (
        lambda: train(loss_fn=(quadratic, PARAMS)),
        "loss_fn must be a function; got a tuple of 2 entries. .*loss, params = dpoptax.nnx",
    ),
    "value of a loss": (
        lambda: dpoptax.per_example_grads(quadratic(PARAMS, DATA)),
        r"loss_fn must be a function; got an array of float32 with shape \(\)",
    ),
    "labels for a key": (
        lambda: train(loss_fn=lambda p, x, y: jnp.sum((p - x - y) ** 2)),
        r"third argument of a loss is a PRNG key. .*third argument is y.*loss\(params, \*example\)",
    ),
    "labels for a key, NNX": (
        lambda: train(
            *dpoptax.nnx.loss_fn(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), lambda m, x, y: m(x)[0] - y)
        ),
        r"called with \(model, example, key\).*third argument is y.*loss\(model, \*example\)",
    ),
    "resume without a folder": (
        lambda: train(resume=True),
        "resume must be a folder .*; got True. Pass for example",
    ),
    "checkpoints without a folder": (lambda: dpoptax.training.Checkpoints(3), "path must be a fol"),
    "word for a microbatch": (
        lambda: train(microbatch_size="big"),
        "must be a number of examples, \"auto\" or None; got 'big'",
    ),
    "number for a key": (
        lambda: train(key=1234567),
        r"got a number. For a test pass jax.random.key",
    ),
    "side effect in the loss": (
        lambda: dpoptax.per_example_grads(effectful)(jnp.ones(2), jnp.ones((3, 2))),
        "loss_fn must be pure.*jax.debug.print may stay",
    ),
    "microbatch_size": (
        lambda: dpoptax.per_example_grads(quadratic, microbatch_size=0),
        "microbatch_size must be at least 1",
    ),
    "num_samples": (
        lambda: dpoptax.vi.local_elbo_loss(lambda p, x: (x, x), lambda p, z, x: 0.0, num_samples=0),
        "num_samples must be at least 1",
    ),
}


# Calls with arguments of a wrong type, which the type checker of the tests refuses first.
UNTYPED = {
    *(
        "no clip",
        "text for a clip",
        "text for the bound of a group",
        "Optax schedule for a clip",
        "settings for a plan",
    ),
    *("file for a plan", "no plan in a run", "loss and parameters as a pair", "value of a loss"),
    *("resume without a folder", "checkpoints without a folder", "word for a microbatch"),
    *("dict for a clip", "parameters first", "number of runs", "number for a key"),
}
CASES = [
    pytest.param(*case, id=name, marks=[pytest.mark.untyped] * (name in UNTYPED))
    for name, case in WRONG_CALLS.items()
]


@pytest.mark.parametrize(("call", "message"), CASES)
def test_error_says_what_was_expected_what_came_and_what_to_do(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert not isinstance(caught.value, TypeCheckError), "only the type checker of the tests raised"
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert "8274.5" not in str(caught.value), "an error shows the data or the parameters"
    assert "1234567" not in str(caught.value), "an error shows a key"


@pytest.mark.untyped
@pytest.mark.parametrize("size", [200, 5000])
def test_errors_about_files_do_not_show_their_content(size):
    """Whoever passes the wrong file must not find it in a log."""
    secret = "patient 17, " * size
    record = json.loads(plan().to_json())
    for text in (
        secret,
        json.dumps(secret),
        json.dumps([secret]),
        json.dumps({"format": secret}),
        json.dumps(record | {"format": secret}),
        json.dumps(record | {f"patient {i}": i for i in range(size)}),
        json.dumps(record | {"sampler": secret}),
        json.dumps(record | {"sampler": {"kind": secret}}),
        json.dumps(record | {"sampler": {"kind": f"{secret}:{secret}"}}),
    ):
        with pytest.raises(ValueError, match=r"expected|must") as caught:
            Plan.from_json(text)
        assert "patient" not in str(caught.value)
        assert len(str(caught.value)) < 500
    for wrong in (secret, [secret], {secret: 1}):
        with pytest.raises(ValueError, match="relation must be one of") as caught:
            plan().epsilon(relation=wrong)
        assert "patient" not in str(caught.value)
    saved = json.loads(plan().ledger().to_json())
    saved["clip"] = {"kind": secret, secret: 1}
    with pytest.raises(ValueError, match="this ledger has the clip") as caught:
        accounting.Ledger.from_json(json.dumps(saved), sampler=SAMPLER, clip=1.0)
    assert "patient" not in str(caught.value)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int32, np.int64, float, int])
def test_numpy_scalars_are_numbers(number):
    assert clipping.FlatClip(number(1)).l2_clip == 1.0
    assert samplers.Poisson(np.int64(100), number(10)) == SAMPLER
    assert plan(num_steps=np.int32(5), noise_multiplier=number(1)) == plan()


@pytest.mark.seconds
def test_a_nan_pixel_changes_nothing_but_that_examples_contribution():
    data = jnp.ones((100, 3)).at[5, 1].set(jnp.nan)
    # Every example in every batch, and no noise: both differ between runs with different data.
    everyone = {"sampler": samplers.Poisson(100, 100), "noise_multiplier": 0.0}
    poisoned = fit(data=data, **everyone)
    assert np.all(np.isfinite(poisoned.params))
    absent = fit(lambda p, e: jnp.where(e[3] > 0, 0.0, 1.0) * quadratic(p, e[:3]),
                 data=jnp.ones((100, 4)).at[:, 3].set(0).at[5, 3].set(1), **everyone)  # fmt: skip
    assert not np.allclose(absent.params, fit(**everyone).params, rtol=1e-6)
    np.testing.assert_allclose(poisoned.params, absent.params, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"form": "stacked"}, {"microbatch_size": 2}])
def test_no_examples_or_no_parameters_give_empty_gradients(options):
    def loss_fn(params, x):
        kernel = params["k"] if params else jnp.ones((1, 1, 2))
        return jnp.sum(jax.lax.conv_general_dilated(x[None, None], kernel, (1,), "SAME"))

    grads_fn = dpoptax.per_example_grads(loss_fn, **options)
    params = {"k": jnp.ones((1, 1, 2))}
    none = grads_fn(params, jnp.ones((0, 5)))
    assert none.squared_norms()["k"].shape == (0,)
    np.testing.assert_array_equal(none.weighted_sum(jnp.ones(0))["k"], jnp.zeros((1, 1, 2)))
    assert grads_fn({}, jnp.ones((3, 5))).weighted_sum(jnp.ones(3)) == {}
