"""On many devices the clipped sum of each parameter is reduced once, or once per microbatch."""

import pytest
from eight_devices import run_on_eight_devices

PROGRAM = """
import math, re
import jax, jax.numpy as jnp, numpy as np, dpoptax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from benchmarks.program_costs import costs

mesh = Mesh(np.array(jax.devices()), ("data",))
everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
shapes = {"first": (48, 56), "second": (56, 40), "bias": (56,)}
params = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
          for name, shape in shapes.items()}
rows = jax.ShapeDtypeStruct((64, 9, 48), jnp.float32, sharding=spread)

def loss(params, row):
    hidden = jax.checkpoint(lambda w, b: jnp.tanh(row @ w + b))(params["first"], params["bias"])
    return jnp.sum((hidden @ params["second"]) ** 2)

for options in ({"form": "recomputed"}, {"form": "stacked"},
                {"form": "factored", "microbatch_size": 16}):
    def step(params, rows, options=options):
        grads = dpoptax.per_example_grads(loss, **options)(params, rows)
        tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=64, key=jax.random.key(0))
        return tx.update(grads, tx.init(params), params)[0]

    text = jax.jit(step, out_shardings=everywhere).lower(params, rows).compile().as_text()
    reductions = re.findall(r"^.* = (.*) all-reduce(?:-start)?\\(", text, re.MULTILINE)
    sizes = [math.prod(map(int, dims.split(","))) for kind in reductions
             for dims in re.findall(r"f32\\[([\\d,]+)\\]", kind)]
    for name, shape in shapes.items():
        assert sizes.count(math.prod(shape)) == 1, (options, name, sizes)
    # Without microbatches none of them is in a loop.
    in_loop = costs(text)["all-reduce"] - len(reductions)
    assert (in_loop > 0) == ("microbatch_size" in options), (options, in_loop)
print("reduced once")
"""


@pytest.mark.e2e
def test_the_sum_of_each_parameter_is_reduced_once():
    assert "reduced once" in run_on_eight_devices(PROGRAM)
