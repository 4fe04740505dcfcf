"""A loop of your own that drifts from its plan: the run of a plan ends, counts and saves itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from dpoptax.training import HostData, PrivateRun, fit
from dpoptax.training._resume.write_ahead_log import WriteAheadLog

PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(40, 8), clip=1.0, noise_multiplier=1.0, num_steps=3,
    delta=1e-3,
)  # fmt: skip
KEY = jax.random.key(0)
DATA = np.asarray(jax.random.normal(jax.random.key(1), (40, 2)))


def loss_fn(params, example):
    return jnp.sum((params - example) ** 2)


def make(loss=loss_fn, data=DATA, plan=PLAN, key=KEY, rate=0.1, **options):
    return PrivateRun(
        loss, jnp.zeros(2), data, plan=plan, optimizer=optax.sgd(rate), key=key, **options
    )


@pytest.fixture(scope="module")
def whole():
    with jax.numpy_dtype_promotion("strict"):
        return fit(
            loss_fn, jnp.zeros(2), DATA, plan=PLAN, optimizer=optax.sgd(0.1), key=KEY,
            progress=False,
        )  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize("wrap", [lambda data: data, HostData])
def test_a_run_ends_at_the_last_planned_step_and_gives_the_numbers_of_fit(wrap, whole):
    run = make(data=wrap(DATA))
    assert run.epsilon() == 0
    infos = list(run)
    assert len(infos) == run.steps_done == 3
    assert float(infos[-1].nonprivate_loss) > 0
    # Single steps over host data are another program than a loop over device data, so the compiler
    # may round in another order.
    np.testing.assert_allclose(run.params, whole.params, rtol=1e-5)
    if wrap is not HostData:
        np.testing.assert_array_equal(run.params, whole.params)
    assert run.epsilon() == whole.epsilon() == PLAN.epsilon()
    assert str(run.report()) == str(whole.report())
    assert list(run) == []
    with pytest.raises(ValueError, match=r"at most 0 more steps.*plan has 3 and 3 ran.*got .* 1\."):
        run.step()


@pytest.mark.seconds
def test_a_run_that_stops_early_reports_what_ran():
    run = make()
    run.step(2)
    assert (run.steps_done, run.steps_left) == (2, 1)
    assert run.epsilon() == PLAN.epsilon(2)
    assert "2 done of 3 planned" in str(run.report())
    # The run cannot know whether the parameters decided the end.
    assert run.report().epsilon == PLAN.epsilon()
    assert run.report().epsilon_of_steps_done == PLAN.epsilon(2)
    with pytest.raises(ValueError, match="at most 1 more steps"):
        run.step(2)
    assert run.ledger.num_steps == run.steps_done == 2
    for wrong in (0, -1, 1.5):
        with pytest.raises((TypeError, ValueError), match="num_steps"):
            run.step(wrong)


@pytest.mark.parametrize("loss", [loss_fn, None])
def test_data_of_another_length_are_refused(loss):
    with pytest.raises(ValueError, match=r"40 examples.*39"):
        make(loss, data=DATA[:39])


def test_a_closed_run_and_a_run_without_a_folder_say_so():
    run = make()
    with pytest.raises(ValueError, match=r"resume=folder"):
        run.save()
    run.close()
    run.close()
    with pytest.raises(ValueError, match=r"open run.*closed.*same arguments"):
        run.step()


def test_a_run_shows_no_key_and_no_parameter():
    assert repr(make()) == "PrivateRun(0 steps done of 3 planned)"


def grads_of(run, examples):
    # Rows that are padded have gradients too: the mask is forgotten.
    return jax.vmap(jax.grad(loss_fn), (None, 0))(run.params, _arrays(examples))


def drawn(run):
    """The plain examples of a batch, and their mask."""
    taken = run.sample()
    return taken.examples, taken.mask


def _arrays(examples):
    return jax.tree.leaves(examples)[0]


@pytest.mark.seconds
def test_gradients_of_your_own_are_one_step_for_each_batch(whole):
    run = make(None)
    with pytest.raises(ValueError, match="Call sample before"):
        run.apply(jnp.zeros((40, 2)))
    with pytest.raises(ValueError, match="made without one"):
        run.step()
    examples, mask = drawn(run)
    again, _ = drawn(run)
    np.testing.assert_array_equal(_arrays(again), _arrays(examples))
    assert run.epsilon() == 0
    with pytest.raises(ValueError, match=r"rows of the last batch.*got gradients of 5 rows"):
        run.apply(jnp.zeros((5, 2)))
    with pytest.raises(ValueError, match="summed or averaged"):
        run.apply(jnp.zeros((len(mask), 3)))
    assert (run.steps_done, run.ledger.num_steps) == (0, 0)
    run.apply(grads_of(run, examples))
    assert run.epsilon() == PLAN.epsilon(1)
    with pytest.raises(ValueError, match="Call sample before"):
        run.apply(grads_of(run, examples))
    while run.steps_left:
        examples, _ = drawn(run)
        run.apply(grads_of(run, examples))
    with pytest.raises(ValueError, match="at most 0 more steps"):
        run.sample()
    assert run.epsilon() == PLAN.epsilon()
    with pytest.raises(ValueError, match="this run has a loss"):
        make().sample()


def test_a_forgotten_mask_changes_nothing():
    """Padded rows do not count, whatever the caller computes for them."""
    quiet = dpoptax.Plan(
        sampler=PLAN.sampler, clip=1.0, noise_multiplier=0.0, num_steps=1, delta=1e-3
    )

    def step(padding):
        run = make(None, plan=quiet)
        examples, mask = drawn(run)
        grads = grads_of(run, examples)
        run.apply(jnp.where(mask[:, None], grads, padding))
        return np.asarray(run.params)

    np.testing.assert_array_equal(step(0.0), step(1e3))


@pytest.mark.slow
def test_a_saved_run_continues_bit_for_bit(tmp_path, whole):
    with make(resume=tmp_path / "run") as run:
        run.step()
        run.save()
        with pytest.raises(ValueError, match="another process is training"):
            make(resume=tmp_path / "run")
    with make(resume=tmp_path / "run") as run:
        assert (run.steps_done, run.ledger.num_steps) == (1, 1)
        list(run)
        np.testing.assert_array_equal(run.params, whole.params)
    # A finished run is read, and can be given more steps.
    with make(resume=tmp_path / "run") as run:
        assert run.epsilon() == PLAN.epsilon()
        assert list(run) == []
    with make(resume=tmp_path / "run", plan=PLAN.replace(num_steps=4)) as run:
        run.step()
        assert run.epsilon() == PLAN.epsilon(4)


@pytest.mark.slow
def test_steps_of_a_crash_are_repeated_and_count_once_or_stay_charged(tmp_path, whole):
    """The process ends inside a step, after it was charged."""

    class CrashError(Exception):
        pass

    def crash(*_):
        raise CrashError

    folder = tmp_path / "run"
    for rate, charged in ((0.1, 3), (0.2, 4)):
        run = make(resume=folder / str(rate))
        run.step()
        run._stepper.advance = crash
        with pytest.raises(CrashError):
            run.step()
        assert WriteAheadLog(folder / str(rate) / "write_ahead_log").segments[-1].end == 2
        run.close()
        if rate == 0.1:
            run = make(resume=folder / str(rate))
        else:
            with pytest.warns(RuntimeWarning, match="1 steps that ran after it stay charged"):
                run = make(resume=folder / str(rate), rate=rate)
        list(run)
        assert (run.steps_done, run.ledger.num_steps) == (3, charged)
        assert run.epsilon() == PLAN.epsilon(charged)
        run.close()


@pytest.mark.slow
def test_gradients_of_your_own_continue_with_new_noise(tmp_path):
    """Nobody can know whether they are the same as before."""
    folder = tmp_path / "run"
    params = []
    with make(None, resume=folder) as run:
        run.apply(grads_of(run, drawn(run)[0]))
    for _ in range(2):
        run = make(None, resume=folder)
        assert run.steps_done == 1
        run.apply(jnp.zeros((len(drawn(run)[1]), 2)))
        params.append(np.asarray(run.params))
        run._run.close()  # a crash: nothing was saved
    assert not np.allclose(*params)
    with make(None, resume=folder) as run:
        assert (run.steps_done, run.ledger.num_steps) == (1, 3)
    shuffled = PLAN.replace(sampler=dpoptax.samplers.Shuffled(40, 8))
    with pytest.raises(ValueError, match=r"independent steps.*got Shuffled"):
        make(None, plan=shuffled, resume=tmp_path / "other")
