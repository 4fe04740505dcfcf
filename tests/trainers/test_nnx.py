"""The programs of the pages on NNX and on Optax, in an environment of their own."""

import pytest
from pages import program_of

pytestmark = pytest.mark.trainer

CHECK_OPTAX = """
true = jnp.array([1.0, -2.0, 0.5, 0.0])
for result in (run.params, own.params, trained):
    assert float(jnp.abs(result["w"] - true).max()) < 0.3, result
for each in (run, own):
    assert each.steps_left == 0
    assert each.epsilon() == plan.epsilon() <= 4.0
"""

CHECK_NNX = """
start = Classifier(nnx.Rngs(0))
for each in (model, adapted):
    each.eval()
    assert float(jnp.mean(jnp.argmax(each(x), -1) == y)) > 0.85
assert int(optimizer.step[...]) == plan.num_steps
assert jnp.array_equal(adapted.hidden.kernel[...], start.hidden.kernel[...])
assert not jnp.array_equal(adapted.lora.lora_b[...], start.lora.lora_b[...])
assert run.epsilon() == plan.epsilon() <= 4.0
"""


@pytest.mark.parametrize(("page", "check"), [("optax", CHECK_OPTAX), ("nnx", CHECK_NNX)])
def test_the_programs_of_the_page_train_privately(run_program, page, check):
    run_program([], program_of(page) + check)
