"""Finds the tasks and recipes, one per module."""

import importlib
import pathlib
from collections.abc import Iterator

from leaderboard import recipes, records, tasks
from leaderboard.recipe import Recipe
from leaderboard.task import Task


def all_recipes() -> dict[str, Recipe]:
    """Returns the recipes by name. Modules with a leading underscore are not ready yet."""
    return {
        name: importlib.import_module(f"leaderboard.recipes.{name}").RECIPE
        for name in _names(recipes)
    }


def all_tasks() -> dict[str, Task]:
    """Returns the tasks by name."""
    return {
        name: importlib.import_module(f"leaderboard.tasks.{name}").TASK for name in _names(tasks)
    }


def digest(recipe: str) -> str:
    """Returns the digest of a recipe's module."""
    return records.digest((_folder(recipes) / f"{recipe}.py").read_text())


def _names(package: object) -> Iterator[str]:
    for path in sorted(_folder(package).glob("*.py")):
        if not path.stem.startswith("_"):
            yield path.stem


def _folder(package: object) -> pathlib.Path:
    return pathlib.Path(str(package.__file__)).parent  # type: ignore[attr-defined]
