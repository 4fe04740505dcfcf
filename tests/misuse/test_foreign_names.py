"""Names of other libraries are answered with ours, and a type checker accepts a user's program."""

import inspect
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

import dpoptax
from dpoptax import Plan, accounting
from dpoptax._foreign_names import _NAMES
from dpoptax.training import PrivateRun, fit, make_train_step

PROGRAM = pathlib.Path(__file__).with_name("typed_program.py")
ROOT = pathlib.Path(__file__).parents[2]
FUNCTIONS = (
    *(dpoptax.privatize, dpoptax.dp_sgd, dpoptax.dp_adam, Plan, Plan.calibrate, fit),
    *(accounting.epsilon, accounting.calibrate_noise_multiplier),
    *(accounting.calibrate_num_steps, accounting.calibrate_batch_size, accounting.poisson_event),
    *(PrivateRun, make_train_step, dpoptax.samplers.Poisson, dpoptax.samplers.FixedSize),
    dpoptax.samplers.BallsInBins,
)

CALLS = [
    # Opacus: make_private, make_private_with_epsilon
    (dpoptax.privatize, "max_grad_norm", r"a name in Opacus\. Pass clip=bound"),
    (dpoptax.privatize, "poisson_sampling", "It takes clip, noise_multiplier, expected_batch"),
    (dpoptax.privatize, "noise_generator", r"Pass key=jax\.random\.key\(seed\)"),
    (Plan, "target_epsilon", r"For a budget, call dpoptax\.Plan\.calibrate\(epsilon="),
    (Plan, "epsilon", r"For a budget, call dpoptax\.Plan\.calibrate\(epsilon="),
    (Plan, "sample_rate", r"Pass sampler=dpoptax\.samplers\.Poisson\(num_examples, expected"),
    (Plan.calibrate, "target_epsilon", r"a name in Opacus\. Pass epsilon="),
    (Plan.calibrate, "sample_rate", r"Pass expected_batch_size=rate \* num_examples"),
    (fit, "max_grad_norm", r"belongs to the plan: pass plan=dpoptax\.Plan"),
    (fit, "data_loader", r"Pass data= arrays, or HostData"),
    (fit, "max_physical_batch_size", r"Pass microbatch_size="),
    (accounting.epsilon, "steps", r"a name in Opacus\. Pass num_steps="),
    # TensorFlow Privacy, and optax.contrib
    (dpoptax.dp_sgd, "l2_norm_clip", r"TensorFlow Privacy and Optax\. Pass clip=bound"),
    (dpoptax.dp_adam, "seed", r"a name in Optax\. Pass key=jax\.random\.key\(seed\)"),
    (fit, "num_epochs", r"belongs to the plan"),
    (fit, "num_microbatches", r"Pass microbatch_size="),
    (accounting.epsilon, "sampling_probability", r"Pass sampler=dpoptax\.samplers\.Poisson"),
    (accounting.calibrate_noise_multiplier, "num_epochs", r"Pass epochs="),
    # JAX Privacy
    (dpoptax.privatize, "l2_clip_norm", r"a name in JAX Privacy\. Pass clip=bound"),
    (accounting.calibrate_num_steps, "num_updates", r"It takes epsilon, risk, delta, sampler"),
    # Ours, elsewhere
    (dpoptax.privatize, "l2_clip", r"Pass clip=bound"),
    (fit, "clip", r"belongs to the plan"),
    (fit, "noise_multiplier", r"belongs to the plan"),
    (fit, "learning_rate", r"a name in dpoptax\.dp_sgd\. Pass optimizer=optax\.sgd\(learning_rate"),
    (fit, "lr", r"Pass optimizer=optax\.sgd\(learning_rate"),
    (PrivateRun, "epochs", r"belongs to the plan: pass plan=dpoptax\.Plan"),
    (PrivateRun, "batch_size", r"belongs to the plan"),
    (make_train_step, "optimizer", r"Pass tx=optax\.chain\(plan\.privatize"),
    (dpoptax.samplers.BallsInBins, "batch_size", "Pass steps_per_round=num_examples // batch"),
    (dpoptax.samplers.BallsInBins, "expected_batch_size", "Pass steps_per_round=num_examples // b"),
    (dpoptax.samplers.Poisson, "dataset_size", r"Pass num_examples="),
    (dpoptax.accounting.poisson_event, "sample_rate", r"a name in Opacus\. Pass sampling_rate="),
    (dpoptax.accounting.poisson_event, "steps", r"a name in Opacus\. Pass num_steps="),
    (dpoptax.samplers.Poisson, "sample_rate", r"Pass expected_batch_size=rate \* num_examples"),
    (dpoptax.samplers.Shuffled, "n", r"Pass num_examples="),
    (dpoptax.dp_sgd, "learningrate", r"Did you mean learning_rate\?"),
]


@pytest.mark.parametrize(("function", "name", "match"), CALLS)
def test_a_name_of_another_library_is_answered_with_ours(function, name, match):
    with pytest.raises(TypeError, match=f"has no argument '{name}'.*{match}") as error:
        function(**{name: 31337})
    assert "31337" not in str(error.value)


def test_what_is_named_instead_is_accepted():
    parameters = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    for name, (library, ours) in _NAMES.items():
        assert library
        assert parameters.issuperset(ours), name
        assert name not in ours


@pytest.mark.parametrize("function", FUNCTIONS)
def test_signatures_and_other_errors_stay_as_they_are(function):
    assert not any(
        parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        for parameter in inspect.signature(function).parameters.values()
    )
    with pytest.raises(TypeError, match=r"missing.*It takes"):
        function()


def test_a_pair_of_loss_and_parameters_is_unpacked_first():
    pair = (lambda params, example: 0.0, {"w": 31337.0})
    with pytest.raises(
        TypeError, match=r"missing a required argument: 'data'.*loss, params ="
    ) as e:
        fit(pair, [1.0], plan=None, optimizer=None)
    assert "31337" not in str(e.value)


def test_the_clip_bound_has_one_name():
    for function in FUNCTIONS[:5]:
        assert "clip" in inspect.signature(function).parameters
    for function in FUNCTIONS:
        assert "l2_clip" not in inspect.signature(function).parameters
    run = {"noise_multiplier": 1.0, "expected_batch_size": 2, "key": jax.random.key(0)}
    assert dpoptax.privatize(clip=dpoptax.clipping.FlatClip(l2_clip=1.0), **run)


def mypy(program):
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent",
         "--ignore-missing-imports", "--config-file=", str(program)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.e2e
def test_mypy_accepts_a_program_of_a_user(tmp_path):
    pytest.importorskip("mypy")
    done = mypy(PROGRAM)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "wrong.py"
    text = PROGRAM.read_text()
    assert text.count("sampler=drawn, clip=1.0") == 1
    wrong.write_text(text.replace("sampler=drawn, clip=1.0", "sampler=3, clip=1.0"))
    assert 'has incompatible type "int"' in mypy(wrong).stdout


@pytest.mark.nightly
def test_pyright_accepts_a_program_of_a_user():
    """Pyright also reads the types of Optax, which mypy ignores: `pip install pyright`."""
    if shutil.which("pyright") is None:
        pytest.skip("needs pyright")
    done = subprocess.run(
        ["pyright", "--pythonpath", sys.executable, str(PROGRAM)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
