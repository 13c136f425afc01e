"""Training many cells: worker processes, one cell at a time each, and what they report.

A worker is a process of its own, so that a cell that runs out of memory or crashes takes no other with it. What it has
trained is in its folder; a sweep that was killed goes on from the last whole epoch of every cell that was at work.

A terminal sends Ctrl-C to all processes of a command. Workers never see it, at whatever moment it comes: the sweep
alone answers, and ends them. Nothing is lost by that, since all files are written atomically.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from edge_runtime.errors import SerError, UsageError
from sertool.corpora.splits import Split
from sertool.files import write_text
from sertool.fit import EpochReport, fit
from sertool.paper.sweep import Cell
from sertool.recipe import Recipe
from sertool.report import evaluate_folder
from sertool.run import read_metrics


@dataclass(frozen=True)
class Epoch:
    """One epoch of a fold is over."""

    cell: Cell
    fold: int
    report: EpochReport


@dataclass(frozen=True)
class Finished:
    """All folds of a cell are trained and evaluated."""

    cell: Cell
    uar: float


@dataclass(frozen=True)
class Failed:
    """A cell ended before its time."""

    cell: Cell
    reason: str


Event = Epoch | Finished | Failed


def fold_folder(cell: Cell, fold: int) -> Path:
    """Return where a fold of a cell is trained."""
    return cell.folder / f"fold-{fold}"


def with_folds(cell: Cell, split: Split) -> Cell:
    """Return a cell that names the folds it trains.

    Raises:
        UsageError: it names one that the split does not have.
    """
    count = len(split.folds)
    for fold in cell.folds:
        if not 1 <= fold <= count:
            raise UsageError(f"{cell.name}: no fold {fold}; valid: 1 to {count}")
    return replace(cell, folds=cell.folds or tuple(range(1, count + 1)))


def is_finished(cell: Cell) -> bool:
    """Tell whether a cell is trained and evaluated.

    Raises:
        SerError: its folder holds another run, or one on other data; see :func:`sertool.fit.fit`.
    """
    for fold in cell.folds:
        if not (fold_folder(cell, fold) / "checkpoint.safetensors").is_file():
            return False
        fit(fold_recipe(cell, fold, threads=1), fold_folder(cell, fold))  # trains nothing, but compares
    entry = read_metrics(cell.folder).get(cell.setting.part, {})
    return set(cell.folds) <= set(entry.get("folds", []))


def fold_recipe(cell: Cell, fold: int, threads: int) -> Recipe:
    """Return what a fold of a cell is trained by."""
    recipe = cell.recipe
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"fold": fold}),
            "training": recipe.training.model_copy(update={"threads": recipe.training.threads or threads}),
        }
    )


def train_cells(cells: Iterable[Cell], jobs: int) -> Generator[Event]:
    """Train and evaluate cells in worker processes, in the order given.

    Args:
        cells: with the numbers of their folds.
        jobs: how many at once; they share the cores.

    Yields:
        what happens, as it happens. A generator that is closed, or that Ctrl-C leaves, ends its workers.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = deque(cells)
    working: dict[Connection, tuple[BaseProcess, Cell]] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                cell = waiting.popleft()
                process, connection = _start(cell, threads)
                working[connection] = (process, cell)
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                process, cell = working[ready]
                try:
                    event = ready.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    event = Failed(cell, f"its process ended with {_describe_exit(process.exitcode)}")
                yield event
                if not isinstance(event, Epoch):
                    del working[ready]
                    ready.close()
                    process.join()
    finally:
        _stop([process for process, _ in working.values()])


def _start(cell: Cell, threads: int) -> tuple[BaseProcess, Connection]:
    # A server that has imported torch once forks every worker within milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(cell, threads, sender), daemon=True)
    # The server and its workers inherit what is blocked here; a handler set in the worker would come too late for some.
    # The resource tracker, if it starts within, unblocks the signal again.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    sender.close()  # the worker's end alone keeps it open: its death is the end of the stream
    return process, receiver


def _work(cell: Cell, threads: int, connection: Connection) -> None:
    """Train and evaluate one cell; the whole life of a worker."""
    torch.set_num_threads(threads)
    try:
        for fold in cell.folds:
            fit(
                fold_recipe(cell, fold, threads),
                fold_folder(cell, fold),
                on_epoch=lambda report, fold=fold: connection.send(Epoch(cell, fold, report)),  # type: ignore[misc]
            )
        entry = evaluate_folder(cell.folder, cell.setting.part)
        connection.send(Finished(cell, entry["uar"]))
    except SerError as error:
        connection.send(Failed(cell, str(error)))
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # nobody listens any more: the sweep was killed
            return
        connection.send(Failed(cell, f"{error.filename or 'file'}: {error.strerror or error}"))
    except Exception as error:  # a defect of ours, or of a network that somebody brought: the other cells go on
        write_text(cell.folder / "error.txt", traceback.format_exc())
        connection.send(Failed(cell, f"{type(error).__name__}: {error}; see {cell.folder / 'error.txt'}"))


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", perhaps for want of memory; try fewer --jobs" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()
