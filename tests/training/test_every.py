"""Functions that are called during a run: when, with what, and how they end it."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.reports import round_up
from dpoptax.training import Every, HostData, fit
from dpoptax.training._progress import ProgressReporter
from dpoptax.training._result import make_result
from dpoptax.training._resume.run import NoResume
from dpoptax.transforms import average_params

STEPS = 12
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=STEPS,
    delta=1e-3,
)  # fmt: skip
DATA = np.asarray(3.0 + jax.random.normal(jax.random.key(7), (40, 2)))


def loss_fn(params, example):
    return jnp.sum((params - example) ** 2), {"away": jnp.max(example)}


def run(progress, **changes):
    options = {"loss_fn": loss_fn, "data": DATA, "diagnostics": True}
    optimizer = optax.chain(optax.sgd(0.3), average_params())
    return fit(
        params=jnp.zeros(2), plan=PLAN, optimizer=optimizer, key=jax.random.key(0),
        progress=progress, **(options | changes),
    )  # fmt: skip


@pytest.fixture(scope="module")
def calls():
    """The calls of one run: after every step, after 5 steps, and seldom; and its result."""
    each, fifth, seldom = [], [], []
    result = run(
        [
            Every(each.append, steps=1),
            Every(fifth.append, steps=5),
            Every(seldom.append, seconds=1e6),
        ]
    )
    return each, fifth, seldom, result


def test_they_are_called_at_their_steps_and_after_the_last_one(calls):
    each, fifth, seldom, result = calls
    assert [progress.step for progress in each] == list(range(1, STEPS + 1))
    assert [progress.step for progress in fifth] == [5, 10, STEPS]
    assert [progress.step for progress in seldom] == [STEPS]
    assert result.stopped == "plan"


def test_they_get_epsilon_parameters_their_average_and_metrics(calls):
    each, fifth, _, result = calls
    for progress in fifth:
        assert progress.epsilon == PLAN.epsilon(progress.step)
        iterates = [one.params for one in each[: progress.step]]
        np.testing.assert_allclose(progress.averaged_params, np.mean(iterates, 0), rtol=1e-5)
        found = progress.nonprivate
        assert DATA.min() < float(found.nonprivate_aux["away"]) < DATA.max()
        assert found._fields[-1] == "nonprivate_aux"
    np.testing.assert_array_equal(fifth[-1].params, result.params)


@pytest.mark.slow
def test_one_may_end_the_run_with_the_guarantee_of_the_plan(calls):
    """Data on the host are read in larger parts: a stop, or a call, may cut such a part."""
    each, *_ = calls
    stop_at, seen, last = 7, [], []
    result = run(
        [
            Every(seen.append, steps=2),
            Every(lambda progress: progress.step >= stop_at, steps=1),
            last.append,
        ],
        loss_fn=lambda params, example: loss_fn(params, example)[0],
        data=HostData(DATA),
        diagnostics=False,
    )
    assert (result.num_steps, result.stopped) == (stop_at, "callback")
    assert_both_epsilons_are_reported(result, stop_at)
    # Functions that were not due see the last parameters too.
    assert seen[-1].step == last[-1].step == stop_at
    for progress in seen:
        np.testing.assert_allclose(progress.params, each[progress.step - 1].params, rtol=1e-6)


def assert_both_epsilons_are_reported(result, done):
    """The parameters may have decided the end: the plan counts, and the rest is conditional."""
    report, text = result.report(), " ".join(str(result.report()).split())
    assert result.epsilon() == report.epsilon == PLAN.epsilon()
    assert report.epsilon_of_steps_done == result.ledger.epsilon() == PLAN.epsilon(done)
    assert report.epsilon_replace_one == PLAN.epsilon(relation="replace_one")
    assert f"{done} done of {STEPS} planned" in text
    assert f"({round_up(PLAN.epsilon())}, 0.001)-differential privacy" in text
    assert f"counts all {STEPS} planned steps, because something that was released may" in text
    assert f"{round_up(PLAN.epsilon(done))} at delta 0.001. This holds only if nothing" in text
    assert "decision by the training loss is not covered" in text


@pytest.mark.parametrize(
    ("stopped", "looked"),
    [
        *(("plan", False), ("time limit", False), ("SIGTERM", False)),
        *(("callback", True), ("SIGINT", True), ("another process", True)),
    ],
)
def test_what_ended_a_run_decides_which_steps_its_epsilon_counts(stopped, looked):
    result = make_result(state_at(5), PLAN, NoResume("test"), stopped)
    if looked:
        assert_both_epsilons_are_reported(result, 5)
    else:
        assert result.epsilon() == result.report().epsilon == PLAN.epsilon(5)
        assert "planned steps, because" not in " ".join(str(result.report()).split())


def test_a_signal_during_a_function_that_asks_to_stop_is_not_the_reason():
    """Else a function could wait for the time limit when it likes the parameters."""

    def ask(progress):
        signal.raise_signal(signal.SIGTERM)
        return True

    result = run(Every(ask, steps=2))
    assert (result.num_steps, result.stopped) == (2, "callback")


def test_without_averaging_there_is_no_average():
    reporter = ProgressReporter(seen := [], PLAN.ledger(), done=0, num_steps=STEPS)
    assert not reporter.update(state_at(1), last=True)
    assert seen == []
    reporter = ProgressReporter(seen.append, PLAN.ledger(), done=0, num_steps=STEPS)
    assert not reporter.update(state_at(1), last=True)
    assert seen[0].averaged_params is None


def state_at(step):
    state = dpoptax.training.TrainState(*[None] * 5)
    return state._replace(step=np.int32(step), opt_state=optax.adam(1.0).init(jnp.zeros(2)))


@pytest.mark.parametrize("answer", [True, np.True_, np.array(True), jnp.array(True)])
def test_true_of_any_library_stops(answer):
    reporter = ProgressReporter(lambda _: answer, PLAN.ledger(), done=0, num_steps=STEPS)
    assert reporter.update(state_at(1))


@pytest.mark.parametrize("answer", [1, 0.93, "stop", np.array([True]), jnp.array(1.0)])
def test_other_answers_are_refused(answer):
    """A function that returns its accuracy must not stop the run by accident."""
    reporter = ProgressReporter(lambda _: answer, PLAN.ledger(), done=0, num_steps=STEPS)
    with pytest.raises(TypeError, match=r"must return True to stop the run.*return nothing"):
        reporter.update(state_at(1))


@pytest.mark.untyped
def test_wrong_settings_are_refused():
    for settings in ({}, {"steps": 1, "seconds": 1.0}):
        with pytest.raises(TypeError, match="give either steps or seconds"):
            Every(print, **settings)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Every(print, steps=0)
    with pytest.raises(ValueError, match="seconds must be positive"):
        Every(print, seconds=0.0)
    with pytest.raises(TypeError, match="progress must be True, False, a function"):
        ProgressReporter("bar", PLAN.ledger(), done=0, num_steps=1)
