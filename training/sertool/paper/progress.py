"""How far a sweep is, and how long it will take by what its epochs took so far."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cache

from edge_runtime.frontend import FrontEnd
from sertool.networks import build_network, count_macs
from sertool.paper.sweep import Cell
from sertool.paper.tables import epoch_seconds
from sertool.paper.workers import Epoch, Event, fold_folder

EPOCHS_REMEMBERED = 20


class SweepProgress:
    """Counts cells and epochs of folds.

    Args:
        cells: of the whole sweep, with their folds.
        finished: those that need no work.
        jobs: how many are trained at once.

    Attributes:
        cells: how many there are.
        cells_done: how many are finished, or have failed.
        epochs: of all folds of all cells.
        epochs_done: how many of them are over, or will never come.
    """

    def __init__(self, cells: Sequence[Cell], finished: Collection[Cell], jobs: int) -> None:
        self._jobs = jobs
        self._left: dict[Cell, int] = {}
        self._seconds: dict[tuple[str, float, bool], list[float]] = defaultdict(list)
        self.cells, self.cells_done = len(cells), len(finished)
        self.epochs = sum(_epochs(cell) for cell in cells)
        for cell in cells:
            histories = [epoch_seconds(fold_folder(cell, fold) / "history.csv") for fold in cell.folds]
            for seconds in histories:
                self._measure(cell, seconds)
            if cell not in finished:
                self._left[cell] = _epochs(cell) - sum(map(len, histories))

    @property
    def epochs_done(self) -> int:
        """Epochs that are over, of all folds."""
        return self.epochs - sum(self._left.values())

    def update(self, event: Event) -> None:
        """Take in what a worker reports."""
        if isinstance(event, Epoch):
            self._left[event.cell] -= 1
            self._measure(event.cell, [event.report.seconds])
        else:
            del self._left[event.cell]
            self.cells_done += 1

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take; None before the first epoch.

        A network that was not measured yet is guessed by its multiply-adds.
        """
        if not any(self._seconds.values()):
            return None
        return sum(count * self._epoch_seconds(cell) for cell, count in self._left.items()) / self._jobs

    def _measure(self, cell: Cell, seconds: Sequence[float]) -> None:
        kind = self._seconds[_kind(cell)]
        kind.extend(seconds)
        del kind[:-EPOCHS_REMEMBERED]

    def _epoch_seconds(self, cell: Cell) -> float:
        kind = _kind(cell)
        if measured := self._seconds.get(kind):
            return sum(measured) / len(measured)
        rates = [sum(found) / len(found) / _macs(*other[:2]) for other, found in self._seconds.items() if found]
        return sum(rates) / len(rates) * _macs(*kind[:2])


def _epochs(cell: Cell) -> int:
    return len(cell.folds) * cell.recipe.training.epochs


def _kind(cell: Cell) -> tuple[str, float, bool]:
    """Return what decides how long an epoch takes."""
    return cell.setting.network, cell.setting.width, bool(cell.setting.graph)


@cache
def _macs(network: str, width: float) -> int:
    front_end = FrontEnd()
    return count_macs(build_network(network, 7, width=width), 64, front_end.mel_bands)
