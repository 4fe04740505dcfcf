# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # From a CSV file to private synthetic data
#
# Turn a CSV file into tables of people who do not exist, with a guarantee. Compute estimates from
# them whose intervals also contain the error that privacy adds.
#
# - **You learn** how to write a public schema, how to choose epsilon without touching the data, how
#   to read the utility report, and how to combine several synthetic tables.
# - **You need** `pip install '.[synthetic,examples]'`.
# - **It takes** one to two minutes on two CPU cores.

# %%
import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t as student_t
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

import dpoptax
from dpoptax.synthetic import synthesize
from dpoptax.vi.contrib import combine_synthetic_estimates

# %% [markdown]
# ## The table
#
# The table is simulated, so you can compare with the truth later. A row is a patient of a hospital.
# Smokers and old patients stay longer, and whoever stays longer comes back more often. One in ten
# patients has no body mass index (BMI) in the file.


# %%
def simulate(seed, rows, smokers=0.25, effect=1.0):
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(58, 17, rows), 18, 97).astype(int)
    smoker = rng.random(rows) < smokers
    bmi = np.where(rng.random(rows) < 0.1, np.nan, rng.normal(27, 4, rows).clip(15, 50).round(1))
    rate = np.exp(0.8 + effect * (0.015 * (age - 58) + 0.5 * smoker))
    days = np.where(rng.random(rows) < 0.3, 0, 1 + rng.poisson(rate)).clip(0, 30)
    back = rng.random(rows) < 1 / (1 + np.exp(2.2 - effect * (0.25 * days + 0.6 * smoker)))
    return {
        "name": [f"patient {number}" for number in range(rows)],
        "age": age.tolist(),
        "smoker": np.where(smoker, "yes", "no").tolist(),
        "bmi": ["" if np.isnan(value) else float(value) for value in bmi],
        "days": days.tolist(),
        "came_back": np.where(back, "yes", "no").tolist(),
    }


real = simulate(seed=0, rows=8000)
with Path("patients.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(real)
    writer.writerows(zip(*real.values(), strict=True))
print(*Path("patients.csv").read_text().splitlines()[:4], sep="\n")

# %% [markdown]
# ## The schema
#
# The schema says what each column may hold. It is public, so write it from a code book or from
# common knowledge. A range that you read from the data would reveal the most extreme patient.
#
# - `days` has the code 0, for patients who did not stay. A code is not put into a bin with numbers.
# - `bmi` may be missing. Missing values are counted like all others.
# - `name` identifies people, so it is left out.

# %%
schema = {
    "columns": {
        "name": {"type": "omit"},
        "age": {"type": "integer", "range": [18, 97], "bins": 16},
        "smoker": {"type": "categorical", "values": ["yes", "no"]},
        "bmi": {"type": "real", "range": [15, 50], "bins": 14, "missing": True},
        "days": {"type": "integer", "codes": [0], "range": [1, 30], "bins": 15},
        "came_back": {"type": "categorical", "values": ["yes", "no"]},
    }
}
with Path("schema.json").open("w") as file:
    json.dump(schema, file, indent=2)

# %% [markdown]
# ## An estimate with an interval
#
# What do you want from the data? Here: how much more often smokers come back, with an interval.
# Each table gives an estimate and its variance.
#
# One synthetic table is not enough for an interval. Its estimate has two more errors, those of the
# noise and of drawing rows, and one table does not show them. Several tables do: `synthesize` makes
# them so that they differ as much as these errors require. Rubin's rules combine them. Further
# tables cost no privacy, since they are drawn from the same noisy counts.


# %%
def difference(table):
    back, smoker = (np.array(table[name]) == "yes" for name in ("came_back", "smoker"))
    shares = np.array([back[smoker].mean(), back[~smoker].mean()])
    sizes = np.array([smoker.sum(), (~smoker).sum()])
    return shares[0] - shares[1], np.sum(shares * (1 - shares) / sizes)


def combine(tables):
    estimates, variances = zip(*[difference(table) for table in tables], strict=True)
    combined = combine_synthetic_estimates(estimates, variances)
    half = student_t.ppf(0.975, combined.degrees_of_freedom) * np.sqrt(combined.variance)
    return combined.estimate, half


# %% [markdown]
# ## Which epsilon?
#
# Decide this before you touch the data: each release from the real table costs privacy, also one
# that you throw away. So rehearse on a table that you make up. It needs about the right number of
# rows, and effects of about the size that you want to find.

# %% 95 % intervals of the made-up table and of synthetic tables at two epsilons
made_up = simulate(seed=1, rows=8000, smokers=0.2, effect=0.8)
estimate, variance = difference(made_up)
intervals = {"made-up table": (estimate, 1.96 * np.sqrt(variance))}
for epsilon in (1.0, 0.3):
    key = dpoptax.random.insecure_key(0)  # harmless here: the table is made up
    made = synthesize(made_up, schema, epsilon=epsilon, delta=1e-6, num_sets=50, key=key)
    intervals[f"epsilon {epsilon}"] = combine(made.sets)

figure, axis = plt.subplots(figsize=(7, 1.8), layout="constrained")
for row, (name, (estimate, half)) in enumerate(intervals.items()):
    axis.errorbar(estimate, row, xerr=half, fmt="o", color="black" if row == 0 else "tab:blue")
    print(f"{name:14} {estimate:.3f} +- {half:.3f}")
axis.set_yticks(range(len(intervals)), list(intervals))
axis.set_ylim(len(intervals) - 0.5, -0.5)
axis.set_xlabel("how much more often smokers come back, 95 % interval")
plt.show()

# %% [markdown]
# Choose the smallest epsilon whose interval is narrow enough for you. Below it is 1. Each interval
# also has an error of its own, so do not read small differences.
#
# ## The release
#
# The command line reads the CSV file and the schema, and writes a folder:
#
# ```sh
# dpoptax synthesize patients.csv --schema schema.json \
#     --epsilon 1 --delta 1e-6 --sets 20 --out released
# ```
#
# In Python it is `synthesize(real, schema, epsilon=1, delta=1e-6, num_sets=20).write("released")`.
# Run one of them, and once. A second run is a second release, and the two epsilons add up.
#
# Delta should be well below one over the number of rows. `--seed` makes this page repeatable. It
# removes the privacy, so leave it out for real data.

# %%
command = (
    "synthesize patients.csv --schema schema.json --epsilon 1 --delta 1e-6 "
    "--sets 20 --out released --seed 0"  # for real data without --seed
)
subprocess.run([sys.executable, "-m", "dpoptax", *command.split()], check=True, capture_output=True)
for path in sorted(Path("released").iterdir()):
    if path.name in ("synthetic_1.csv", "synthetic_2.csv") or path.suffix != ".csv":
        print(f"{path.name:20} {path.stat().st_size:9,} bytes")

# %% [markdown]
# The other tables are beside the first two. All of these files may be published. The tables have
# four times as many rows as the noisy counts say: with several tables, this makes the intervals
# more accurate.


# %%
def read(path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


released = [read(path) for path in sorted(Path("released").glob("synthetic_*.csv"))]
print("tables", len(released), " rows of each", len(released[0]["age"]))
for row in list(zip(*released[0].values(), strict=True))[:3]:
    print(dict(zip(released[0], row, strict=True)))

# %% [markdown]
# ## Is it good enough?
#
# The utility report compares the first synthetic table with the noisy counts, not with the real
# table. So it costs no privacy. The last number of each line is the distance that the noise alone
# would make. With several tables, expect about twice as much: each table also differs by a new
# sample of patients and by new noise. A distance far above that says that the model did not follow
# the counts there. Pairs that were not counted are listed too: a dependence between two such
# columns may be missing from the tables.

# %%
print(Path("released/utility_report.txt").read_text())

# %% [markdown]
# The first picture has the columns one by one. The bars are synthetic, the dots are the noisy
# counts with their uncertainty. A dot below zero is noise. The last bar of `days` is the code 0.

# %% Shares of the first synthetic table as bars, and released noisy shares as dots, for each column
figure = plt.figure(figsize=(12, 4.8), layout="none")
axis = figure.add_axes((0, 0, 1, 1))
axis.imshow(plt.imread("released/one_way.png"), interpolation="none")
axis.axis("off")
plt.show()

# %% [markdown]
# ## The estimate
#
# Now answer the question from the released tables alone. "One table" treats the first synthetic
# table as if it were real, which is wrong: its interval leaves out the noise, and counts four times
# as many patients as there are.
#
# The data are simulated, so there is a truth: a simulation of 500,000 patients. On real data you
# would have the released tables only.

# %% 95 % intervals from the real table, from one synthetic table and from twenty, with the truth
truth, _ = difference(simulate(seed=2, rows=500_000))
estimates = {"real table": difference(real), "one table (wrong)": difference(released[0])}
intervals = {name: (value, 1.96 * np.sqrt(v)) for name, (value, v) in estimates.items()}
intervals["twenty tables"] = combine(released)

figure, axis = plt.subplots(figsize=(7, 2.0), layout="constrained")
for row, (name, (estimate, half)) in enumerate(intervals.items()):
    axis.errorbar(estimate, row, xerr=half, fmt="o", color="black" if row == 0 else "tab:blue")
    print(f"{name:18} {estimate:.3f} +- {half:.3f}")
print(f"{'truth':18} {truth:.3f}")
axis.axvline(truth, color="gray", linestyle="--")
axis.set_yticks(range(len(intervals)), list(intervals))
axis.set_ylim(len(intervals) - 0.5, -0.5)
axis.set_xlabel("how much more often smokers come back, 95 % interval")
plt.show()

# %% [markdown]
# ## A model from synthetic rows
#
# Synthetic tables are also used to train models. Train one on a synthetic table and one on the real
# table, and test both on new real patients: who comes back? The measure is the area under the ROC
# curve, where 0.5 is a guess.
#
# This comparison reads real data without noise. It is not private, so on real data it is for your
# own eyes, or not done at all.


# %%
def inputs_and_labels(table):
    def numbers(name):
        return [np.nan if value in ("", None) else float(value) for value in table[name]]

    smoker = np.array(table["smoker"]) == "yes"
    columns = [numbers("age"), numbers("bmi"), numbers("days"), smoker]
    return np.column_stack(columns), np.array(table["came_back"]) == "yes"


test_inputs, test_labels = inputs_and_labels(simulate(seed=3, rows=20_000))
for name, table in {"real": real, "synthetic": released[0]}.items():
    classifier = HistGradientBoostingClassifier(max_iter=30, random_state=0)
    classifier.fit(*inputs_and_labels(table))
    scores = classifier.predict_proba(test_inputs)[:, 1]
    print(f"trained on {name:10} area under the curve {roc_auc_score(test_labels, scores):.3f}")

# %% [markdown]
# ## The privacy report
#
# Publish it with the tables. It says who is protected, against what, and under which conditions.
# One row is protected. If a patient can have several rows, make one row of them first: otherwise
# the guarantee is weaker for this patient.

# %%
print(Path("released/privacy_report.txt").read_text())

# %% [markdown]
# ## Where to go next
#
# - [Synthetic data](../synthetic_data.md): all types of columns, how it works, and results on UCI
#   Adult.
# - [What epsilon means here](../epsilon.md): what an attacker can find out at a given epsilon.
# - [What remains your responsibility](../safety.md): what no library can check.
