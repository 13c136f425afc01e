"""What the neighbour loss costs: seconds an epoch without it, and with it in each of its three modes.

Mode ``copies`` is the reference's way: every clip brings a copy of each of its neighbours.

All are trained in turn, several rounds, so that whatever else the machine does falls on all of them; read the
ratios, not the seconds.

    python tools/benchmark_neighbours.py recipe.toml --graph graph
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from sertool.fit import fit
from sertool.recipe import load_recipe

VARIANTS = {
    "no graph": ["neighbours.graph="],
    "bank": ["neighbours.mode=bank"],
    "pass": ["neighbours.mode=pass"],
    "copies": ["neighbours.mode=copies"],
}


def seconds_of_one_epoch(recipe: Path, graph: Path, settings: list[str]) -> float:
    """Train one epoch in a folder that is thrown away and return how long it took."""
    measured: list[float] = []
    overrides = [f"neighbours.graph={graph}", *settings, "training.epochs=1"]
    with tempfile.TemporaryDirectory() as folder:
        fit(
            load_recipe(recipe, overrides),
            Path(folder) / "run",
            on_epoch=lambda report: measured.append(report.seconds),
        )
    return measured[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--graph", type=Path, required=True, help="folder made by: sertool graph")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 6, 9], help="numbers of neighbours")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    names = ["no graph"] + [f"{mode}, n = {count}" for count in options.counts for mode in ("bank", "pass", "copies")]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            mode, _, count = name.partition(", n = ")
            settings = VARIANTS[mode] + ([f"neighbours.count={count}"] if count else [])
            times[name].append(seconds_of_one_epoch(options.recipe, options.graph, settings))
    table = Table("neighbours", "seconds an epoch (median)", "ratio to no graph (median, min to max)")
    for name in names:
        ratios = [one / none for one, none in zip(times[name], times["no graph"], strict=True)]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(name, f"{median(times[name]):.1f}", spread)
    Console().print(table)


if __name__ == "__main__":
    main()
