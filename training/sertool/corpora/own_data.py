"""Manifests from data that is nobody's published corpus: a folder of clips, or a table with other column names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edge_runtime.errors import UsageError, nearest
from sertool.corpora.corpus import audio_files
from sertool.corpora.manifest import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    Clip,
    Row,
    read_table,
    row_faults,
    seconds,
)

_GENDERS = {"f": "f", "female": "f", "w": "f", "woman": "f", "m": "m", "male": "m", "man": "m", "": ""}


def folder_clips(
    root: str | Path, speaker_pattern: str | None = None, label_pattern: str | None = None, language: str = ""
) -> list[Clip]:
    r"""List the clips below a folder; label and speaker stand in their paths.

    Args:
        root: laid out as ``speaker/label/file`` unless the patterns say otherwise.
        speaker_pattern: regular expression searched in the path below ``root``; its first group is the speaker.
            The folder above the label's when None.
        label_pattern: the same for the label; the folder that holds the file when None.
        language: language code of all clips.

    Raises:
        UsageError: the folder is missing or holds no audio, a pattern is no regular expression with a group, or a
            path does not tell speaker or label.

    Example:
        Files called ``anger/anna_01.wav``::

            folder_clips("recordings", speaker_pattern=r"/([a-z]+)_\d+")
    """
    root = Path(root)
    speaker_search = _compiled(speaker_pattern or r"([^/]+)/[^/]+/[^/]+$", "--speaker-pattern")
    label_search = _compiled(label_pattern or r"([^/]+)/[^/]+$", "--label-pattern")
    clips = []
    for path in audio_files(root):
        place = path.relative_to(root.resolve()).as_posix()
        label = label_search.search(place)
        if label is None or not label[1]:
            raise UsageError(
                f"{root}: the path {place!r} tells no label; lay the files out as speaker/label/file, or give "
                "--label-pattern"
            )
        speaker = speaker_search.search(place)
        if speaker is None or not speaker[1]:
            raise UsageError(
                f"{root}: the path {place!r} tells no speaker, and without speakers no honest test is possible; lay "
                "the files out as speaker/label/file, or give --speaker-pattern, such as '([^/_]+)_[^/]*$'"
            )
        clips.append(Clip(str(path), path, speaker[1], label[1], language=language))
    if not clips:
        raise UsageError(f"{root}: holds no audio file; expected speaker/label/file.wav")
    return clips


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups == 0:
        raise UsageError(f"{option} {pattern!r} has no group; put round brackets around the part that counts")
    return compiled


def table_clips(
    table: str | Path,
    root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    language: str = "",
) -> list[Clip]:
    """List the clips of a CSV table (comma, semicolon or tab) whose columns have other names than a manifest's.

    Args:
        table: the table.
        root: where relative files lie; beside the table when None.
        columns: from a manifest's column to the table's, for those that are called otherwise.
        language: language code of all clips where the table has none.

    Raises:
        UsageError: the table or a column is missing, a row has more cells than there are columns, a cell that a
            manifest needs is empty, a gender or a time is none, or a file does not exist.
    """
    table = Path(table)
    found, rows = read_table(table, "no such table")
    names = {column: column for column in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)} | dict(columns or {})
    for column in (*REQUIRED_COLUMNS, *(columns or {})):
        if names[column] not in found:
            raise UsageError(f"{table}: no column {names[column]!r} for the {column}; {nearest(names[column], found)}")
    base = Path(root) if root is not None else table.parent
    return [
        _table_clip(
            replace(row, cells={column: row.cells.get(name, "") for column, name in names.items()}),
            base,
            f"{table}: line {row.line}",
            language,
        )
        for row in rows
    ]


def _table_clip(row: Row, base: Path, where: str, language: str) -> Clip:
    cells = row.cells
    faults = row_faults(row)
    if faults:
        raise UsageError(f"{where}: {faults[0]}")
    if cells["gender"].lower() not in _GENDERS:
        raise UsageError(f"{where}: gender {cells['gender']!r}; {nearest(cells['gender'], filter(None, _GENDERS))}")
    path = (base / cells["file"]).resolve()
    if not path.is_file():
        raise UsageError(f"{where}: no file {path}; --root DIR says where relative files lie")
    return Clip(
        str(path),
        path,
        cells["speaker"],
        cells["label"],
        gender=_GENDERS[cells["gender"].lower()],
        language=cells["language"] or language,
        sentence=cells["sentence"],
        start=seconds(cells["start"]),
        end=seconds(cells["end"]),
        split=cells["split"],
    )
