"""``sertool train``: train a light CNN by a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from edge_runtime.errors import UsageError
from sertool.cli.console import print_status, progress_bar, spectrogram_progress
from sertool.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from sertool.fit import EpochReport


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe; write one with: sertool recipe new.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder.", show_default="runs/ and the recipe's name")
    ] = None,
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

      sertool train recipe.toml -o runs/loso --fold all
    """
    chosen = _absolute(load_recipe(recipe, overrides))
    folder = output or Path("runs") / recipe.stem
    for number, run in _folds(chosen, folder, fold):
        of_fold = chosen.model_copy(update={"data": chosen.data.model_copy(update={"fold": number})})
        _train(of_fold, run)
    typer.echo(f"{folder}: trained; now run: sertool evaluate {folder}")


def _train(recipe: Recipe, run: Path) -> None:
    from sertool.fit import fit

    with progress_bar() as progress:
        trained = fit(
            recipe,
            run,
            on_start=lambda line: print_status(f"{run}: {line}"),
            on_epoch=_epoch_display(progress, run, recipe),
            on_features=spectrogram_progress(progress),
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
        # As short as it can be: bar and time left must find room on 80 columns.
        text = f"{fold}: {losses}, rate {report.learning_rate:.2g}"
        progress.update(task, completed=report.epoch, description=text)
        if progress.disable and (report.epoch % 10 == 0 or report.epoch == report.epochs):
            epoch = f"epoch {report.epoch}/{report.epochs}"
            print_status(f"{run}: {epoch}, {losses}, learning rate {report.learning_rate:.2g}, {report.seconds:.1f} s")

    return show


def _absolute(recipe: Recipe) -> Recipe:
    """Paths in a recipe are meant from the folder the command runs in; a run keeps them absolute."""
    data, neighbours = recipe.data, recipe.neighbours
    paths = {"manifest": str(Path(data.manifest).absolute()), "split": str(Path(data.split).absolute())}
    graph = str(Path(neighbours.graph).absolute()) if neighbours.graph else ""
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=paths),
            "neighbours": neighbours.model_copy(update={"graph": graph}),
        }
    )


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
