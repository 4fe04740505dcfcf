"""The highest accuracy that we reach with dpoptax at a given epsilon, task by task.

To add a row, write a module in `recipes` with a `Recipe` in the name RECIPE, at most 40 lines of
code. To add a task, write one in `tasks` with a `Task` in the name TASK. Choose the settings with
`python -m leaderboard --only NAME --validate`, which never reads the test examples, and say in
`Recipe.tuned` how they were chosen. Then `python -m leaderboard --only NAME --out docs` runs the
recipe and writes the page.
"""
