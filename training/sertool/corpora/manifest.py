"""The manifest: a table with one row a clip, the only form in which the tools know a corpus."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge_runtime.errors import AudioError, UsageError, nearest
from edge_runtime.frontend import FloatArray
from sertool.audio import read_audio
from sertool.files import write_text

REQUIRED_COLUMNS = ("file", "speaker", "label")
OPTIONAL_COLUMNS = ("gender", "language", "sentence", "start", "end", "split")


@dataclass(frozen=True, slots=True)
class Clip:
    """One labelled stretch of one audio file.

    Attributes:
        file: the audio file as the manifest writes it.
        path: the same, resolved against the manifest's folder.
        speaker: who speaks.
        label: the emotion.
        gender: ``f``, ``m`` or empty.
        language: language code or empty.
        sentence: which sentence is spoken, or empty.
        start: first second of the clip in the file; None for the beginning.
        end: last second; None for the end of the file.
        split: the corpus' own part (train, validation, test) or empty.
    """

    file: str
    path: Path
    speaker: str
    label: str
    gender: str = ""
    language: str = ""
    sentence: str = ""
    start: float | None = None
    end: float | None = None
    split: str = ""

    @property
    def key(self) -> str:
        """Name of the clip in graphs, predictions and reports: unique within its manifest."""
        if self.start is None and self.end is None:
            return self.file
        return f"{self.file}#{self.start or 0:g}-{'' if self.end is None else f'{self.end:g}'}"

    def read(self) -> FloatArray:
        """Decode the clip to 16 kHz mono float32; see :func:`sertool.audio.read_audio` for the errors."""
        if not self.path.is_file() and Path(self.file).is_file():
            raise AudioError(
                f"{self.path}: no such audio file; {self.file!r} lies in the current folder, but relative files are "
                "looked for beside the manifest"
            )
        return read_audio(self.path, self.start, self.end)


@dataclass(frozen=True)
class Manifest:
    """A corpus as a table.

    Attributes:
        clips: in file order.
        path: where it was read from, for messages.
    """

    clips: tuple[Clip, ...]
    path: Path

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.clips)

    @cached_property
    def speakers(self) -> list[str]:
        """All speakers, sorted."""
        return sorted({clip.speaker for clip in self.clips})

    @cached_property
    def labels(self) -> list[str]:
        """All labels, sorted."""
        return sorted({clip.label for clip in self.clips})

    @cached_property
    def labels_of(self) -> dict[str, set[str]]:
        """The labels that each speaker has clips of."""
        found: dict[str, set[str]] = {}
        for clip in self.clips:
            found.setdefault(clip.speaker, set()).add(clip.label)
        return found

    @cached_property
    def genders(self) -> dict[str, str]:
        """Gender of each speaker; empty where unknown."""
        return {clip.speaker: clip.gender for clip in self.clips}

    def indices(self, speakers: list[str]) -> list[int]:
        """Return the rows of these speakers in order of the clips' keys, whatever the order of the table.

        Raises:
            UsageError: a speaker who has no clip.
        """
        self.refuse_unknown(speakers)
        wanted = set(speakers)
        rows = [row for row, clip in enumerate(self.clips) if clip.speaker in wanted]
        return sorted(rows, key=lambda row: self.clips[row].key)

    def refuse_unknown(self, speakers: Iterable[str]) -> None:
        """Refuse speakers who have no clip.

        Raises:
            UsageError: there is one.
        """
        unknown = sorted(speaker for speaker in speakers if speaker not in self.labels_of)
        if unknown:
            raise UsageError(f"{self.path}: no clip of speaker {unknown[0]!r}; {nearest(unknown[0], self.speakers)}")

    def save(self, path: str | Path) -> None:
        """Write the table as CSV, without the optional columns that nobody filled in."""
        filled = [c for c in OPTIONAL_COLUMNS if any(getattr(clip, c) not in ("", None) for clip in self.clips)]
        columns = [*REQUIRED_COLUMNS, *filled]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for clip in self.clips:
            writer.writerow(["" if getattr(clip, c) is None else getattr(clip, c) for c in columns])
        write_text(path, text.getvalue())


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        line: where it stands, from 1; the header is the first.
        cells: text by column, without spaces around it; a row may lack its last cells.
        fault: what makes its cells meaningless; empty where nothing does.
    """

    line: int
    cells: dict[str, str]
    fault: str = ""


@dataclass(frozen=True)
class RowFault:
    """Why a manifest cannot be used with this row in it.

    Attributes:
        line: where the row stands.
        detail: what is wrong, in a few words.
    """

    line: int
    detail: str


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest from CSV, or from Parquet when pandas and pyarrow are installed.

    Args:
        path: table with the columns ``file, speaker, label`` and optionally ``gender, language, sentence, start,
            end, split``; other columns are ignored. Relative files are looked for beside the table.

    Raises:
        UsageError: the table is missing, a folder, empty, not text, or lacks a column; or a row leaves a required
            cell empty, has more cells than there are columns, has a number that is none, or names a clip again.
    """
    manifest, faults = read_manifest(path)
    if faults:
        others = f" (and {len(faults) - 1} more; list all: sertool corpus check {path})" if len(faults) > 1 else ""
        raise UsageError(f"{path}: line {faults[0].line}: {faults[0].detail}{others}")
    return manifest


def read_manifest(path: str | Path) -> tuple[Manifest, list[RowFault]]:
    """Read what can be used of a manifest, for a check that lists all that cannot.

    Args:
        path: as for :func:`load_manifest`.

    Returns:
        The clips of the sound rows, and all faults of the others in the order of the table.

    Raises:
        UsageError: the table as a whole is of no use: missing, a folder, empty, not text, or without a column.
    """
    path = Path(path)
    columns, rows = read_table(path, "no such manifest; make one with: sertool corpus make")
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise UsageError(
            f"{path}: no column {missing[0]!r}; needed: {', '.join(REQUIRED_COLUMNS)}; found: {', '.join(columns)}"
        )
    clips: list[Clip] = []
    lines: dict[str, int] = {}
    faults: list[RowFault] = []
    for row in rows:
        details = row_faults(row)
        if not details:
            clip = _clip(row.cells, path.parent)
            first = lines.setdefault(clip.key, row.line)
            if first == row.line:
                clips.append(clip)
            else:
                details = [f"clip {clip.key!r} stands in line {first} already; a clip may be listed once"]
        faults += [RowFault(row.line, detail) for detail in details]
    return Manifest(tuple(clips), path), faults


def read_table(path: Path, absent: str) -> tuple[list[str], list[Row]]:
    """Read a table whose first line names the columns, whatever they are called.

    Args:
        path: Parquet if it ends in ``.parquet``; else CSV in UTF-8, separated by comma, semicolon or tab, whichever
            the header holds most of (spreadsheets write semicolons where numbers have a decimal comma).
        absent: what to say when there is no such file.

    Returns:
        The columns, and the rows in which anything is written, at least one.

    Raises:
        UsageError: the table is missing, a folder, empty, not text, or has no row.
    """
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; give the table, a CSV file")
    if not path.is_file():
        raise UsageError(f"{path}: {absent}")
    columns, rows = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if not rows:
        raise UsageError(f"{path}: the table lists no clip")
    return columns, rows


def _read_csv(path: Path) -> tuple[list[str], list[Row]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = next(filter(str.strip, file), "").strip()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            # Of a million rows, most cells repeat: alike ones share one string, for the sake of memory.
            alike: dict[str, str] = {}
            stripped = ([alike.setdefault(cell, cell) for cell in map(str.strip, cells)] for cells in reader)
            written = [(reader.line_num, cells) for cells in stripped if any(cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not a CSV table in UTF-8 ({error}); save it as CSV UTF-8") from error
    if not written:
        raise UsageError(f"{path}: the file is empty")
    columns = written[0][1]
    return columns, [
        Row(line, dict(zip(columns, cells, strict=False)), _surplus(cells, columns, delimiter))
        for line, cells in written[1:]
    ]


def _surplus(cells: list[str], columns: list[str], delimiter: str) -> str:
    if not any(cells[len(columns) :]):
        return ""
    return f"{len(cells)} cells for {len(columns)} columns; put a cell that contains {delimiter!r} in quotation marks"


def _read_parquet(path: Path) -> tuple[list[str], list[Row]]:
    try:
        import pandas
    except ImportError as error:
        raise UsageError(f"{path}: reading Parquet needs: pip install pandas pyarrow; or give a CSV") from error
    try:
        table = pandas.read_parquet(path)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet ({error})") from error
    text = table.astype(object).where(table.notna(), "").astype(str)
    return list(table.columns), [Row(line, cells) for line, cells in enumerate(text.to_dict("records"), start=2)]


def row_faults(row: Row) -> list[str]:
    """Say all that keeps a row, under a manifest's columns, from being a clip."""
    if row.fault:
        return [row.fault]
    faults = [f"{column} is empty" for column in REQUIRED_COLUMNS if not row.cells.get(column)]
    for column in ("start", "end"):
        try:
            seconds(row.cells.get(column, ""))
        except ValueError as error:
            faults.append(f"{column} {error}")
    return faults


def seconds(text: str) -> float | None:
    """Read a cell that holds a time.

    Raises:
        ValueError: not a number, negative, infinite or NaN.

    Example:
        >>> seconds("0.5")
        0.5
        >>> seconds("") is None
        True
    """
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number of seconds, such as 0.5") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"{text!r} is not a time in the file")
    return value


def _clip(cells: dict[str, str], folder: Path) -> Clip:
    texts = {name: cells.get(name, "") for name in ("gender", "language", "sentence", "split")}
    return Clip(
        cells["file"],
        folder / cells["file"],
        cells["speaker"],
        cells["label"],
        **texts,
        start=seconds(cells.get("start", "")),
        end=seconds(cells.get("end", "")),
    )
