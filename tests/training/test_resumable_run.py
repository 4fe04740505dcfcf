"""Crashes at every moment of a run, with a fake stepper: nothing is compiled, so many are tried.

The stepper records what it releases: the key, the step and the program, which decides the gradient.
Two laws must hold for every history of crashes, changes and damage:

- No key and step serve two programs: two gradients never share their noise.
- The ledger charges at least as many steps as were released.
"""

import contextlib
import random

import jax
import numpy as np
import pytest

import dpoptax
from dpoptax.training import TrainState, time_limit
from dpoptax.training._charges import ledger_of_run
from dpoptax.training._loop import run_steps
from dpoptax.training._resume import run as resume
from dpoptax.training._resume.base import Restored
from dpoptax.training._resume.run import NoResume, ResumableRun
from dpoptax.training._resume.write_ahead_log import SLOT_SIZE, WriteAheadLog

STEPS = 12
PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(300, 30), clip=1.0, noise_multiplier=1.0, num_steps=STEPS,
    delta=1e-4,
)  # fmt: skip
SHUFFLED = dpoptax.Plan(
    sampler=dpoptax.samplers.Shuffled(300, 30), clip=1.0, noise_multiplier=1.0, num_steps=STEPS,
    delta=1e-4,
)  # fmt: skip
KEY = jax.random.key(0)
START = TrainState(step=np.int32(0), params=0, opt_state=KEY, sampler_state=0, model_key=0)


class CrashError(Exception):
    """The process ends."""


class Disk:
    """What survives a crash: the log and the checkpoints."""

    def __init__(self, path):
        self.path = path / "log"
        self.checkpoints = {}
        self.releases = set()

    def damage_newest_checkpoint(self):
        if len(self.checkpoints) > 1:
            del self.checkpoints[max(self.checkpoints)]

    def tear_next_write(self):
        """The slot that would be overwritten next is lost."""
        slots = bytearray(self.path.read_bytes())
        start = SLOT_SIZE * ((WriteAheadLog(self.path)._sequence + 1) % 2)
        slots[start : start + SLOT_SIZE] = b"x" * SLOT_SIZE
        self.path.write_bytes(slots)


class FakeFolder:
    """A folder with a real log and checkpoints in memory."""

    def __init__(self, disk, crash=None):
        self.log = WriteAheadLog(disk.path)
        self.disk, self.crash = disk, crash

    def restore(self, like):
        del like
        checkpoints = self.disk.checkpoints
        return checkpoints[max(checkpoints)] if checkpoints else None

    def save(self, step, state, *, segment, prng):
        if self.crash == ("before saving", step):
            raise CrashError
        if self.crash == ("disk full", step):
            return False
        self.disk.checkpoints[step] = Restored(state, step, segment, prng)
        if self.crash == ("after saving", step):
            raise CrashError
        return True

    def close(self):
        pass


class FakeStepper:
    """Releases steps of one program, a fixed number per dispatch."""

    def __init__(self, disk, program, steps_per_dispatch, crash=None):
        self.disk, self.program, self.crash = disk, program, crash
        self.steps_per_dispatch = steps_per_dispatch

    def fingerprint(self, state):
        del state
        return self.program

    def advance(self, state, num_steps):
        key = tuple(np.asarray(jax.random.key_data(state.opt_state)))
        for step in range(int(state.step), int(state.step) + num_steps):
            if self.crash == ("before step", step):
                raise CrashError
            self.disk.releases.add((key, step, self.program))
            if self.crash == ("after step", step):
                raise CrashError
        return state._replace(step=np.int32(state.step + num_steps)), None

    def nonprivate_nonfinite(self):
        return None

    def close(self):
        pass


def train(disk, program="a", plan=PLAN, *, crash=None, dispatch=2, every=0.0, progress=False):
    """One process; returns how many steps are done and the ledger of the run."""
    folder = FakeFolder(disk, crash)
    run = ResumableRun(folder, every_seconds=every, prng="test")
    state = run.restore(START, plan)
    if int(state.step) < plan.num_steps:
        stepper = FakeStepper(disk, program, dispatch, crash)
        state = run.begin(state, stepper.fingerprint, plan)
        state, _ = run_steps(state, stepper, run, plan, progress)
    done = int(state.step)
    return done, ledger_of_run(plan, done, run.lost_steps(done))


def shared_noise(disk):
    """The keys and steps that served two programs."""
    programs = {}
    for key, step, program in disk.releases:
        programs.setdefault((key, step), set()).add(program)
    return [used for used, by in programs.items() if len(by) > 1]


CRASHES = [
    ("before step", 5), ("after step", 5), ("after step", 4), ("before saving", 6),
    ("after saving", 6), ("disk full", 6), ("after step", STEPS - 1), ("before saving", STEPS),
]  # fmt: skip


@pytest.mark.parametrize("crash", CRASHES)
def test_a_replayed_run_counts_every_step_once(tmp_path, crash):
    disk = Disk(tmp_path)
    if crash[0] == "disk full":
        train(disk, crash=crash)
    else:
        with pytest.raises(CrashError):
            train(disk, crash=crash)
    done, ledger = train(disk)
    assert done == ledger.num_steps == STEPS == len(disk.releases)


@pytest.mark.parametrize("crash", [case for case in CRASHES if case[0] != "disk full"])
def test_a_changed_program_gets_other_noise_and_lost_steps_stay_charged(tmp_path, crash):
    disk = Disk(tmp_path)
    with pytest.raises(CrashError):
        train(disk, "a", crash=crash)
    saved = max(disk.checkpoints)
    authorized = WriteAheadLog(disk.path).segments[-1].end
    with pytest.warns(RuntimeWarning, match=f"step {saved}.*other noise, and {authorized - saved}"):
        done, ledger = train(disk, "b")
    assert done == STEPS
    assert ledger.num_steps == STEPS + authorized - saved >= len(disk.releases)
    assert not shared_noise(disk)
    # Opened again, finished or not, the run forgets nothing.
    assert train(disk, "b")[1].num_steps == ledger.num_steps


def test_epsilon_shown_while_steps_are_replayed_counts_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr("dpoptax.training._progress.EPSILON_TIME_FRACTION", 1e9)
    disk = Disk(tmp_path)
    with pytest.raises(CrashError):
        train(disk, crash=("after step", 8), every=1e9)
    assert max(disk.checkpoints) == 0
    shown = []
    train(disk, progress=shown.append)
    replayed = [progress.epsilon for progress in shown if progress.step < 8]
    assert replayed
    assert min(replayed) >= PLAN.epsilon(8)
    assert shown[-1].epsilon == PLAN.epsilon()


def random_history(disk, seed):
    """Processes that crash, change and lose files, and at last one that ends; its ledger."""
    rng = random.Random(seed)
    program = "a"
    kinds = ("before step", "after step", "before saving", "after saving", "disk full")
    for _ in range(6):
        crash = (rng.choice(kinds), rng.randrange(STEPS + 1))
        if rng.random() < 0.4:
            program = rng.choice("abc")
        dispatch, every = rng.randint(1, 4), rng.choice([0.0, 1e9])
        with contextlib.suppress(CrashError, OSError):  # the first checkpoint may fail
            train(disk, program, crash=crash, dispatch=dispatch, every=every)
        if disk.path.exists() and rng.random() < 0.3:
            disk.tear_next_write()
        if rng.random() < 0.3:
            disk.damage_newest_checkpoint()
    return train(disk, program)[1]


def laws_hold(tmp_path, seed):
    folder = tmp_path / str(seed)
    folder.mkdir()
    disk = Disk(folder)
    ledger = random_history(disk, seed)
    used = {(key, step) for key, step, _ in disk.releases}
    return not shared_noise(disk) and ledger.num_steps >= len(used)


@pytest.mark.filterwarnings("ignore:the loss, the optimizer")
def test_no_history_shares_noise_or_counts_too_little(tmp_path):
    assert all(laws_hold(tmp_path, seed) for seed in range(60))


@pytest.mark.filterwarnings("ignore:the loss, the optimizer")
@pytest.mark.parametrize("bug", ["keys stay", "authorized too late", "lost steps are forgotten"])
def test_random_histories_find_a_planted_bug(tmp_path, monkeypatch, bug):
    if bug == "keys stay":
        monkeypatch.setattr(resume, "_rekeyed", lambda state, domain: state)
    elif bug == "authorized too late":
        # Each call writes what the one before it should have written.
        authorize = WriteAheadLog.authorize
        late = {}

        def authorize_late(self, end):
            authorize(self, late.get(id(self), self.segments[-1].end))
            late[id(self)] = end

        monkeypatch.setattr(WriteAheadLog, "authorize", authorize_late)
    else:
        monkeypatch.setattr(WriteAheadLog, "lost_steps", lambda self, done: iter(()))

    def found(seed):
        try:
            return not laws_hold(tmp_path, seed)
        except ValueError:  # a checkpoint that is ahead of the log is refused
            return True

    assert any(found(seed) for seed in range(60))


def test_dependent_steps_refuse_a_changed_program(tmp_path):
    disk = Disk(tmp_path)
    with pytest.raises(CrashError):
        train(disk, plan=SHUFFLED, crash=("after step", 5))
    with pytest.raises(ValueError, match="Shuffled ties the steps of a run together"):
        train(disk, "b", plan=SHUFFLED)
    done, ledger = train(disk, plan=SHUFFLED)
    assert done == ledger.num_steps == STEPS == len(disk.releases)


def test_a_plan_with_fewer_steps_than_were_made_is_refused(tmp_path):
    disk = Disk(tmp_path)
    train(disk)
    fewer = dpoptax.Plan(
        sampler=PLAN.sampler, clip=1.0, noise_multiplier=1.0, num_steps=2, delta=1e-4
    )
    with pytest.raises(ValueError, match="has made 12 steps and the plan has 2"):
        train(disk, plan=fewer)


def test_lost_checkpoints_and_a_lost_or_older_log_are_refused(tmp_path):
    disk = Disk(tmp_path)
    with pytest.raises(CrashError):
        train(disk, crash=("after step", 3))
    old = disk.path.read_bytes()
    with pytest.raises(CrashError):
        train(disk, crash=("after step", 9))
    disk.path.write_bytes(old)
    for _ in range(2):  # an older log, then none
        with pytest.raises(ValueError, match=r"log is gone, or older.* count this run in full"):
            train(disk)
        disk.path.unlink(missing_ok=True)
    disk.path.write_bytes(old)
    disk.checkpoints.clear()
    with pytest.raises(ValueError, match="says that steps ran, and there is no checkpoint"):
        train(disk)


def test_a_first_checkpoint_that_fails_is_an_error_before_the_first_step(tmp_path):
    disk = Disk(tmp_path)
    with pytest.raises(OSError, match="could not be written; nothing was run"):
        train(disk, crash=("disk full", 0))
    assert not disk.releases


def test_a_run_whose_log_cannot_be_written_makes_no_step(tmp_path, monkeypatch):
    disk = Disk(tmp_path)

    def full(self, end):
        raise OSError("No space left on device")

    monkeypatch.setattr(WriteAheadLog, "authorize", full)
    with pytest.raises(OSError, match="No space left"):
        train(disk)
    assert not disk.releases


def test_checkpoints_are_written_when_due_and_at_the_end(tmp_path):
    for every, steps in ((0.0, list(range(0, STEPS + 1, 2))), (1e9, [0, STEPS])):
        folder = tmp_path / str(every)
        folder.mkdir()
        disk = Disk(folder)
        train(disk, every=every)
        assert list(disk.checkpoints) == steps


def test_a_run_that_is_not_saved_makes_the_same_steps(tmp_path):
    disk = Disk(tmp_path)
    stepper = FakeStepper(disk, "a", 5)
    run = NoResume("test")
    state = run.begin(run.restore(START, PLAN), lambda state: pytest.fail("not needed"), PLAN)
    state, stopped = run_steps(state, stepper, run, PLAN, False)
    assert (int(state.step), stopped, len(disk.releases)) == (STEPS, "plan", STEPS)
    assert list(run.lost_steps()) == []


def test_nested_time_limits_stop_at_the_earliest(tmp_path):
    disk = Disk(tmp_path)
    run, stepper = NoResume("test"), FakeStepper(disk, "a", 1)
    with time_limit(0.0), time_limit(1e6):
        state, stopped = run_steps(START, stepper, run, PLAN, False)
    assert (int(state.step), stopped) == (0, "time limit")
    with time_limit(1e6):
        assert run_steps(START, stepper, run, PLAN, False)[1] == "plan"
    with pytest.raises(ValueError, match="seconds"), time_limit(-1.0):
        pass
