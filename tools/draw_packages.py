"""Draws which packages import which, from the imports themselves.

python tools/draw_packages.py docs/images/packages.png
"""

import pathlib
import sys

import matplotlib.pyplot as plt
from measure import Module, read_modules

# Used by nearly every package, so their arrows are left out.
BASE = ["_validate", "relations", "schedules", "_serialize", "_dp_events", "_jax_compat"]
# Helpers of single files, which are not drawn: `_explicit_axes`, `_foreign_names` and others.
# Column and row of each package.
PLACES = {
    "vi": (0.0, 8),
    "audit": (-4.0, 7),
    "training": (0.0, 7),
    "__main__": (-4.0, 8),
    "reports": (0.0, 6),
    "_plan": (0.0, 5),
    "transforms": (-4.0, 4.3),
    "accounting": (4.0, 4),
    "mechanisms": (-4.0, 3.3),
    "clipping": (-6.0, 2),
    "per_example": (-8.0, 1),
    "nnx": (-10.0, 5.3),
    "keras": (4.0, 8),
    "tunix": (-10.0, 8),
    "random": (0.0, 1),
    "samplers": (4.0, 2),
    "compat": (6.0, 3),
    **{name: (3.6 * number - 11.0, 0) for number, name in enumerate(BASE)},
}
LABELS = {
    "random": "random\nkeys and PRNGs",
    "samplers": "samplers\nwho is in a batch",
    "per_example": "per_example\nper-example gradients",
    "clipping": "clipping\nclip rules",
    "mechanisms": "mechanisms\nnoise",
    "transforms": "transforms\nprivatize, dp_sgd, dp_adam",
    "accounting": "accounting\nepsilon, calibration, ledger",
    "_plan": "Plan\na run as one value",
    "reports": "reports\nstatement for people",
    "training": "training\nfit, resume, host data",
    "vi": "vi\nvariational inference",
    "audit": "audit\ncertificates of steps",
    "nnx": "nnx\nFlax NNX models",
    "keras": "keras\nKeras 3 models",
    "tunix": "tunix\ntrainer of Tunix",
    "compat": "compat\nother libraries",
    "__main__": "command line",
}
WIDTH, HEIGHT = 3.4, 0.55


def edges_between_packages(modules: dict[str, Module]) -> set[tuple[str, str]]:
    """Returns the pairs (importer, imported) of different packages."""
    pairs = set()
    for name, module in modules.items():
        importer = name.split(".")[1] if "." in name else None
        for imported in module.imports:
            other = imported.split(".")[1] if "." in imported else None
            if importer and other and importer != other:
                pairs.add((importer, other))
    return pairs


def without_implied(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Leaves out an import that a chain of other imports implies, for a readable drawing."""

    def reaches(start: str, end: str) -> bool:
        following = {other for importer, other in pairs if importer == start}
        return end in following or any(reaches(other, end) for other in following)

    return {
        (importer, imported)
        for importer, imported in pairs
        if not any(
            reaches(other, imported)
            for start, other in pairs
            if start == importer and other != imported
        )
    }


def draw(path: pathlib.Path) -> None:
    """Draws the packages and writes the figure."""
    figure, axes = plt.subplots(figsize=(14.5, 9))
    pairs = {
        pair
        for pair in edges_between_packages(read_modules())
        if set(pair) <= set(PLACES) - set(BASE)
    }
    for importer, imported in sorted(without_implied(pairs)):
        (x, y), (other_x, other_y) = PLACES[importer], PLACES[imported]
        axes.annotate(
            "",
            xy=(other_x, other_y + HEIGHT / 2),
            xytext=(x, y - HEIGHT / 2),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#6b7280",
                "lw": 0.9,
            },
        )
    for name, (x, y) in PLACES.items():
        low = name in BASE
        axes.add_patch(
            plt.Rectangle(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                facecolor="#f3f4f6" if low else "#dbeafe",
                edgecolor="#374151",
                zorder=3,
            )
        )
        axes.text(x, y, LABELS.get(name, name), ha="center", va="center", fontsize=8.5, zorder=4)
    axes.set_xlim(-13, 9)
    axes.set_ylim(-0.5, 8.5)
    axes.axis("off")
    axes.set_title(
        "An arrow points from a package to one that it imports. What other arrows imply is left "
        "out.\nThe bottom row is used by all packages."
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]))
