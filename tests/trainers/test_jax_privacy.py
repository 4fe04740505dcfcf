"""JAX Privacy with our `clipped_grad`: the same results, trainers and auditor."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.trainer

ROOT = pathlib.Path(__file__).parents[2]
REQUIREMENTS = ("jax-privacy==2.0.0", "keras>=3.12")
SUBSTITUTION = "jax_privacy.clipped_grad = clipping.clipped_grad = clipped_grad\n"


def program(name):
    return (ROOT / "tests" / "trainers" / "programs" / f"{name}.py").read_text()


def test_every_option_gives_the_result_of_jax_privacy(run_program):
    printed = run_program(REQUIREMENTS, program("jax_privacy_options"))
    print(printed)
    assert int(re.search(r"(\d+) calls agree", printed).group(1)) >= 50


def test_the_plan_and_the_auditor_of_the_page_run_unchanged(run_program):
    page = (ROOT / "docs" / "trainers" / "jax_privacy.md").read_text()
    source = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert source.count(SUBSTITUTION) == 1
    source += "print('ours:', grad_fn.fun.__class__.__module__.startswith('dpoptax'))"
    source += "\nprint([round(float(number), 4) for number in params['w'][:50]])"
    found = run_program(REQUIREMENTS, source)
    expected = run_program(REQUIREMENTS, source.replace(SUBSTITUTION, ""))
    assert "ours: True" in found
    assert found.replace("ours: True", "ours: False") == expected
    assert 0.5 < float(re.search(r"at least ([\d.]+)", found).group(1)) < 8


def test_the_auditor_accepts_the_scores_of_an_audit_and_finds_the_same_bounds(run_program):
    printed = run_program(REQUIREMENTS, program("jax_privacy_auditor"))
    assert int(re.search(r"(\d+) numbers agree", printed).group(1)) >= 21


def test_keras_trains_the_same_model(run_program):
    source = "import os; os.environ['KERAS_BACKEND'] = 'jax'\n" + program("jax_privacy_keras")
    assert "same model" in run_program(REQUIREMENTS, source)
