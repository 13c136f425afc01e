"""The manifest: a table with one row a clip, the only form in which the tools know a corpus."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_runtime.errors import UsageError, nearest
from edge_runtime.frontend import FloatArray
from sertool.audio import read_audio
from sertool.files import write_text

REQUIRED_COLUMNS = ("file", "speaker", "label")
OPTIONAL_COLUMNS = ("gender", "language", "sentence", "start", "end", "split")


@dataclass(frozen=True)
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
    def genders(self) -> dict[str, str]:
        """Gender of each speaker; empty where unknown."""
        return {clip.speaker: clip.gender for clip in self.clips}

    def indices(self, speakers: list[str]) -> list[int]:
        """Return the rows of these speakers in order of the clips' keys, whatever the order of the table.

        Raises:
            UsageError: a speaker who has no clip.
        """
        unknown = sorted(set(speakers) - set(self.speakers))
        if unknown:
            raise UsageError(f"{self.path}: no clip of speaker {unknown[0]!r}; {nearest(unknown[0], self.speakers)}")
        wanted = set(speakers)
        rows = [row for row, clip in enumerate(self.clips) if clip.speaker in wanted]
        return sorted(rows, key=lambda row: self.clips[row].key)

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


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest from CSV, or from Parquet when pandas and pyarrow are installed.

    Args:
        path: table with the columns ``file, speaker, label`` and optionally ``gender, language, sentence, start,
            end, split``; other columns are ignored. Relative files are looked for beside the table.

    Raises:
        UsageError: the table is missing, empty, not text, lacks a column, leaves a required cell empty, has a
            number that is none, or names a clip twice.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such manifest; make one with: sertool corpus make")
    rows, columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    if missing:
        raise UsageError(
            f"{path}: no column {missing[0]!r}; needed: {', '.join(REQUIRED_COLUMNS)}; found: {', '.join(columns)}"
        )
    if not rows:
        raise UsageError(f"{path}: the manifest lists no clip")
    clips = tuple(_clip(row, path, line) for line, row in enumerate(rows, start=2))
    key, count = Counter(clip.key for clip in clips).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path}: clip {key!r} stands in {count} rows; a clip may be listed once")
    return Manifest(clips, path)


def _read_csv(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{k: (v or "").strip() for k, v in row.items() if isinstance(k, str)} for row in reader]
            return rows, [name.strip() for name in reader.fieldnames or []]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: not a CSV table in UTF-8 ({error})") from error


def _read_parquet(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    try:
        import pandas
    except ImportError as error:
        raise UsageError(f"{path}: reading Parquet needs: pip install pandas pyarrow; or give a CSV") from error
    try:
        table = pandas.read_parquet(path)
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet ({error})") from error
    text = table.astype(object).where(table.notna(), "").astype(str)
    return text.to_dict("records"), list(table.columns)


def _clip(row: dict[str, str], manifest: Path, line: int) -> Clip:
    for column in REQUIRED_COLUMNS:
        if not row.get(column):
            raise UsageError(f"{manifest}: line {line}: {column} is empty")
    times: dict[str, float | None] = {}
    for column in ("start", "end"):
        text = row.get(column, "")
        try:
            times[column] = float(text) if text else None
        except ValueError as error:
            raise UsageError(f"{manifest}: line {line}: {column} {text!r} is not a number of seconds") from error
        value = times[column]
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise UsageError(f"{manifest}: line {line}: {column} {text!r} is not a time in the file")
    texts = {name: row.get(name, "") for name in ("gender", "language", "sentence", "split")}
    return Clip(
        row["file"],
        manifest.parent / row["file"],
        row["speaker"],
        row["label"],
        **texts,
        start=times["start"],
        end=times["end"],
    )
