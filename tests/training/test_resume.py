"""Resumed runs of `fit`, end to end: bit for bit the same, and never charged too little.

`test_resumable_run.py` tries many more crashes with a fake stepper.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from array_record.python import array_record_module

import dpoptax
from dpoptax.training import Checkpoints, DeviceData, HostData, fit, time_limit
from dpoptax.training._dispatch import _Steps
from dpoptax.training._progress import ProgressReporter
from dpoptax.training._resume.identity import identity_of
from dpoptax.training._resume.write_ahead_log import WriteAheadLog

SAMPLER = dpoptax.samplers.Poisson(300, 30)
KEY = jax.random.key(0)
DATA = np.asarray(2.0 + jax.random.normal(jax.random.key(7), (300, 2)))


# Dispatches make 1, 2, 4, ... steps, so this is four of them, each with a checkpoint.
STEPS = 12


def plan(steps=STEPS, **changes):
    fields = {"sampler": SAMPLER, "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-4}
    return dpoptax.Plan(num_steps=steps, **(fields | changes))


def loss_fn(params, example):
    return jnp.sum((params["w"] - example) ** 2)


@contextlib.contextmanager
def calling(function):
    """Calls a function with the number of steps done after every dispatch, without an epsilon."""

    def update(self, state, info=None, *, last=False):
        function(int(state.step))
        return False

    with mock.patch.object(ProgressReporter, "update", update):
        yield


def run(folder, steps=STEPS, data=DATA, loss=loss_fn, rate=0.1, key=KEY, stop_at=None, **changes):
    """A run that saves after every dispatch; `stop_at` interrupts it there."""
    planned = changes.pop("plan", None) or plan(steps)
    optimizer = optax.sgd(rate, momentum=0.9)

    def stop(done):
        if stop_at is not None and done >= stop_at:
            signal.raise_signal(signal.SIGINT)

    with calling(stop):
        return fit(
            loss, {"w": jnp.zeros(2)}, data, plan=planned, optimizer=optimizer, key=key,
            progress=False, resume=None if folder is None else Checkpoints(folder, every_seconds=0),
            **changes,
        )  # fmt: skip


@pytest.fixture(scope="module")
def whole_run():
    """The run that nothing interrupts."""
    with jax.numpy_dtype_promotion("strict"):
        return run(None)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A folder with three steps; tests only look into it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    with jax.numpy_dtype_promotion("strict"):
        run(folder, steps=3)
    return folder


def crash(folder, at, beyond, **changes):
    """A folder whose last checkpoint is of step `at`, with steps up to `beyond` authorized."""
    run(folder, stop_at=at, **changes)
    before = folder.parent / "before"
    shutil.copytree(folder / "checkpoints", before)
    run(folder, stop_at=beyond, **changes)
    shutil.rmtree(folder / "checkpoints")
    before.rename(folder / "checkpoints")
    steps = [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()]
    return max(steps)


def same(a, b):
    return bool(jnp.array_equal(a.params["w"], b.params["w"]))


def test_an_interrupted_run_reports_what_ran_and_continues_bit_for_bit(tmp_path, whole_run):
    part = run(tmp_path / "run", stop_at=3)
    assert part.stopped == "SIGINT"
    assert 3 <= part.num_steps < STEPS
    # Whoever pressed Ctrl-C may have looked at the parameters.
    assert part.epsilon() == part.report().epsilon == plan().epsilon()
    assert part.report().epsilon_of_steps_done == plan().epsilon(part.num_steps)
    assert f"{part.num_steps} done of {STEPS} planned" in str(part.report())
    rest = run(tmp_path / "run")
    assert rest.stopped == "plan"
    assert same(rest, whole_run)
    assert rest.epsilon() == whole_run.epsilon()
    again = run(tmp_path / "run")
    assert same(again, whole_run)
    assert again.epsilon() == whole_run.epsilon()


@pytest.mark.slow
def test_a_time_limit_ends_with_a_result(tmp_path, whole_run):
    with time_limit(0.0):
        result = run(tmp_path / "run")
    assert (result.num_steps, result.stopped, result.epsilon()) == (0, "time limit", 0)
    assert same(run(tmp_path / "run"), whole_run)


def test_signals_act_as_usual_after_a_run():
    before = signal.getsignal(signal.SIGINT)
    run(None, stop_at=3)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_steps_lost_in_a_crash_are_replayed_bit_for_bit_and_count_once(tmp_path, whole_run):
    saved = crash(tmp_path / "run", at=3, beyond=6)
    result = run(tmp_path / "run")
    assert saved < 6
    assert same(result, whole_run)
    assert result.epsilon() == plan().epsilon()


@pytest.mark.slow
def test_a_changed_run_draws_other_noise_and_what_was_lost_stays_charged(tmp_path):
    folder = tmp_path / "run"
    saved = crash(folder, at=3, beyond=6)
    authorized = WriteAheadLog(folder / "write_ahead_log").segments[-1].end
    with pytest.warns(RuntimeWarning, match="other noise, and [0-9]+ steps that ran after it"):
        result = run(folder, rate=0.2)
    lost = result.ledger.num_steps - STEPS
    assert lost == authorized - saved >= 6 - saved
    assert result.num_steps == STEPS
    assert result.epsilon() == plan().epsilon(STEPS + lost)
    assert f"and {lost} lost in a crash" in str(result.report())
    # Opened once more, nothing is forgotten.
    again = run(folder, rate=0.2)
    assert again.epsilon() == result.epsilon()
    assert same(again, result)


class CrashError(Exception):
    """The process ends."""


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [DeviceData, HostData])
def test_a_dispatch_that_a_crash_ends_is_on_disk_before_it_runs(tmp_path, monkeypatch, wrap):
    """The steps are made, and nothing after them: they may be known, so they stay charged."""
    folder = tmp_path / "run"
    dispatches = []
    run_steps = _Steps.run

    def crash(self, state, data, num_steps, first=0):
        on_disk = WriteAheadLog(folder / "write_ahead_log").segments[-1].end
        dispatches.append((int(state.step), num_steps, on_disk))
        done = run_steps(self, state, data, num_steps, first)
        if int(state.step) >= 1:
            raise CrashError
        return done

    monkeypatch.setattr(_Steps, "run", crash)
    monkeypatch.setattr("dpoptax.training._host_reader.MAX_BATCHES_PER_READ", 4)
    with pytest.raises(CrashError):
        run(folder, data=wrap(DATA))
    monkeypatch.undo()
    assert all(on_disk == first + count for first, count, on_disk in dispatches)
    first, lost, _ = dispatches[-1]
    with pytest.warns(RuntimeWarning, match=f"other noise, and {lost} steps that ran after it"):
        result = run(folder, data=wrap(DATA), rate=0.2)
    assert first >= 1
    assert result.ledger.num_steps == STEPS + lost
    assert result.epsilon() == plan().epsilon(STEPS + lost)


@pytest.mark.slow
def test_other_noise_is_other_noise(tmp_path):
    """With gradients of zero a step is its noise."""

    def flat(params, example):
        return jnp.sum(0.0 * params["w"] * example)

    folder, copy = tmp_path / "run", tmp_path / "copy"
    run(folder, loss=flat, stop_at=3)
    shutil.copytree(folder, copy)
    replayed = run(folder, loss=flat)
    assert same(replayed, run(None, loss=flat))
    with pytest.warns(RuntimeWarning, match="other noise"):
        changed = run(copy, loss=lambda p, x: flat(p, x) + jnp.sum(0.0 * jnp.sin(p["w"])))
    assert not np.allclose(replayed.params["w"], changed.params["w"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"plan": plan(sampler=dpoptax.samplers.Poisson(300, 31))}, "sampler"),
        ({"plan": plan(clip=2.0)}, "clip"),
        ({"plan": plan(noise_multiplier=2.0)}, "noise multiplier"),
        ({"plan": plan(delta=1e-5)}, "delta"),
        ({"key": jax.random.key(1)}, "key"),
        ({"plan": plan(sampler=dpoptax.samplers.Poisson(200, 30)), "data": DATA[:200]}, "sampler"),
    ],
)
def test_another_run_is_refused_by_name(short_run, changes, what):
    message = rf"holds a run with another {what}.*start again in another"
    with pytest.raises(ValueError, match=message):
        run(short_run, **changes)


def test_another_number_of_rounds_is_another_key():
    keys = [dpoptax.random.insecure_key(0, rounds=rounds) for rounds in (8, 12, 20)]
    digests = [identity_of(plan(), {"w": jnp.zeros(2)}, key)["key (its digest)"] for key in keys]
    assert len(set(digests)) == 3


def test_another_model_and_fewer_steps_are_refused(tmp_path, short_run):
    with pytest.raises(ValueError, match="a run with another model"):
        fit(
            lambda p, x: jnp.sum((p["v"] - x) ** 2), {"v": jnp.zeros(2)}, DATA, plan=plan(),
            optimizer=optax.sgd(0.1), key=KEY, progress=False, resume=short_run,
        )  # fmt: skip
    with pytest.raises(ValueError, match="has made 3 steps and the plan has 2"):
        run(short_run, steps=2)
    shutil.copytree(short_run, tmp_path / "run")
    assert run(tmp_path / "run", steps=6).num_steps == 6


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"\0" * 10)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, whole_run):
    folder = tmp_path / "run"
    part = run(folder, stop_at=3)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2
    damage(folder / "checkpoints" / str(steps[-1]))
    with pytest.warns(RuntimeWarning, match=f"step {steps[-1]} .* cannot be read"):
        result = run(folder)
    assert part.num_steps == steps[-1]
    assert same(result, whole_run)
    assert result.epsilon() == plan().epsilon()
    for step in (folder / "checkpoints").iterdir():
        damage(step)
    with (
        pytest.warns(RuntimeWarning, match="cannot be read"),
        pytest.raises(ValueError, match=r"none of the checkpoints .* count this run in full"),
    ):
        run(folder)


def test_a_full_disk_is_a_warning_and_training_continues(tmp_path, monkeypatch, whole_run):
    save = ocp.CheckpointManager.save
    calls = []

    def full(self, step, **options):
        calls.append(step)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    message = r"was not written .*No space left.* training continues"
    with pytest.warns(RuntimeWarning, match=message):
        result = run(tmp_path / "run")
    assert same(result, whole_run)
    monkeypatch.undo()
    rest = run(tmp_path / "run")
    assert same(rest, result)
    assert rest.epsilon() == plan().epsilon()


def test_a_folder_that_lost_its_checkpoints_or_its_log_is_refused(tmp_path, short_run):
    for name in ("run", "copy"):
        shutil.copytree(short_run, tmp_path / name)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="says that steps ran, and there is no checkpoint"):
        run(tmp_path / "run")
    (tmp_path / "copy" / "write_ahead_log").unlink()
    with pytest.raises(ValueError, match=r"log is gone.* count this run in full"):
        run(tmp_path / "copy", rate=0.2)


@pytest.mark.slow
def test_a_finished_run_whose_log_is_gone_or_old_is_refused(tmp_path):
    """Otherwise it would forget the steps that a crash lost."""
    saved = crash(tmp_path / "run", at=3, beyond=6)
    log = tmp_path / "run" / "write_ahead_log"
    old = log.read_bytes()
    with pytest.warns(RuntimeWarning, match="other noise"):
        result = run(tmp_path / "run", rate=0.2)
    assert result.ledger.num_steps > STEPS
    assert result.num_steps == STEPS > saved
    log.write_bytes(old)
    for _ in range(2):  # an older log, then none
        with pytest.raises(ValueError, match=r"log is gone, or older.* count this run in full"):
            run(tmp_path / "run", rate=0.2)
        log.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_result_shows_no_key(tmp_path):
    result = run(None, steps=2, key=dpoptax.random.insecure_key(3))
    for key in (result.state.sampler_state.key, result.state.opt_state[0].key):
        for word in np.asarray(jax.random.key_data(key)).ravel():
            assert str(word) not in repr(result)


def test_a_first_checkpoint_that_fails_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    def full(self, step, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with (
        pytest.warns(RuntimeWarning, match="was not written"),
        pytest.raises(OSError, match="could not be written; nothing was run"),
    ):
        run(tmp_path / "run")


@pytest.mark.slow
def test_another_optimizer_and_a_second_process_are_refused(tmp_path, short_run):
    for optimizer, message in (
        (optax.sgd(0.1), "with another optimizer state"),
        (
            optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
            r"trace.*float32.* there, .*bfloat16.* here",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fit(
                loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), optimizer=optimizer, key=KEY,
                progress=False, resume=short_run,
            )  # fmt: skip
    refused = []

    def meanwhile(done):
        with pytest.raises(ValueError, match="another process is training"):
            fit(
                loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), optimizer=optax.sgd(0.1), key=KEY,
                progress=False, resume=tmp_path / "run",
            )  # fmt: skip
        refused.append(done)

    with calling(meanwhile):
        fit(
            loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(2), optimizer=optax.sgd(0.1), key=KEY,
            progress=False, resume=tmp_path / "run",
        )  # fmt: skip
    assert refused


@pytest.mark.slow
def test_one_changed_row_of_streamed_data_is_a_change(tmp_path):
    run(tmp_path / "run", data=HostData(DATA), steps=1)
    other = DATA.copy()
    other[7] += 1e-3
    with pytest.warns(RuntimeWarning, match="other noise"):
        run(tmp_path / "run", data=HostData(other), steps=3)


@pytest.mark.slow
def test_committed_and_empty_parameters_continue_bit_for_bit(tmp_path):
    params = {"w": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    params = jax.device_put(params, jax.devices()[0])
    data = jnp.asarray(DATA, jnp.bfloat16)

    def train(folder, **options):
        return fit(
            lambda p, x: loss_fn(p, x.astype(jnp.float32)), params, data, plan=plan(),
            optimizer=optax.sgd(0.1), key=KEY, progress=False, resume=folder, **options,
        )  # fmt: skip

    with time_limit(0.0):
        train(tmp_path / "run")
    assert same(train(tmp_path / "run"), train(None))


@pytest.mark.slow
def test_without_a_key_a_run_is_resumed_with_its_own(tmp_path):
    part = run(tmp_path / "run", key=None, stop_at=3)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    first, second = run(tmp_path / "run", key=None), run(tmp_path / "copy", key=None)
    assert same(first, second)
    assert not same(first, run(None, key=None))
    assert "entropy of the operating system" in str(first.report())
    assert part.num_steps < first.num_steps


def test_a_folder_holds_keys_and_says_so(short_run):
    assert short_run.stat().st_mode & 0o077 == 0
    assert "as you protect the training data" in (short_run / "HOLDS_KEYS.txt").read_text()
    with pytest.raises(ValueError, match="holds other things than a run"):
        run(short_run.parent, steps=2)


def records(folder):
    """The data as records on disk, through Grain."""
    path = str(folder / "data.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for row in DATA:
        writer.write(row.tobytes())
    writer.close()
    dataset = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(path))
    return dataset.map(lambda record: np.frombuffer(record, DATA.dtype).reshape(DATA.shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["arrays", "single examples", "records"])
def test_streamed_data_give_the_same_numbers_and_continue(tmp_path, source, whole_run, monkeypatch):
    monkeypatch.setattr("dpoptax.training._host_reader.MAX_BATCHES_PER_READ", 5)
    make = {"arrays": lambda: DATA, "single examples": lambda: list(DATA)}
    data = HostData(make.get(source, lambda: records(tmp_path))())
    assert same(run(None, data=data), whole_run)
    part = run(tmp_path / "run", data=data, stop_at=5)
    assert 5 <= part.num_steps < STEPS
    assert same(run(tmp_path / "run", data=data), whole_run)


@pytest.mark.slow
def test_a_changed_run_on_streamed_data_reads_the_rows_that_its_new_keys_draw(
    tmp_path, monkeypatch
):
    """Rows read with the old keys would belong to other people than those accounted for."""
    monkeypatch.setattr("dpoptax.training._host_reader.MAX_BATCHES_PER_READ", 1)
    # A step without noise moves w by the sum of its rows: one bit for each of twenty people.
    people = (2.0 ** np.arange(20)).astype(np.float32)
    free = plan(sampler=dpoptax.samplers.Poisson(20, 5), clip=2.0**30, noise_multiplier=0.0)

    def until(step, scale):
        def stop(done):
            if done >= step:
                signal.raise_signal(signal.SIGINT)

        with calling(stop):
            return fit(
                lambda w, person: scale * w * person, jnp.zeros(()), HostData(people), plan=free,
                optimizer=optax.sgd(5.0 / scale), key=KEY, progress=False,
                resume=Checkpoints(tmp_path / "run", every_seconds=0.0),
            )  # fmt: skip

    first = until(1, scale=1.0)
    with pytest.warns(RuntimeWarning, match="other noise"):
        second = until(2, scale=2.0)
    drawn = second.state.sampler_state
    assert int(drawn.step) == second.num_steps == 2
    assert not np.array_equal(
        jax.random.key_data(drawn.key), jax.random.key_data(first.state.sampler_state.key)
    )
    _, batch = free.sampler.sample(type(drawn)(drawn.step - 1, drawn.key))
    expected = people[np.asarray(batch.indices)[np.asarray(batch.mask)]].sum()
    assert float(first.params - second.params) == expected > 0


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(TypeError, match="needs a tree of arrays, or an object with len"):
        HostData(7)
    with pytest.raises(ValueError, match="the plan is for 300 examples and data has 299"):
        run(None, data=HostData(DATA[:299]))


@pytest.mark.slow
def test_nan_in_data_and_empty_batches_do_not_stop_a_run(tmp_path):
    spoilt = DATA.copy()
    spoilt[::7] = np.nan
    small = plan(sampler=dpoptax.samplers.Poisson(300, 1))
    result = run(tmp_path / "run", data=spoilt, plan=small)
    assert bool(jnp.all(jnp.isfinite(result.params["w"])))
    assert result.num_steps == STEPS


KILLED = """
    import sys
    sys.path[:0] = {paths!r}
    import os, signal, threading
    import orbax.checkpoint as ocp
    import test_resume

    when = sys.argv[2]
    count = 0
    if when == "while saving":
        commit = os.rename
        def rename(*arguments, **options):
            global count
            count += "checkpoints" in str(arguments[0])
            if count == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(*arguments, **options)
        os.rename = os.replace = rename
        rename_path = __import__("pathlib").Path.rename
        __import__("pathlib").Path.rename = lambda self, target: rename(self, target)
    else:
        authorize = test_resume.dpoptax.training._resume.write_ahead_log.WriteAheadLog.authorize
        def killed(self, end):
            global count
            authorize(self, end)
            count += 1
            if count == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        test_resume.dpoptax.training._resume.write_ahead_log.WriteAheadLog.authorize = killed
    test_resume.run(test_resume.pathlib.Path(sys.argv[1]))
    print("not killed")
"""


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["in a step", "while saving"])
def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, when, whole_run):
    here = pathlib.Path(__file__).parent
    code = textwrap.dedent(KILLED).format(paths=[str(here), str(here.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), when],
        capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(tmp_path / "run")
    assert result.num_steps == STEPS
    assert result.epsilon() == plan().epsilon()
    assert same(result, whole_run)
