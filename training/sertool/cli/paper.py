"""``sertool paper``: the paper's experiment on a corpus of one's own, from the corpus to its tables and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from edge_runtime.errors import SerError, UsageError, nearest
from sertool.cli.console import STATUS, print_json, print_status, progress_bar, spectrogram_progress

if TYPE_CHECKING:
    from sertool.corpora.manifest import Clip
    from sertool.corpora.splits import Split
    from sertool.paper.progress import SweepProgress
    from sertool.paper.sweep import Cell, Part, Sweep
    from sertool.paper.workers import Epoch, Event

SHARE_FOR_TABLES = 0.05
"""Of the time: after a cell, the tables are written again unless that would cost more."""


def paper(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A TOML file, or one that is shipped: see below.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the sweep.", show_default="runs/ and its name")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Cells trained at once; they share the cores.")] = 1,
    only: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Only cells of such names, e.g. '*-base-*'; repeatable.")
    ] = [],  # noqa: B006
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. training.epochs=10.")
    ] = [],  # noqa: B006
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with corpora/ and encoders/: $SERTOOL_DATA in a sweep.", show_default="SERTOOL_DATA"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and how far they are; do nothing.")
    ] = False,
    tables: Annotated[
        bool, typer.Option("--tables", help="Write tables and figures of what is there; no more.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the sweep's file, to start one's own from.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run the paper's experiment: train every cell of a sweep and compare it with the base.

    Shipped sweeps: demos, emovo, emodb (as the paper), emovo-small, emodb-small (for a desk without a GPU).

    A cell is an ordinary run below OUTPUT/cells; tables and figures go to OUTPUT/tables, after every cell. Finished
    cells are skipped; Ctrl-C is safe at any time, the same command goes on.

    Examples:

      sertool paper emodb-small --data ~/speech --jobs 2

      sertool paper emodb --show > mine.toml

      sertool paper mine.toml -o runs/mine --only '*-base-*' --dry-run

      sertool paper mine.toml -o runs/mine --tables
    """
    from sertool.paper.sweep import find_sweep, load_sweep, plan_cells

    if data is not None:
        os.environ["SERTOOL_DATA"] = str(data.absolute())
    path = find_sweep(sweep)
    if show:
        typer.echo(path.read_text(encoding="utf-8"), nl=False)
        return
    chosen = load_sweep(sweep, overrides)
    folder = output or Path("runs") / path.stem
    every = plan_cells(chosen, folder)
    cells = _matching(every, only)
    if dry_run:
        _print_plan(cells, json)
        return
    failed = {} if tables else _train(chosen, folder, every, cells, jobs)
    results = _save_results(chosen, folder, every)
    if json:
        print_json(results | {"failed": failed})
    else:
        typer.echo((folder / "tables" / "results.md").read_text(encoding="utf-8"), nl=False)
        print_status(f"{folder / 'tables'}: tables and figures")
    if failed:
        first, *others = failed.items()
        more = f"; and {len(others)} more" if others else ""
        raise SerError(f"{len(failed)} of {len(cells)} cells failed: {first[0]}: {first[1]}{more}")


def _matching(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            raise UsageError(f"--only {pattern!r}: no such cell; {nearest(pattern, [cell.name for cell in cells])}")
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def _print_plan(cells: Sequence[Cell], json: bool) -> None:
    from sertool.run import read_metrics

    plan = {}
    for cell in cells:
        trained = len(list(cell.folder.glob("fold-*/checkpoint.safetensors")))
        evaluated = cell.setting.part in read_metrics(cell.folder)
        plan[cell.name] = {"folds": list(cell.folds) or "all", "folds_trained": trained, "evaluated": evaluated}
    if json:
        print_json(plan)
        return
    for name, state in plan.items():
        begun = f"{state['folds_trained']} folds trained" if state["folds_trained"] else "to do"
        typer.echo(f"{name}: {'evaluated' if state['evaluated'] else begun}")
    typer.echo(f"{len(plan)} cells, {sum(bool(state['evaluated']) for state in plan.values())} evaluated")


def _train(sweep: Sweep, folder: Path, every: Sequence[Cell], cells: Sequence[Cell], jobs: int) -> dict[str, str]:
    """Train what is not finished; return the cells that failed, and why."""
    from sertool.paper.progress import SweepProgress
    from sertool.paper.workers import Failed, Finished, train_cells, with_folds

    with progress_bar() as progress:
        split, unbuilt = _prepare(sweep, folder, cells, progress)
    cells = [with_folds(cell, split) for cell in cells]
    waiting, failed = _unfinished(cells, unbuilt)
    state = SweepProgress(cells, [cell for cell in cells if cell not in waiting], jobs)
    print_status(f"{folder}: {len(cells)} cells, {len(waiting)} to train, {jobs} at once")
    for name, reason in failed.items():
        print_status(f"{name}: failed: {reason}")
    tables_written, tables_took = monotonic(), 0.0
    with _view(state) as show, closing(train_cells(waiting, jobs)) as events:
        for event in events:
            state.update(event)
            show(event)
            if isinstance(event, Failed):
                failed[event.cell.name] = event.reason
            started = monotonic()
            if isinstance(event, Finished) and tables_took <= SHARE_FOR_TABLES * (started - tables_written):
                _save_results(sweep, folder, every)
                tables_written, tables_took = monotonic(), monotonic() - started
    return failed


def _prepare(
    sweep: Sweep, folder: Path, cells: Sequence[Cell], progress: Progress
) -> tuple[Split, dict[tuple[Part, str], str]]:
    """Make what the cells share; return the split, and why a graph could not be built."""
    from sertool.paper.prepare import prepare_corpus, prepare_features, prepare_graphs

    def embedding(teacher: str, clips: Sequence[Clip]) -> Iterable[Clip]:
        if clips:
            print_status(f"{teacher}: {len(clips)} clips to embed")
        return progress.track(clips, description="embedding")

    manifest, split = prepare_corpus(sweep, folder)
    prepare_features(sweep, manifest, spectrogram_progress(progress))
    return split, prepare_graphs(sweep, folder, manifest, split, cells, embedding, print_status)


def _unfinished(cells: Sequence[Cell], unbuilt: Mapping[tuple[Part, str], str]) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells to train, and those that cannot be, with the reason."""
    from sertool.paper.workers import is_finished

    waiting, failed = [], {}
    for cell in cells:
        if reason := unbuilt.get((cell.setting.part, cell.setting.graph)):
            failed[cell.name] = reason
            continue
        try:
            if not is_finished(cell):
                waiting.append(cell)
        except SerError as error:
            failed[cell.name] = str(error)
    return waiting, failed


def _save_results(sweep: Sweep, folder: Path, cells: Sequence[Cell]) -> dict[str, Any]:
    from sertool.paper.figures import save_figures
    from sertool.paper.tables import collect, save_tables

    results = collect(sweep, cells)
    save_tables(folder / "tables", results, folder.name)
    save_figures(folder / "tables", results)
    return results


@contextmanager
def _view(state: SweepProgress) -> Iterator[Callable[[Event], None]]:
    """Give what shows events: on a terminal a bar of the sweep above a line for each cell at work, elsewhere lines."""
    from sertool.paper.tables import describe_time
    from sertool.paper.workers import Epoch, Failed

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
    ]
    with Progress(*columns, console=STATUS, disable=not STATUS.is_terminal) as progress:
        sweep = progress.add_task("", total=state.epochs, left="")
        bars: dict[Cell, TaskID] = {}

        def show(event: Event) -> None:
            left = f"{describe_time(state.seconds_left)} left" if state.seconds_left else ""
            cells = f"{state.cells_done} of {state.cells} cells"
            progress.update(sweep, completed=state.epochs_done, description=cells, left=left)
            if isinstance(event, Epoch):
                _show_epoch(event)
                return
            if event.cell in bars:
                progress.remove_task(bars.pop(event.cell))
            result = f"failed: {event.reason}" if isinstance(event, Failed) else f"UAR {event.uar:.1%}"
            print_status(f"{event.cell.name}: {result} ({', '.join(filter(None, [cells, left]))})")

        def _show_epoch(event: Epoch) -> None:
            cell, report = event.cell, event.report
            folds = cell.folds.index(event.fold)
            if cell not in bars:
                bars[cell] = progress.add_task("", total=len(cell.folds) * report.epochs, left="")
            fold = f"{cell.name}: fold {event.fold}, loss {report.loss:.3f}"
            progress.update(bars[cell], completed=folds * report.epochs + report.epoch, description=fold)
            if progress.disable and report.epoch == report.epochs:
                print_status(f"{fold}, {report.seconds:.1f} s an epoch")

        yield show
