"""The leaderboard: recipes are short and stay within their epsilon, runs resume, pages match."""

import ast
import functools
import json
import math
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpoptax
from leaderboard import data, filters, page, private_mean, records, registry, run, scattering
from leaderboard.recipe import Recipe, StoppedEarlyError, Trained, finished, plan_for
from leaderboard.task import Metric, Published, Task, accuracy

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "leaderboard" / "recipes").glob("*.py"))
MOST_CODE_LINES = 40


def code_lines(source):
    """The lines with code: neither blank, nor comments, nor docstrings."""
    tree = ast.parse(source)
    texts = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
    ]
    left_out = {line for text in texts for line in range(text.lineno, text.end_lineno + 1)}
    return [
        line
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in left_out and line.strip() and not line.strip().startswith("#")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_recipe_is_short(path):
    assert len(code_lines(path.read_text())) <= MOST_CODE_LINES


def test_lines_of_code_are_counted_without_text():
    assert code_lines('"""A.\n\nB."""\n\n# c\nx = 1\n\n\ndef f():\n    """D."""\n') == [
        "x = 1",
        "def f():",
    ]


def test_recipes_and_tasks_are_registered_under_their_names():
    recipes, tasks = registry.all_recipes(), registry.all_tasks()
    assert recipes
    assert {name: recipe.name for name, recipe in recipes.items()} == {
        name: name for name in recipes
    }
    assert {name: task.name for name, task in tasks.items()} == {name: name for name in tasks}
    assert {recipe.task for recipe in recipes.values()} <= set(tasks)
    for task in tasks.values():
        metrics = {metric.name for metric in task.metrics}
        assert {result.metric for result in task.published} <= metrics
        assert all(result.source for result in task.published)


def toy_result(stopped="plan"):
    """What `fit` returns, as far as the leaderboard reads it."""
    return SimpleNamespace(stopped=stopped, num_steps=3, plan=SimpleNamespace(num_steps=9))


def toy_run(spent, seed=0, epsilon=2.0, stopped="plan"):
    """A run of a recipe that knows the labels, and says that it spent `spent`."""
    result = toy_result(stopped)
    recipe = Recipe(
        name="digits_linear",
        task="toy",
        title="toy",
        tuned="not at all",
        train=lambda *_: Trained(lambda inputs: inputs, {"w": np.zeros((2, 3))}, spent, result),
    )
    toy = data.example_data.Data(*2 * (np.eye(12, dtype=np.float32), np.arange(12)))
    task = Task(name="toy", title="Toy", about="", load=lambda: toy, score=accuracy, delta=1e-5)
    return run.Run(recipe, task, epsilon, seed)


def test_a_finished_run_is_not_repeated(tmp_path):
    runs = [toy_run(1.9), toy_run(1.9, seed=1)]
    run.run_all(runs[:1], tmp_path, validate=False, again=False)
    path = records.path_of(tmp_path, "digits_linear")
    with path.open("a") as file:
        file.write('{"run": "2", "se')  # a run that was killed while it wrote
    run.run_all(runs, tmp_path, validate=False, again=False)
    assert len(path.read_text().splitlines()) == 3
    found = records.load(tmp_path, "digits_linear")
    assert [record["seed"] for record in found] == [0, 1]
    assert found[0]["scores"] == {"accuracy": 100.0}
    assert found[0]["num_parameters"] == 6
    run.run_all(runs[:1], tmp_path, validate=False, again=True)
    assert len(path.read_text().splitlines()) == 4
    assert len(records.load(tmp_path, "digits_linear")) == 2


def test_a_recipe_that_spends_more_than_its_epsilon_is_refused():
    with pytest.raises(ValueError, match=r"spent epsilon 2.1"):
        run.train(toy_run(2.1), validate=False)


@pytest.mark.parametrize("reason", ["SIGTERM", "SIGINT", "time limit", "callback"])
def test_a_run_that_stopped_early_leaves_no_record(tmp_path, reason):
    runs = [toy_run(1.0), toy_run(1.0, seed=1, stopped=reason), toy_run(1.0, seed=2)]
    with pytest.raises(StoppedEarlyError, match=f'after 3 of 9 steps, because of "{reason}"'):
        run.run_all(runs, tmp_path, validate=False, again=False)
    # No later run starts after a signal, and none before it is lost.
    assert [record["seed"] for record in records.load(tmp_path, "digits_linear")] == [0]


def test_a_real_run_that_stopped_early_is_refused():
    def stop(progress):
        return True

    result = dpoptax.training.fit(
        lambda w, row: w @ row,
        jnp.zeros(2),
        jnp.ones((8, 2)),
        plan=dpoptax.Plan(sampler=dpoptax.samplers.Poisson(8, 4), clip=1.0,
                          noise_multiplier=1.0, num_steps=4, delta=1e-5),
        optimizer=optax.sgd(0.1),
        key=jax.random.key(0),
        progress=dpoptax.training.Every(stop, steps=2),
    )  # fmt: skip
    with pytest.raises(StoppedEarlyError, match="after 2 of 4 steps"):
        finished(result)


def test_a_run_without_data_is_left_out(tmp_path, capsys):
    def missing():
        raise SystemExit("error: get the data")

    chosen = toy_run(1.0)
    task = Task(name="toy", title="", about="", load=missing, score=accuracy, delta=1e-5)
    run.run_all([chosen._replace(task=task)], tmp_path, validate=False, again=False)
    assert "left out: error: get the data" in capsys.readouterr().out
    assert not records.load(tmp_path, "digits_linear")


def test_settings_are_chosen_without_the_test_examples():
    whole = data.example_data.Data(np.arange(60), np.arange(60), np.full(9, 99), np.full(9, 99))
    split = data.held_out(whole)
    assert len(split.train_inputs) == 50
    assert np.concatenate([split.train_inputs, split.test_inputs]).tolist() == list(range(60))
    assert split.test_labels.tolist() == list(range(50, 60))


def test_a_plan_without_noise_is_otherwise_the_private_one():
    make = functools.partial(
        plan_for, num_examples=100, expected_batch_size=10, num_steps=3, delta=1e-4, clip=1.0
    )
    private, plain = make(epsilon=2.0), make(epsilon=math.inf)
    assert private.epsilon() <= 2.0
    assert plain.noise_multiplier == 0
    assert plain.replace(noise_multiplier=private.noise_multiplier) == private


@pytest.mark.slow
def test_the_smallest_recipe_learns_within_its_epsilon():
    [chosen] = run.planned([registry.all_recipes()["digits_linear"]], (8.0,), seeds=1)
    record = run.train(chosen, validate=False)
    assert record["epsilon"] <= 8.0
    assert record["scores"]["accuracy"] > 90


def test_the_page_shows_the_records_there_are(tmp_path, monkeypatch):
    recipe = toy_run(1.0).recipe
    task = Task(
        name="toy",
        title="Toy",
        about="Twelve rows.",
        load=lambda: None,
        score=accuracy,
        metrics=(Metric("accuracy"), Metric("loss", "nats", higher_is_better=False, digits=1)),
        delta=1e-5,
        published=(Published("theirs", 3.0, 98.7, "arXiv:1, Table 2", note="another split"),),
    )
    monkeypatch.setattr(registry, "all_tasks", lambda: {"toy": task})
    monkeypatch.setattr(registry, "all_recipes", lambda: {"digits_linear": recipe})
    shared = {"num_parameters": 1234, "seconds": 7.0}
    for name, seed, value in (("10", 0, 95.0), ("2", 0, 90.0), ("2", 1, 92.0), ("inf", 0, 99.0)):
        epsilon = None if name == "inf" else float(name) - 0.0004
        scores = {"accuracy": value, "loss": 100 - value}
        record = shared | {"run": name, "seed": seed, "epsilon": epsilon, "scores": scores}
        records.append(tmp_path / "leaderboard", "digits_linear", record)
    text = page.write(tmp_path).read_text()
    assert "| accuracy (%) | ε = 2 | ε = 10 | not private |" in text
    assert "| toy | 91.00 ± 1.41 | 95.00 | 99.00 |" in text
    assert "| loss (nats), lower is better | ε = 2 | ε = 10 | not private |" in text
    assert "| toy | 9.0 ± 1.4 | 5.0 | 1.0 |" in text
    assert "| 1,234 | 7 | 10.000 | not at all |" in text
    assert "| theirs | 3 | 98.7 |  | arXiv:1, Table 2; another split |" in text
    assert (tmp_path / "leaderboard" / "toy.png").stat().st_size > 5000


@pytest.mark.seconds
def test_the_page_in_the_docs_is_that_of_its_records(tmp_path):
    stored = ROOT / "docs" / "leaderboard"
    for path in stored.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            records.append(tmp_path / "leaderboard", path.stem, json.loads(line))
    expected = page.write(tmp_path).read_text()
    assert (ROOT / "docs" / "leaderboard.md").read_text() == expected


@pytest.mark.seconds
def test_scattering_features_are_those_of_kymatio():
    rows, columns = np.mgrid[:16, :16]
    image = np.cos(0.1 * rows * columns) + rows / 16
    found = np.asarray(scattering.scattering(image[None].astype(np.float32)))[0]
    assert found.shape == (4, 4, scattering.CHANNELS)
    shown = found[[0, 1, 3], [0, 2, 1]][:, CHANNELS]
    np.testing.assert_allclose(shown, KYMATIO, rtol=1e-3, atol=1e-5)


def test_normalized_features_use_one_image_only(monkeypatch, tmp_path):
    monkeypatch.setattr(scattering, "CACHE", tmp_path)
    images = np.random.default_rng(0).uniform(size=(3, 8, 8)).astype(np.float32)
    found = scattering.features(images).astype(np.float32)
    alone = scattering.features(images[1:2]).astype(np.float32)
    np.testing.assert_allclose(found[1:2], alone, atol=2e-3)
    grouped = found.reshape(3, 2, 2, 27, 3)
    np.testing.assert_allclose(grouped.mean(axis=(1, 2, 4)), 0, atol=2e-3)
    assert (scattering.features(images) == found).all()  # now from the file
    assert len(list(tmp_path.iterdir())) == 2


CHANNELS = [0, 1, 5, 9, 12, 17, 26, 40, 80]
# Kymatio 0.3.0: Scattering2D(J=2, shape=(16, 16), L=8), windows (0, 0), (1, 2) and (3, 1).
KYMATIO = [
    [1.0446, 0.017228, 0.016032, 0.053282, 0.069457, 0.0088124, 0.0062426, 0.0091982, 0.00621],
    [-0.11671, 0.090131, 0.066144, 0.12597, 0.19672, 0.0042003, 0.013152, 0.011466, 0.0040436],
    [0.71921, 0.26231, 0.020093, 0.33308, 0.034545, 0.00839, 0.0087434, 0.0075935, 0.0077031],
]


def test_the_first_filters_have_no_mean_and_differ_in_angle():
    found = np.asarray(filters.gabor_filters(None, (7, 7, 1, 16)))[:, :, 0]
    assert np.abs(found.sum((0, 1))).max() < 1e-5
    assert np.allclose(np.abs(found).sum((0, 1)), 2, rtol=1e-5)
    # A quarter turn of an even wave is the even wave four of eight angles later, up to its sign.
    assert np.allclose(np.rot90(found[:, :, 0]), found[:, :, 8], atol=1e-5)


@pytest.mark.seconds
def test_a_private_mean_without_noise_is_the_mean():
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    longest = float(np.linalg.norm(rows, axis=1).max())
    mean, event = private_mean.private_mean(rows, longest, 0.0, 1e-5, jax.random.key(0))
    assert np.allclose(mean, rows.mean(0), atol=1e-6)
    noisy, event = private_mean.private_mean(rows, longest, 50.0, 1e-5, jax.random.key(0))
    assert np.abs(noisy - mean).max() > 0.1
    plan = plan_for(
        num_examples=60, expected_batch_size=60, num_steps=5, epsilon=1.0, delta=1e-5, clip=1.0
    )
    assert plan.epsilon() < private_mean.spent_with(event, plan) < plan.epsilon() + 0.2


def test_rare_codes_are_scaled_up_at_the_same_length_of_a_row():
    codes = np.random.default_rng(0).random((4000, 3)) < (0.5, 0.5, 0.03)
    rows = codes - codes.mean(0)
    scale = np.asarray(private_mean.scale_of_codes(jnp.asarray(codes.mean(0))))
    assert scale[0] == pytest.approx(scale[1], rel=0.01)
    assert scale[2] > 1.5 * scale[0]
    length = np.mean(np.square(rows * scale).sum(1)) / np.mean(np.square(rows).sum(1))
    assert length == pytest.approx(1, rel=0.01)
    # A frequency is noisy, and may lie outside of its range.
    assert np.isfinite(private_mean.scale_of_codes(jnp.array([-0.02, 0.3, 1.01]))).all()


def test_posts_that_settings_are_chosen_on_are_of_all_groups(monkeypatch):
    """The file has one group after another."""
    labels = np.repeat(np.arange(20), 30)
    texts = data.example_data.Texts(
        [str(label) for label in labels], labels, ["a"], labels[:1], ("x",) * 20
    )
    monkeypatch.setattr(data.example_data, "newsgroups", lambda: texts)
    posts = data.newsgroups.__wrapped__()
    assert (posts.train_inputs.astype(int) == posts.train_labels).all()
    assert len(set(data.held_out(posts).test_labels)) == 20
