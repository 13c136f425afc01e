"""Where an epoch of training goes, and how much of what the processor can do is reached.

Peak is what a large product of matrices reaches in the training's precision with the same number of threads. Other work
on the machine takes from both; the better of several rounds counts.

    python tools/profile_epoch.py device.toml
    python tools/profile_epoch.py device.toml --set network.width=0.5 --set training.threads=1 --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_runtime.errors import SerError
from sertool.augment import augmented, draw_mixture
from sertool.batches import training_inputs
from sertool.cli.train import with_absolute_paths
from sertool.corpora.manifest import load_manifest
from sertool.corpora.splits import load_fold
from sertool.fit import EpochReport, fit, precision_of
from sertool.networks import build_network
from sertool.recipe import Recipe, load_recipe

ROUNDS = 3
MATRIX = 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="as made by: sertool recipe new")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    overrides = [*arguments.overrides, f"training.epochs={ROUNDS}", "training.warmup_epochs=0"]
    recipe = with_absolute_paths(load_recipe(arguments.recipe, overrides))
    torch.set_num_threads(recipe.training.threads or torch.get_num_threads())
    measured = measure(recipe)
    if arguments.json:
        print(json.dumps(measured, indent=1))
        return
    for name, value in measured.items():
        print(f"{name:<40} {value:10.3g}")


def measure(recipe: Recipe) -> dict[str, float]:
    """Return seconds of an epoch and of its batches, and operations a second, of an epoch and at most."""
    seconds = min(report.seconds for report in train(recipe))
    with FlopCounterMode(display=False) as counter:
        epochs = train(recipe)
    operations = counter.get_total_flops() / len(epochs)
    dtype = torch.bfloat16 if precision_of(recipe, torch.device("cpu")) == "bf16" else torch.float32
    peak = 2 * MATRIX**3 / best_of(lambda square: square @ square, torch.rand(MATRIX, MATRIX, dtype=dtype))
    return {
        "seconds an epoch": seconds,
        "of these, batches and augmentation": batch_seconds(recipe),
        "billion operations an epoch": operations / 1e9,
        "billion operations a second": operations / seconds / 1e9,
        "peak, billion operations a second": peak / 1e9,
        "share of peak": operations / seconds / peak,
    }


def train(recipe: Recipe) -> list[EpochReport]:
    """Train and throw the run away."""
    reports: list[EpochReport] = []
    with tempfile.TemporaryDirectory() as folder:
        fit(recipe, Path(folder, "run"), on_epoch=reports.append)
    return reports


def batch_seconds(recipe: Recipe) -> float:
    """Return how long the batches of an epoch take, without the network."""
    manifest = load_manifest(recipe.data.manifest)
    _, fold = load_fold(recipe.data.split, recipe.data.fold, manifest)
    rows = manifest.indices([*fold.train])
    network = build_network(recipe.network.name, 2, recipe.network.time_padding, recipe.network.width)
    inputs, _ = training_inputs(recipe, manifest, rows, network, None, torch.device("cpu"))

    def epoch(order: torch.Tensor) -> None:
        random = np.random.default_rng(0)
        inputs.begin(random)
        for first in range(0, len(order), recipe.training.batch_size):
            batch = order[first : first + recipe.training.batch_size]
            mixture = draw_mixture(len(batch), recipe.augmentation.mixup, random)
            augmented(inputs.batch(batch, random), recipe.augmentation, mixture, random)

    return best_of(epoch, torch.randperm(len(rows)))


def best_of(work: Callable[[torch.Tensor], object], given: torch.Tensor) -> float:
    """Return the least seconds of some rounds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work(given)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    try:
        main()
    except SerError as error:
        sys.exit(f"profile_epoch: {error}")
