"""What the commands share: progress bars on stderr, tables on stdout, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

# What is printed are labels, paths and licences as the user wrote them: square brackets and colons are no markup.
STATUS = Console(stderr=True, markup=False, emoji=False, highlight=False)
OUTPUT = Console(markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Give a progress display with counts and time left; it draws only on a terminal."""
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),  # takes what the other columns leave
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=STATUS, disable=not STATUS.is_terminal) as progress:
        yield progress


def spectrogram_progress(progress: Progress) -> Callable[[int, int], None]:
    """Add a bar for log-Mel spectrograms, seen only while they are computed; return what it is told the counts by."""
    task = progress.add_task("log-Mel spectrograms", visible=False)

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, visible=done < total)

    return show


def print_status(text: str) -> None:
    """Print one line on stderr as it is, above the progress bars where there are any."""
    STATUS.print(text, soft_wrap=True)


def print_json(content: Any) -> None:
    """Print one JSON document on stdout, unstyled."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
