"""``sertool train``: train a light CNN by a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from edge_runtime.errors import UsageError
from sertool.cli.console import print_status, progress_bar, spectrogram_progress
from sertool.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from sertool.fit import EpochReport


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(help="The recipe; write one with: sertool recipe new. With --from, that run's when left out."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Run folder.",
            show_default="runs/ and the recipe's name; without a recipe, RUN-qat or RUN-tuned",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Begin with the weights of this run, or fold by fold of its folds."),
    ] = None,
    qat: Annotated[
        bool, typer.Option("--qat", help="Quantisation-aware fine-tuning: learn to do with the rounding of int8.")
    ] = False,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Take a run or a teacher that was trained on clips held out here.")
    ] = False,
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. training.epochs=10."),
    ] = [],  # noqa: B006
    fold: Annotated[
        str | None,
        typer.Option(
            metavar="K|all",
            help="Fold of the split, counted from 1, or 'all' to train each into OUTPUT/fold-K.",
            show_default="data.fold of the recipe",
        ),
    ] = None,
) -> None:
    """Train a light CNN; the same command goes on with an interrupted run.

    The speakers of the test part are never seen. Ctrl-C is safe at any time.

    Examples:

      sertool train recipe.toml -o runs/base

      sertool train recipe.toml -o runs/graph --set neighbours.graph=graph --set neighbours.alpha=0.1

      sertool train recipe.toml -o runs/taught --set distillation.embeddings=emb --set distillation.logit_weight=0.5

      sertool train recipe.toml -o runs/loso --fold all

      sertool train --from runs/loso --qat

      torchrun --standalone --nproc_per_node 8 -m sertool train recipe.toml    (a process for each GPU, one run)
    """
    chosen, folder = _request(recipe, output, start, qat, overrides)
    if fold is None and recipe is None and _of_fold(chosen.training.start, 1) != chosen.training.start:
        fold = "all"
    for number, run in _folds(chosen, folder, fold):
        update: dict[str, dict[str, Any]] = {
            "data": {"fold": number},
            "training": {"start": _of_fold(chosen.training.start, number)},
        }
        train_run(_updated(chosen, update), run, allow_seen)
    typer.echo(f"{folder}: trained; now run: {_next_command(chosen, folder)}")


def _next_command(recipe: Recipe, folder: Path) -> str:
    from sertool.corpora.splits import RELEASE, load_split

    if load_split(recipe.data.split).protocol == RELEASE:
        return f"sertool export {folder} --folds RUNS -o FILE"
    return f"sertool evaluate {folder}"


FINE_TUNING = (
    "training.epochs=5",
    "training.learning_rate=1e-4",
    "training.schedule=steps",
    "training.warmup_epochs=0.0",
    "training.decay=0.5",
    "training.decay_epochs=1",
    "distillation.embeddings=",
    "distillation.embedding_weight=0.0",
    "distillation.relation_weight=0.0",
    "distillation.logit_weight=0.0",
    "invariance.weight=0.0",
)
"""What replaces a run's own schedule and teacher where it is trained further: large steps, or a map that has learnt
nothing yet, would undo what the network has learnt."""


def _request(
    recipe: Path | None, output: Path | None, start: Path | None, qat: bool, overrides: list[str]
) -> tuple[Recipe, Path]:
    """Return the recipe with absolute paths, and the run folder."""
    further = [f"training.start={json.dumps(str(start))}"] if start else []
    further += ["training.quantization_aware=true"] if qat else []
    if recipe:
        return with_absolute_paths(load_recipe(recipe, [*further, *overrides])), output or Path("runs") / recipe.stem
    if not start:
        raise UsageError("no recipe: give one, e.g. sertool train recipe.toml, or a run to go on from: --from RUN")
    fold = next(iter(sorted(start.glob("fold-*/recipe.toml"))), start / "recipe.toml")
    if not fold.is_file():
        raise UsageError(f"{start}: no such run folder; make one with: sertool train")
    fresh = "training.quantization_aware=false"
    chosen = with_absolute_paths(load_recipe(fold, [*FINE_TUNING, fresh, *further, *overrides]))
    return chosen, output or start.with_name(f"{start.name}-{'qat' if qat else 'tuned'}")


def _of_fold(start: str, fold: int) -> str:
    """Return the run to begin with: of a folder of folds, the one of this fold."""
    of_fold = Path(start) / f"fold-{fold}"
    return str(of_fold) if start and of_fold.is_dir() else start


def _updated(recipe: Recipe, update: dict[str, dict[str, Any]]) -> Recipe:
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in update.items()}
    return recipe.model_copy(update=sections)


def train_run(recipe: Recipe, run: Path, allow_seen: bool = False) -> None:
    """Train one run, with its progress shown; see :func:`sertool.fit.fit`."""
    from sertool.fit import fit

    with progress_bar() as progress:
        trained = fit(
            recipe,
            run,
            on_start=lambda line: print_status(f"{run}: {line}"),
            on_epoch=_epoch_display(progress, run, recipe),
            on_features=spectrogram_progress(progress),
            allow_seen=allow_seen,
        )
    if not trained:
        print_status(f"{run}: finished already")


def _epoch_display(progress: Progress, run: Path, recipe: Recipe) -> Callable[[EpochReport], None]:
    """Return what shows each epoch: a bar on a terminal, elsewhere a line every ten epochs and after the last."""
    fold = f"fold {recipe.data.fold}"
    task = progress.add_task(fold, total=recipe.training.epochs)

    def show(report: EpochReport) -> None:
        losses = f"loss {report.loss:.3f}"
        if recipe.neighbours.graph:
            losses += f", neighbour loss {report.neighbour_loss:.4f}"
        if recipe.distillation.embeddings:
            losses += f", distillation {report.distillation_loss:.3f}"
        if recipe.invariance.weight:
            losses += f", adversary {report.invariance_loss:.3f}"
        # As short as it can be: bar and time left must find room on 80 columns.
        text = f"{fold}: {losses}, rate {report.learning_rate:.2g}"
        progress.update(task, completed=report.epoch, description=text)
        if progress.disable and (report.epoch % 10 == 0 or report.epoch == report.epochs):
            epoch = f"epoch {report.epoch}/{report.epochs}"
            print_status(f"{run}: {epoch}, {losses}, learning rate {report.learning_rate:.2g}, {report.seconds:.1f} s")

    return show


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe of a run: paths are meant from the folder that the command runs in, and a run may be moved."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path else ""

    update: dict[str, dict[str, Any]] = {
        "data": {"manifest": absolute(recipe.data.manifest), "split": absolute(recipe.data.split)},
        "neighbours": {"graph": absolute(recipe.neighbours.graph)},
        "distillation": {"embeddings": absolute(recipe.distillation.embeddings)},
        "training": {"start": absolute(recipe.training.start)},
    }
    return _updated(recipe, update)


def _folds(recipe: Recipe, folder: Path, fold: str | None) -> list[tuple[int, Path]]:
    from sertool.corpora.splits import load_split

    if fold == "all":
        # Not recipe.toml, which marks a run, too: in the folder that the command runs in, it is the user's own.
        if any((folder / f"{name}.safetensors").is_file() for name in ("checkpoint", "resume")):
            raise UsageError(f"{folder}: holds a single run, not folds; give another folder with -o")
        count = len(load_split(recipe.data.split).folds)
        return [(number, folder / f"fold-{number}") for number in range(1, count + 1)]
    if folds := sorted(folder.glob("fold-*/recipe.toml")):
        raise UsageError(
            f"{folder}: holds folds, e.g. {folds[0].parent.name}, which a run beside them would hide; "
            "give --fold all, or another folder with -o"
        )
    if fold is None:
        return [(recipe.data.fold, folder)]
    if not fold.isdecimal():
        raise UsageError(f"--fold {fold!r}: expected the number of a fold, or 'all'")
    return [(int(fold), folder)]
