"""Corpora whose speakers and emotions stand in tables of their own, apart from the audio.

Audio files are found by their names, so the original download and a converted copy read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError, nearest
from sertool.corpora.corpus import Corpus, Note, audio_files
from sertool.corpora.manifest import Clip, Row, read_table

Labelled = tuple[str, dict[str, Any]]
"""The name of an audio file without its suffix, and what a :class:`Clip` of it says besides its file."""

NO_AGREEMENT = "no agreement"
_GENDERS = {"female": "f", "male": "m"}


def by_table(
    labelled: Callable[[Corpus, Path, Note], list[Labelled]],
) -> Callable[[Corpus, Path, Note], list[Clip]]:
    """Return a reader that puts labels and audio files together, for :attr:`Corpus.read`.

    Args:
        labelled: reads the tables below a folder.

    Returns:
        A function that notes how many labels have no audio, and raises UsageError where none has.
    """

    def read(corpus: Corpus, root: Path, note: Note) -> list[Clip]:
        audio = _audio_by_name(corpus, root)
        rows = labelled(corpus, root, note)
        lacking = [name for name, _ in rows if name not in audio]
        if rows and len(lacking) == len(rows):
            raise UsageError(
                f"{root}: holds labels of {corpus.title} but not the audio, such as {lacking[0]}.wav; give the folder "
                "that holds both as --root"
            )
        if lacking:
            note(f"{len(lacking)} of {len(rows)} labels have no audio, such as {lacking[0]}")
        return [
            Clip(str(audio[name]), audio[name], language=corpus.language, **told)
            for name, told in rows
            if name in audio
        ]

    return read


def _audio_by_name(corpus: Corpus, root: Path) -> dict[str, Path]:
    audio: dict[str, Path] = {}
    for path in audio_files(root):
        if path.stem in audio:
            raise UsageError(
                f"{root}: holds an audio file twice, {audio[path.stem]} and {path}; give one copy of {corpus.title} as "
                "--root"
            )
        audio[path.stem] = path
    return audio


def _below(root: Path, pattern: str) -> list[Path]:
    """List files at any depth; archives packed on a Mac hold a hidden companion of each."""
    return sorted(path for path in root.rglob(pattern) if path.is_file() and not path.name.startswith("."))


def _table_below(corpus: Corpus, root: Path, pattern: str) -> Path | None:
    """Return the one table of this name that lies least deep: releases keep those of earlier ones further down."""
    found = sorted(_below(root, pattern), key=lambda path: len(path.parts))
    if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
        raise UsageError(
            f"{root}: holds two label tables, {found[0]} and {found[1]}; give one {corpus.title} as --root"
        )
    return found[0] if found else None


def _rows(table: Path, *columns: str) -> list[Row]:
    """Read the rows of a table that must have these columns and no damaged row."""
    found, rows = read_table(table, "no such table")
    for column in columns:
        if column not in found:
            raise UsageError(f"{table}: no column {column!r}; {nearest(column, found)}")
    for row in rows:
        fault = row.fault or next((f"no {column}" for column in columns if column not in row.cells), "")
        if fault:
            raise UsageError(f"{table}: line {row.line}: {fault}")
    return rows


def _translated(word: str, labels: dict[str, str], where: str) -> str:
    if word not in labels:
        raise UsageError(f"{where}: emotion {word!r} is not known; {nearest(word, labels)}")
    return labels[word]


_IEMOCAP_LABELS = {
    "ang": "anger",
    "dis": "disgust",
    "exc": "excitement",
    "fea": "fear",
    "fru": "frustration",
    "hap": "happiness",
    "neu": "neutral",
    "oth": "other",
    "sad": "sadness",
    "sur": "surprise",
    "xxx": NO_AGREEMENT,
}
_IEMOCAP_TURN = re.compile(
    r"^\[[\d.]+ - [\d.]+\]\t(?P<name>Ses(?P<session>\d\d)[FM]_\w+_(?P<gender>[FM])\w+)\t(?P<label>\w+)\t", re.MULTILINE
)


def _iemocap(_: Corpus, root: Path, __: Note) -> list[Labelled]:
    r"""Read what the annotators of IEMOCAP agree upon.

    A line such as ``[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]`` in
    ``Session1/dialog/EmoEvaluation/Ses01F_impro01.txt`` labels the file of that name below ``Session1/sentences/wav``.
    The first F or M of a name is the one of the two actors who wears the markers, the last one who speaks (README of
    the release; Busso et al., 2008).
    """
    rows: list[Labelled] = []
    for path in _below(root, "EmoEvaluation/*.txt"):
        # Remarks of the annotators are in whatever encoding; names and labels are ASCII.
        turns = list(_IEMOCAP_TURN.finditer(path.read_text(encoding="utf-8", errors="replace")))
        if not turns:
            raise UsageError(
                f"{path}: labels no turn; expected lines such as [6.29 - 8.23]<tab>Ses01F_impro01_F000<tab>neu"
            )
        rows += [
            (
                turn["name"],
                {
                    "speaker": f"Ses{turn['session']}{turn['gender']}",
                    "gender": turn["gender"].lower(),
                    "label": _translated(turn["label"], _IEMOCAP_LABELS, f"{path}: {turn['name']}"),
                },
            )
            for turn in turns
        ]
    return rows


_MSP_PODCAST_LABELS = {
    "A": "anger",
    "C": "contempt",
    "D": "disgust",
    "F": "fear",
    "H": "happiness",
    "N": "neutral",
    "O": "other",
    "S": "sadness",
    "U": "surprise",
    "X": NO_AGREEMENT,
}
_MSP_PODCAST_PARTS = {"development": "validation", "test1": "test"}


def _msp_podcast(corpus: Corpus, root: Path, note: Note) -> list[Labelled]:
    """Read the consensus table of MSP-Podcast.

    ``Labels/labels_consensus.csv`` has the columns FileName, EmoClass, EmoAct, EmoVal, EmoDom, SpkrID, Gender and
    Split_Set; the files lie in ``Audios`` (readme.txt of release 1.12; the first releases spell it
    ``labels_concensus.csv``). The part is that of the authors: Development is ``validation``, Test1 ``test``; speakers
    of Test1 also speak in Test2, which stays ``test2``.
    """
    table = _table_below(corpus, root, "labels_con[cs]ensus.csv")
    if table is None:
        return []
    rows = _rows(table, "FileName", "EmoClass", "SpkrID", "Gender", "Split_Set")
    known = [row for row in rows if row.cells["SpkrID"].lower() not in ("", "unknown")]
    if len(known) < len(rows):
        # They may be anyone, test speakers included.
        note(f"{len(rows) - len(known)} clips are left out: nobody knows who speaks in them")
    return [
        (
            Path(row.cells["FileName"]).stem,
            {
                "speaker": row.cells["SpkrID"],
                "gender": _GENDERS.get(row.cells["Gender"].lower(), ""),
                "label": _translated(row.cells["EmoClass"], _MSP_PODCAST_LABELS, f"{table}: line {row.line}"),
                "split": _MSP_PODCAST_PARTS.get(row.cells["Split_Set"].lower(), row.cells["Split_Set"].lower()),
            },
        )
        for row in known
    ]


_EMOZIONALMENTE_LABELS = {
    "anger": "anger",
    "disgust": "disgust",
    "fear": "fear",
    "joy": "happiness",
    "neutrality": "neutral",
    "sadness": "sadness",
    "surprise": "surprise",
}


def _emozionalmente(corpus: Corpus, root: Path, _: Note) -> list[Labelled]:
    """Read who meant to express what in Emozionalmente.

    ``metadata/samples.csv`` has the columns file_name, actor, sentence and emotion_expressed, ``metadata/users.csv``
    username and gender; the files lie in ``audio`` (Catania and Garzotto; as audeering's import of the corpus in
    nkululeko reads it).
    """
    table = _table_below(corpus, root, "samples.csv")
    if table is None:
        return []
    users = _rows(table.with_name("users.csv"), "username", "gender")
    genders = {row.cells["username"]: _GENDERS.get(row.cells["gender"].lower(), "") for row in users}
    return [
        (
            Path(row.cells["file_name"]).stem,
            {
                "speaker": row.cells["actor"],
                "gender": genders.get(row.cells["actor"], ""),
                "label": _translated(
                    row.cells["emotion_expressed"], _EMOZIONALMENTE_LABELS, f"{table}: line {row.line}"
                ),
                "sentence": row.cells["sentence"],
            },
        )
        for row in _rows(table, "file_name", "actor", "sentence", "emotion_expressed")
    ]


_MOSEI_EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")

Segment = tuple[str, str]
"""A video of CMU-MOSEI and the number of a segment in it."""


def _cmu_mosei(_: Corpus, root: Path, note: Note) -> list[Labelled]:
    """Read the segments of CMU-MOSEI and the emotion that its raters see most of in each.

    ``Labels/*.csv`` hold one row an answer, with Input.VIDEO_ID, Input.CLIP, WorkerId and for each emotion an intensity
    from 0 to 3 (Answer.anger, ...); ``Transcript/Segmented/Combined/VIDEO.txt`` a line
    ``VIDEO___CLIP___START___END___words`` a segment; ``Audio/Full/WAV_16000/VIDEO.wav`` the sound of the whole video
    (the raw archive of Zadeh et al., 2018, as read by the Emotion Recognition ToolKit). The SDK's
    ``CMU_MOSEI_Labels.csd`` holds the means of the same answers.

    The label is the emotion of the greatest mean intensity; ``neutral`` where no rater sees any of the six, which an
    argmax over the intensities would call by the name of the first one. The authors tell no speakers: each video
    counts as one.
    """
    intensities = _mosei_intensities(root)
    if not intensities:
        return []
    note("the authors tell no speakers; each video counts as one")
    rows: dict[tuple[str, float, float], Labelled] = {}
    unrated = empty = 0
    for segment, start, end in _mosei_segments(root):
        if segment not in intensities:
            unrated += 1
        elif end <= start:
            empty += 1
        else:
            video, label = segment[0], _strongest(intensities[segment])
            rows[video, start, end] = (video, {"speaker": video, "label": label, "start": start, "end": end})
    if unrated or empty:
        note(f"left out: {unrated} segments that nobody rated, {empty} that end before they start")
    return list(rows.values())


def _mosei_intensities(root: Path) -> dict[Segment, dict[str, float]]:
    """Return the sum of all raters' intensities of each segment; a rater whose answer is in two tables counts once."""
    answers: dict[tuple[Segment, str], dict[str, float]] = {}
    columns = {emotion: f"Answer.{emotion}" for emotion in _MOSEI_EMOTIONS}
    for table in _below(root, "Labels/*.csv"):
        for row in _rows(table, "Input.VIDEO_ID", "Input.CLIP", "WorkerId", *columns.values()):
            # Some tables put the folder before the video.
            segment = row.cells["Input.VIDEO_ID"].rpartition("/")[2], row.cells["Input.CLIP"]
            try:
                answer = {emotion: float(row.cells[column] or 0) for emotion, column in columns.items()}
            except ValueError as error:
                raise UsageError(f"{table}: line {row.line}: an intensity is no number ({error})") from None
            answers[segment, row.cells["WorkerId"]] = answer
    sums: dict[Segment, dict[str, float]] = {}
    for (segment, _), answer in answers.items():
        total = sums.setdefault(segment, dict.fromkeys(_MOSEI_EMOTIONS, 0.0))
        for emotion, intensity in answer.items():
            total[emotion] += intensity
    return sums


def _strongest(intensities: dict[str, float]) -> str:
    greatest = max(intensities.values())
    strongest = [emotion for emotion, intensity in intensities.items() if intensity == greatest]
    if greatest == 0:
        return "neutral"
    return strongest[0] if len(strongest) == 1 else NO_AGREEMENT


def _mosei_segments(root: Path) -> Iterator[tuple[Segment, float, float]]:
    """Yield the segments with their first and last second; a few start before their video does."""
    for path in _below(root, "Transcript/Segmented/Combined/*.txt"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                video, clip, start, end, _ = line.split("___", 4)
                yield (video, clip), max(0.0, float(start)), float(end)
            except ValueError:
                raise UsageError(
                    f"{path}: line {number}: no segment; expected VIDEO___CLIP___START___END___words"
                ) from None


TABLED_CORPORA = (
    Corpus(
        name="iemocap",
        title="IEMOCAP",
        language="en",
        speakers=10,
        clips=5531,
        labels=("anger", "excitement", "happiness", "neutral", "sadness"),
        licence="research only, signed agreement",
        home="https://sail.usc.edu/iemocap",
        layout="Session1/dialog/EmoEvaluation/Ses01F_impro01.txt",
        read=by_table(_iemocap),
        left_out=("disgust", "fear", "frustration", NO_AGREEMENT, "other", "surprise"),
    ),
    Corpus(
        name="msp-podcast",
        title="MSP-Podcast",
        language="en",
        speakers=None,
        clips=None,
        labels=("anger", "contempt", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
        licence="signed academic/commercial licence",
        home="https://www.lab-msp.com/MSP/MSP-Podcast.html",
        layout="Labels/labels_consensus.csv",
        read=by_table(_msp_podcast),
        left_out=(NO_AGREEMENT, "other"),
    ),
    Corpus(
        name="emozionalmente",
        title="Emozionalmente",
        language="it",
        speakers=431,
        clips=6902,
        labels=("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
        licence="CC BY 4.0",
        home="https://zenodo.org/records/6569824",
        layout="metadata/samples.csv",
        read=by_table(_emozionalmente),
    ),
    Corpus(
        name="cmu-mosei",
        title="CMU-MOSEI",
        language="en",
        speakers=None,
        clips=None,
        labels=("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"),
        licence="that of the CMU-MultimodalSDK",
        home="https://github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK",
        layout="Raw/Labels/*.csv, Raw/Transcript/Segmented/Combined/*.txt and Raw/Audio/Full/WAV_16000/*.wav",
        read=by_table(_cmu_mosei),
        left_out=(NO_AGREEMENT,),
    ),
)
