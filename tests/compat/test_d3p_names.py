"""Every public name of d3p (0.2.0 and development) exists, or the page says why it does not."""

import importlib
import pathlib
import re

import pytest

from dpoptax.compat import d3p

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "from_d3p.md"
# By module: `__all__` where d3p has one, else what does not begin with an underscore.
NAMES = {
    "svi": "DPSVI DPSVIState get_observations_scale full_norm normalize_gradient clip_gradient",
    "minibatch": "subsample_batchify_data split_batchify_data poisson_batchify_data "
    "poisson_sample_idxs q_to_batch_size batch_size_to_q",
    "dputil": "approximate_sigma approximate_sigma_remove_relation get_bracketing_bounds "
    "update_bounds",
    "modelling": "get_samples_from_trace sample_prior_predictive sample_posterior_predictive "
    "sample_multi_prior_predictive sample_multi_posterior_predictive map_args_obs_to_shape "
    "make_observed_model",
    "gmm": "GaussianMixture",
    "optimizers": "adadp ADADP",
    "random": "PRNGState PRNGKey split fold_in random_bits uniform normal randint "
    "convert_to_jax_rng_key debug",
    "random.debug": "PRNGState PRNGKey split fold_in random_bits uniform normal randint "
    "convert_to_jax_rng_key",
    "util": "map_over_secondary_dims example_count has_shape is_array is_scalar is_integer "
    "is_int_scalar normalize unvectorize_shape unvectorize_shape_1d unvectorize_shape_2d "
    "unvectorize_shape_3d sample_from_array",
}
METHODS = (
    "init update evaluate get_params run get_epsilon get_delta perturbation_function"  # of DPSVI
)
MISSING = {
    "minibatch.poisson_sample_idxs",
    "dputil.get_bracketing_bounds",
    "dputil.update_bounds",
    "svi.DPSVI.perturbation_function",
}
ALL = [f"{module}.{name}" for module, names in NAMES.items() for name in names.split()]
ALL += [f"svi.DPSVI.{name}" for name in METHODS.split()]


def exists(path):
    if path.split(".")[0] in ("svi", "modelling", "gmm"):
        pytest.importorskip("numpyro")
    value = d3p
    for part in path.split("."):
        value = getattr(value, part, None)
    return value is not None


@pytest.mark.parametrize("path", ALL)
def test_a_name_of_d3p_exists_and_the_page_has_a_line_on_it(path):
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{path}` |")]
    assert len(lines) == 1, path
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert cells[1] == ("yes" if exists(path) else "no")
    assert cells[1] == "yes" or (len(cells[2]) > 20 and path in MISSING)


def test_the_page_has_no_other_names():
    rows = re.findall(r"^\| `([a-zA-Z_0-9.]+)` \| (?:yes|no) \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(ALL)


def test_modules_are_imported_as_in_d3p():
    pytest.importorskip("numpyro")
    module = importlib.import_module("dpoptax.compat.d3p.svi")
    assert d3p.svi is module
    assert d3p.random.PRNGKey is importlib.import_module("dpoptax.compat.d3p.random").PRNGKey
    with pytest.raises(AttributeError, match="has no attribute 'twinify'"):
        d3p.twinify  # noqa: B018
