"""A run survives what may happen to it, goes on bit for bit, and never counts too little."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from array_record.python import array_record_module

import dpoptax
from dpoptax.training import Checkpoints, HostData, fit
from dpoptax.training import _dispatch as engines

SAMPLER = dpoptax.samplers.Poisson(300, 30)
KEY = jax.random.key(0)
DATA = np.asarray(2.0 + jax.random.normal(jax.random.key(7), (300, 2)))


@pytest.fixture(autouse=True)
def _tell_of_every_dispatch(monkeypatch):
    monkeypatch.setattr("dpoptax.training._progress.SHARE_OF_TIME", 1e9)


def plan(steps=40, **changes):
    fields = {"sampler": SAMPLER, "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-4}
    return dpoptax.Plan(num_steps=steps, **(fields | changes))


def loss_fn(params, example):
    return jnp.sum((params["w"] - example) ** 2)


def run(folder, steps=40, data=DATA, loss=loss_fn, rate=0.1, key=KEY, every=0.0, **changes):
    """A run that saves after every dispatch; `stop_at` interrupts it there."""
    stop_at = changes.pop("stop_at", None)
    planned = changes.pop("plan", None) or plan(steps)
    optimizer = optax.sgd(rate, momentum=0.9)

    def stop(progress):
        if progress.step >= stop_at:
            signal.raise_signal(signal.SIGINT)

    return fit(
        loss, {"w": jnp.zeros(2)}, data, plan=planned, optimizer=optimizer, key=key,
        progress=False if stop_at is None else stop,
        resume=None if folder is None else Checkpoints(folder, every_seconds=every), **changes,
    )  # fmt: skip


def crash(folder, at, beyond, **changes):
    """A folder whose last checkpoint is of step `at`, with steps up to `beyond` let run."""
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


def test_an_interrupted_run_reports_what_ran_and_goes_on_bit_for_bit(tmp_path):
    whole = run(None)
    part = run(tmp_path / "run", stop_at=5)
    assert part.stopped == "SIGINT"
    assert 5 <= part.num_steps < 40
    assert part.epsilon() == plan().epsilon(part.num_steps)
    assert f"{part.num_steps} done of 40 planned" in str(part.report())
    rest = run(tmp_path / "run")
    assert rest.stopped == "plan"
    assert same(rest, whole)
    assert rest.epsilon() == whole.epsilon()
    again = run(tmp_path / "run")
    assert same(again, whole)
    assert again.epsilon() == whole.epsilon()


def test_a_time_limit_ends_with_a_result(tmp_path):
    result = run(tmp_path / "run", max_seconds=0.0)
    assert (result.num_steps, result.stopped, result.epsilon()) == (0, "time limit", 0)
    assert same(run(tmp_path / "run"), run(None))


def test_signals_act_as_ever_after_a_run():
    before = signal.getsignal(signal.SIGINT)
    run(None, stop_at=5)
    assert signal.getsignal(signal.SIGINT) is before


def test_steps_lost_in_a_crash_are_repeated_alike_and_count_once(tmp_path):
    saved = crash(tmp_path / "run", at=5, beyond=20)
    result = run(tmp_path / "run")
    assert saved < 20
    assert same(result, run(None))
    assert result.epsilon() == plan().epsilon()


def test_epsilon_shown_while_steps_are_repeated_counts_them_all(tmp_path):
    crash(tmp_path / "run", at=5, beyond=20)
    shown = []

    def look(progress):
        shown.append((progress.step, progress.epsilon))

    fit(
        loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), optimizer=optax.sgd(0.1, momentum=0.9),
        key=KEY, progress=look, resume=Checkpoints(tmp_path / "run", every_seconds=0.0),
    )  # fmt: skip
    repeated = [epsilon for step, epsilon in shown if step < 20]
    assert repeated
    assert min(repeated) >= plan().epsilon(20)
    assert shown[-1][1] == pytest.approx(plan().epsilon(), rel=0.05)


@pytest.mark.parametrize(
    ("program", "backend", "flags", "repeats"),
    [
        ("add", "cpu", "", True),
        ("custom-call callback", "cpu", "", False),
        ("add", "gpu", "", False),
        ("add", "gpu", "--xla_gpu_deterministic_ops=true", True),
        ("add", "gpu", "--a=b --xla_gpu_deterministic_ops=1", True),
        ("add", "gpu", "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
        ("add", "gpu", "--xla_gpu_exclude_nondeterministic_ops=true", False),
    ],
)
def test_only_what_repeats_to_the_bit_is_taken_for_a_repetition(program, backend, flags, repeats):
    assert engines._repeats(program, backend, flags) is repeats


def test_another_processor_is_a_change(monkeypatch):
    here = engines._digest("program", [DATA])
    assert engines._digest("program", [DATA]) == here
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1 + os.cpu_count()), raising=False)
    assert engines._digest("program", [DATA]) != here


@pytest.mark.parametrize(
    "changed", [{"rate": 0.2}, {"data": DATA + 0.001}, {"loss": lambda p, x: 2 * loss_fn(p, x)}],
    ids=["learning rate", "data", "loss"],
)  # fmt: skip
def test_a_changed_run_draws_other_noise_and_what_was_lost_stays_charged(tmp_path, changed):
    folder = tmp_path / "run"
    saved = crash(folder, at=5, beyond=20)
    allowed = json.loads((folder / "journal").read_text().split("\n")[1].split("}")[0] + "}")
    beyond = max(segment[2] for segment in allowed["segments"])
    with pytest.warns(RuntimeWarning, match="other noise, and [0-9]+ steps that ran after it"):
        result = run(folder, **changed)
    lost = result.ledger.num_steps - 40
    assert 20 - saved <= lost <= beyond + 40 - saved
    assert result.num_steps == 40
    assert result.epsilon() == plan().epsilon(40 + lost)
    assert f"and {lost} lost in a crash" in str(result.report())
    # Taken up once more, nothing is forgotten.
    again = run(folder, **changed)
    assert again.epsilon() == result.epsilon()
    assert same(again, result)


def test_other_noise_is_other_noise(tmp_path):
    """With gradients of zero a step is its noise."""

    def flat(params, example):
        return jnp.sum(0.0 * params["w"] * example)

    folder, copy = tmp_path / "run", tmp_path / "copy"
    run(folder, loss=flat, stop_at=5)
    shutil.copytree(folder, copy)
    alike = run(folder, loss=flat)
    assert same(alike, run(None, loss=flat))
    with pytest.warns(RuntimeWarning, match="other noise"):
        changed = run(copy, loss=lambda p, x: flat(p, x) + jnp.sum(0.0 * jnp.sin(p["w"])))
    assert not np.allclose(alike.params["w"], changed.params["w"])


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
def test_another_run_is_refused_by_name(tmp_path, changes, what):
    run(tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match=rf"holds a run of another {what}.*begin anew in another"):
        run(tmp_path / "run", **changes)


def test_another_model_and_fewer_steps_are_refused(tmp_path):
    run(tmp_path / "run", steps=3)
    with pytest.raises(ValueError, match="a run of another model"):
        fit(
            lambda p, x: jnp.sum((p["v"] - x) ** 2), {"v": jnp.zeros(2)}, DATA, plan=plan(),
            optimizer=optax.sgd(0.1), key=KEY, progress=False, resume=tmp_path / "run",
        )  # fmt: skip
    with pytest.raises(ValueError, match="has made 3 steps and the plan has 2"):
        run(tmp_path / "run", steps=2)
    assert run(tmp_path / "run", steps=6).num_steps == 6


def test_a_sampler_that_ties_steps_together_refuses_a_changed_run(tmp_path):
    tied = plan(sampler=dpoptax.samplers.Shuffled(300, 30))
    run(tmp_path / "run", plan=tied, stop_at=5)
    with pytest.raises(ValueError, match="Shuffled ties the steps of a run together"):
        run(tmp_path / "run", plan=tied, rate=0.2)
    assert same(run(tmp_path / "run", plan=tied), run(None, plan=tied))


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file() and "state" in path.parts:
            path.write_bytes(b"\0" * 10)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    folder = tmp_path / "run"
    part = run(folder, stop_at=10)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2
    damage(folder / "checkpoints" / str(steps[-1]))
    with pytest.warns(RuntimeWarning, match=f"step {steps[-1]} .* cannot be read"):
        result = run(folder)
    assert part.num_steps == steps[-1]
    assert same(result, run(None))
    assert result.epsilon() == plan().epsilon()
    for step in (folder / "checkpoints").iterdir():
        damage(step)
    with (
        pytest.warns(RuntimeWarning, match="cannot be read"),
        pytest.raises(ValueError, match=r"none of the checkpoints .* count this run in full"),
    ):
        run(folder)


def test_a_full_disk_is_a_warning_and_training_goes_on(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save
    calls = []

    def full(self, step, **options):
        calls.append(step)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.warns(RuntimeWarning, match=r"was not written .*No space left.* training goes on"):
        result = run(tmp_path / "run")
    assert same(result, run(None))
    monkeypatch.undo()
    rest = run(tmp_path / "run")
    assert same(rest, result)
    assert rest.epsilon() == plan().epsilon()


def test_a_folder_that_lost_its_checkpoints_or_its_journal_is_refused(tmp_path):
    run(tmp_path / "run", stop_at=5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="says that steps ran, and there is no checkpoint"):
        run(tmp_path / "run")
    (tmp_path / "copy" / "journal").unlink()
    with pytest.raises(ValueError, match=r"journal is gone.* count this run in full"):
        run(tmp_path / "copy", rate=0.2)


@pytest.mark.parametrize("old", [False, True])
def test_a_finished_run_whose_journal_is_gone_or_old_is_refused(tmp_path, old):
    """It would forget the steps that a crash lost."""
    saved = crash(tmp_path / "run", at=5, beyond=20)
    journal = (tmp_path / "run" / "journal").read_bytes()
    with pytest.warns(RuntimeWarning, match="other noise"):
        result = run(tmp_path / "run", rate=0.2)
    assert result.ledger.num_steps > 40
    assert result.num_steps == 40 > saved
    if old:
        (tmp_path / "run" / "journal").write_bytes(journal)
    else:
        (tmp_path / "run" / "journal").unlink()
    with pytest.raises(ValueError, match=r"journal is gone, or older.* count this run in full"):
        run(tmp_path / "run", rate=0.2)


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


def test_another_optimizer_and_a_second_process_are_refused(tmp_path):
    folder = tmp_path / "run"
    run(folder, stop_at=5)
    with pytest.raises(ValueError, match="whose optimizer has another state"):
        fit(
            loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), optimizer=optax.sgd(0.1), key=KEY,
            progress=False, resume=folder,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"trace.*float32.* there, .*bfloat16.* here"):
        fit(
            loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), key=KEY, progress=False,
            optimizer=optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16), resume=folder,
        )  # fmt: skip

    def meanwhile(progress):
        with pytest.raises(ValueError, match="another process is training"):
            run(folder)

    fit(
        loss_fn, {"w": jnp.zeros(2)}, DATA, plan=plan(), key=KEY, progress=meanwhile,
        optimizer=optax.sgd(0.1, momentum=0.9), resume=folder,
    )  # fmt: skip


def test_one_changed_row_of_streamed_data_is_a_change(tmp_path):
    run(tmp_path / "run", data=HostData(DATA), stop_at=1)
    other = DATA.copy()
    other[7] += 1e-3
    with pytest.warns(RuntimeWarning, match="other noise"):
        run(tmp_path / "run", data=HostData(other), steps=40)


def test_parameters_tied_to_a_device_and_empty_ones_go_on_alike(tmp_path):
    params = {"w": jnp.zeros(2), "none": jnp.zeros((0, 3))}
    params = jax.device_put(params, jax.devices()[0])
    data = jnp.asarray(DATA, jnp.bfloat16)

    def train(folder, **options):
        return fit(
            lambda p, x: loss_fn(p, x.astype(jnp.float32)), params, data, plan=plan(),
            optimizer=optax.sgd(0.1), key=KEY, progress=False, resume=folder, **options,
        )  # fmt: skip

    train(tmp_path / "run", max_seconds=0.0)
    assert same(train(tmp_path / "run"), train(None))


def test_without_a_key_a_run_is_taken_up_under_its_own(tmp_path):
    part = run(tmp_path / "run", key=None, stop_at=5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    first, second = run(tmp_path / "run", key=None), run(tmp_path / "copy", key=None)
    assert same(first, second)
    assert not same(first, run(None, key=None))
    assert "entropy of the operating system" in str(first.report())
    assert part.num_steps < first.num_steps


def test_a_folder_holds_keys_and_says_so(tmp_path):
    run(tmp_path / "run", steps=2)
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert "keep it as the training data" in (tmp_path / "run" / "HOLDS_KEYS.txt").read_text()
    with pytest.raises(ValueError, match="holds other things than a run"):
        run(tmp_path, steps=2)


def records(folder):
    """The data as records on disk, through Grain."""
    path = str(folder / "data.array_record")
    writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
    for row in DATA:
        writer.write(row.tobytes())
    writer.close()
    dataset = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(path))
    return dataset.map(lambda record: np.frombuffer(record, DATA.dtype).reshape(DATA.shape[1:]))


@pytest.mark.parametrize("source", ["arrays", "single examples", "records"])
def test_streamed_data_give_the_same_numbers_and_go_on(tmp_path, source):
    make = {"arrays": lambda: DATA, "single examples": lambda: list(DATA)}
    data = HostData(make.get(source, lambda: records(tmp_path))())
    whole = run(None)
    assert same(run(None, data=data), whole)
    part = run(tmp_path / "run", steps=100, data=data, stop_at=5)
    assert 5 <= part.num_steps < 100
    assert same(run(tmp_path / "run", steps=100, data=data), run(None, steps=100))


def test_a_changed_run_on_streamed_data_reads_those_whom_its_new_keys_draw(tmp_path, monkeypatch):
    """Rows read under the old keys would be other people than those accounted for."""
    monkeypatch.setattr("dpoptax.training._host_data.MOST_BATCHES", 1)
    # A step without noise moves w by the sum of its rows: one bit for each of twenty people.
    people = (2.0 ** np.arange(20)).astype(np.float32)
    free = plan(sampler=dpoptax.samplers.Poisson(20, 5), clip=2.0**30, noise_multiplier=0.0)

    def until(step, scale):
        def stop(progress):
            if progress.step >= step:
                signal.raise_signal(signal.SIGINT)

        return fit(
            lambda w, person: scale * w * person, jnp.zeros(()), HostData(people), plan=free,
            optimizer=optax.sgd(5.0 / scale), key=KEY, progress=stop,
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
    with pytest.raises(TypeError, match="must be a tree of arrays, or have len"):
        HostData(7)
    with pytest.raises(ValueError, match="the plan is for 300 examples and data has 299"):
        run(None, data=HostData(DATA[:299]))


def test_nan_in_data_and_empty_batches_do_not_stop_a_run(tmp_path):
    spoilt = DATA.copy()
    spoilt[::7] = np.nan
    small = plan(sampler=dpoptax.samplers.Poisson(300, 1))
    result = run(tmp_path / "run", data=spoilt, plan=small)
    assert bool(jnp.all(jnp.isfinite(result.params["w"])))
    assert result.num_steps == 40


def test_a_journal_that_is_torn_keeps_its_other_half(tmp_path):
    from dpoptax.training._resume.write_ahead_log import SLOT, Journal

    journal = Journal(tmp_path / "journal")
    journal.begin("a", 0)
    journal.allow(10)
    journal.allow(20)
    whole = (tmp_path / "journal").read_bytes()
    assert Journal(tmp_path / "journal").segments == [("a", 0, 20)]
    newest = 3 % 2
    torn = bytearray(whole)
    torn[newest * SLOT + 40] ^= 1
    (tmp_path / "journal").write_bytes(torn)
    assert Journal(tmp_path / "journal").segments == [("a", 0, 10)]
    (tmp_path / "journal").write_bytes(b" " * len(whole))
    assert Journal(tmp_path / "journal").segments == []
    (tmp_path / "journal").write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match="nobody can tell how many steps were released"):
        Journal(tmp_path / "journal")


def test_what_is_lost_is_what_no_later_segment_kept(tmp_path):
    from dpoptax.training._resume.write_ahead_log import Journal

    journal = Journal(tmp_path / "journal")
    for program, first, last in (("a", 0, 100), ("b", 60, 150), ("c", 40, 90)):
        journal.begin(program, first)
        journal.allow(last)
    assert sorted(journal.lost(90)) == [(40, 100), (60, 150)]
    assert sorted(journal.lost(70)) == [(40, 100), (60, 150), (70, 90)]
    assert journal.continues("c", 50)
    assert not journal.continues("c", 39)
    assert not journal.continues("b", 50)


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
            if count == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return commit(*arguments, **options)
        os.rename = os.replace = rename
        rename_path = __import__("pathlib").Path.rename
        __import__("pathlib").Path.rename = lambda self, target: rename(self, target)
    else:
        allow = test_resume.dpoptax.training._resume.write_ahead_log.Journal.allow
        def killed(self, steps):
            global count
            allow(self, steps)
            count += 1
            if count == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        test_resume.dpoptax.training._resume.write_ahead_log.Journal.allow = killed
    test_resume.run(test_resume.pathlib.Path(sys.argv[1]))
    print("not killed")
"""


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["in a step", "while saving"])
def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, when):
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
    assert result.num_steps == 40
    assert result.epsilon() == plan().epsilon()
    with jax.numpy_dtype_promotion("strict"):
        assert same(result, run(None))
