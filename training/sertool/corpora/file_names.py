"""Corpora whose file names tell speaker and emotion.

Every adapter reads what the authors encoded in the file names and nothing else, so it works on the original download
and on a converted copy alike.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_runtime.errors import UsageError
from sertool.corpora.corpus import Corpus, Note, audio_files
from sertool.corpora.manifest import Clip


def by_file_name(
    pattern: str, describe: Callable[[re.Match[str]], dict[str, Any]]
) -> Callable[[Corpus, Path, Note], list[Clip]]:
    """Return a reader of file names, for :attr:`Corpus.read`.

    Args:
        pattern: what the end of a path without suffix looks like; case is ignored.
        describe: from a match to the clip's ``speaker``, ``label`` and, where the name tells, ``gender`` and
            ``sentence``.

    Returns:
        A function that raises UsageError where a folder holds a clip twice.
    """

    def read(corpus: Corpus, root: Path, _: Note) -> list[Clip]:
        clips: dict[str, Clip] = {}
        for path in audio_files(root):
            match = re.search(f"(?:^|/)({pattern})$", path.with_suffix("").as_posix(), re.IGNORECASE)
            if match is None:
                continue
            name = match[1].lower()
            if name in clips:
                raise UsageError(
                    f"{root}: holds a clip twice, {clips[name].path} and {path}; give one copy of {corpus.title} as "
                    "--root"
                )
            clips[name] = Clip(str(path), path, **describe(match), language=corpus.language)
        return _with_one_gender_each(list(clips.values()))

    return read


def _with_one_gender_each(clips: list[Clip]) -> list[Clip]:
    # Five file names of ASED v1 carry the wrong gender: the speaker's other clips outvote them.
    votes: dict[str, Counter[str]] = {}
    for clip in clips:
        votes.setdefault(clip.speaker, Counter())[clip.gender] += 1
    return [replace(clip, gender=votes[clip.speaker].most_common(1)[0][0]) for clip in clips]


_RAVDESS_LABELS = {
    "01": "neutral",
    "02": "calm",
    "03": "happiness",
    "04": "sadness",
    "05": "anger",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}


def _ravdess(name: re.Match[str]) -> dict[str, str]:
    return {
        "speaker": name["speaker"],
        "gender": "m" if int(name["speaker"]) % 2 else "f",
        "label": _RAVDESS_LABELS[name["label"]],
        "sentence": name["sentence"],
    }


# Both Italian corpora write the first letters of colpa, disgusto, gioia, neutro, paura, rabbia, sorpresa, tristezza.
_ITALIAN_LABELS = {
    "col": "guilt",
    "dis": "disgust",
    "gio": "happiness",
    "neu": "neutral",
    "pau": "fear",
    "rab": "anger",
    "sor": "surprise",
    "tri": "sadness",
}


def _emovo(name: re.Match[str]) -> dict[str, str]:
    speaker = name["speaker"].lower()
    return {
        "speaker": speaker,
        "gender": speaker[0],
        "label": _ITALIAN_LABELS[name["label"].lower()],
        "sentence": name["sentence"].lower(),
    }


def _demos(name: re.Match[str]) -> dict[str, str]:
    return {
        "speaker": name["speaker"],
        "gender": name["gender"].lower(),
        "label": _ITALIAN_LABELS[name["label"].lower()],
    }


_EMODB_LABELS = {
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happiness",
    "N": "neutral",
    "T": "sadness",
}
_EMODB_WOMEN = {"08", "09", "13", "14", "16"}


def _emodb(name: re.Match[str]) -> dict[str, str]:
    return {
        "speaker": name["speaker"],
        "gender": "f" if name["speaker"] in _EMODB_WOMEN else "m",
        "label": _EMODB_LABELS[name["label"].upper()],
        "sentence": name["sentence"].lower(),
    }


_CREMA_D_LABELS = {
    "ANG": "anger",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happiness",
    "NEU": "neutral",
    "SAD": "sadness",
}
# The file names do not tell the gender; the corpus' own VideoDemographics.csv does.
_CREMA_D_WOMEN = {
    *("1002", "1003", "1004", "1006", "1007", "1008", "1009", "1010", "1012", "1013", "1018", "1020", "1021"),
    *("1024", "1025", "1028", "1029", "1030", "1037", "1043", "1046", "1047", "1049", "1052", "1053", "1054"),
    *("1055", "1056", "1058", "1060", "1061", "1063", "1072", "1073", "1074", "1075", "1076", "1078", "1079"),
    *("1082", "1084", "1089", "1091"),
}


def _crema_d(name: re.Match[str]) -> dict[str, str]:
    return {
        "speaker": name["speaker"],
        "gender": "f" if name["speaker"] in _CREMA_D_WOMEN else "m",
        "label": _CREMA_D_LABELS[name["label"].upper()],
        "sentence": name["sentence"].upper(),
    }


_SAVEE_LABELS = {
    "a": "anger",
    "d": "disgust",
    "f": "fear",
    "h": "happiness",
    "n": "neutral",
    "sa": "sadness",
    "su": "surprise",
}


def _savee(name: re.Match[str]) -> dict[str, str]:
    return {"speaker": name["speaker"].upper(), "gender": "m", "label": _SAVEE_LABELS[name["label"].lower()]}


_TESS_LABELS = {
    "angry": "anger",
    "disgust": "disgust",
    "fear": "fear",
    "happy": "happiness",
    "neutral": "neutral",
    "ps": "surprise",
    "pleasant_surprise": "surprise",
    "pleasant_surprised": "surprise",
    "sad": "sadness",
}


def _tess(name: re.Match[str]) -> dict[str, str]:
    return {
        # One file of the older woman (OAF) is called OA_bite_neutral.
        "speaker": name["age"].upper() + "AF",
        "gender": "f",
        "label": _TESS_LABELS[name["label"].lower()],
        "sentence": name["word"].lower(),
    }


# The file names do not tell the gender; the corpus' own data.tsv does.
_NEMO_WOMEN = {"EB0", "IC0", "KD0", "MK0"}


def _nemo(name: re.Match[str]) -> dict[str, str]:
    speaker, label = name["speaker"].upper(), name["label"].lower()
    return {
        "speaker": speaker,
        "gender": "f" if speaker in _NEMO_WOMEN else "m",
        "label": "surprise" if label == "surprised" else label,
        "sentence": name["sentence"],
    }


_ASED_LABELS = {"n1": "neutral", "f2": "fear", "h3": "happiness", "s4": "sadness", "a5": "anger"}


def _ased(name: re.Match[str]) -> dict[str, str]:
    return {
        "speaker": name["speaker"],
        "gender": "f" if name["gender"] == "01" else "m",
        "label": _ASED_LABELS[name["label"].lower()],
    }


_BIG_SIX = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")

NAMED_CORPORA = (
    Corpus(
        name="ravdess",
        title="RAVDESS (speech)",
        language="en",
        speakers=24,
        clips=1440,
        labels=tuple(sorted((*_BIG_SIX, "calm", "neutral"))),
        licence="CC BY-NC-SA 4.0, non-commercial",
        home="https://zenodo.org/records/1188976",
        layout="Actor_01/03-01-06-01-02-01-01.wav",
        read=by_file_name(r"03-01-(?P<label>0[1-8])-0[12]-(?P<sentence>0[12])-0[12]-(?P<speaker>\d\d)", _ravdess),
    ),
    Corpus(
        name="emovo",
        title="EMOVO",
        language="it",
        speakers=6,
        clips=588,
        labels=tuple(sorted((*_BIG_SIX, "neutral"))),
        licence="none stated, research use",
        home="https://aclanthology.org/L14-1478",
        layout="f1/dis-f1-b1.wav",
        read=by_file_name(r"(?P<label>dis|gio|neu|pau|rab|sor|tri)-(?P<speaker>[fm]\d)-(?P<sentence>[bdln]\d)", _emovo),
    ),
    Corpus(
        name="emodb",
        title="EmoDB",
        language="de",
        speakers=10,
        clips=535,
        labels=("anger", "boredom", "disgust", "fear", "happiness", "neutral", "sadness"),
        licence="CC0-1.0",
        home="http://emodb.bilderbar.info",
        layout="wav/03a01Fa.wav",
        read=by_file_name(r"(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<label>[WLEAFTN])[a-z]?", _emodb),
    ),
    Corpus(
        name="demos",
        title="DEMoS",
        language="it",
        speakers=68,
        clips=9365,
        labels=tuple(sorted((*_BIG_SIX, "guilt"))),
        licence="research only, signed agreement",
        home="https://zenodo.org/records/2544829",
        layout="DEMOS/PR_f_01_rab01a.wav",
        read=by_file_name(
            r"(?:(?:NP|PR)_)?(?P<gender>[fm])_(?P<speaker>\d\d)_"
            r"(?P<label>col|dis|gio|neu|pau|rab|sor|tri)\d\d[a-z]?",
            _demos,
        ),
        left_out=("neutral",),
    ),
    Corpus(
        name="crema-d",
        title="CREMA-D",
        language="en",
        speakers=91,
        clips=7442,
        labels=("anger", "disgust", "fear", "happiness", "neutral", "sadness"),
        licence="ODbL 1.0",
        home="https://github.com/CheyneyComputerScience/CREMA-D",
        layout="AudioWAV/1001_DFA_ANG_XX.wav",
        read=by_file_name(
            r"(?P<speaker>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<label>ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]+", _crema_d
        ),
    ),
    Corpus(
        name="savee",
        title="SAVEE",
        language="en",
        speakers=4,
        clips=480,
        labels=tuple(sorted((*_BIG_SIX, "neutral"))),
        licence="research only, on registration",
        home="http://kahlan.eps.surrey.ac.uk/savee",
        layout="AudioData/DC/a01.wav or DC_a01.wav",
        read=by_file_name(r"(?P<speaker>DC|JE|JK|KL)[/_](?P<label>sa|su|[adfhn])\d\d", _savee),
    ),
    Corpus(
        name="tess",
        title="TESS",
        language="en",
        speakers=2,
        clips=2800,
        labels=tuple(sorted((*_BIG_SIX, "neutral"))),
        licence="CC BY-NC-ND 4.0, non-commercial",
        home="https://doi.org/10.5683/SP2/E8H2MF",
        layout="OAF_angry/OAF_back_angry.wav",
        read=by_file_name(
            r"(?P<age>[OY])AF?_(?P<word>[a-z]+)_"
            r"(?P<label>angry|disgust|fear|happy|neutral|sad|ps|pleasant_surprised?)",
            _tess,
        ),
    ),
    Corpus(
        name="nemo",
        title="nEMO",
        language="pl",
        speakers=9,
        clips=4481,
        labels=("anger", "fear", "happiness", "neutral", "sadness", "surprise"),
        licence="CC BY-NC-SA 4.0, non-commercial",
        home="https://github.com/amu-cai/nEMO",
        layout="samples/SM0_anger_77.wav",
        read=by_file_name(
            r"(?P<speaker>[A-Z]{2}\d)_(?P<label>anger|fear|happiness|neutral|sadness|surprised)_(?P<sentence>\d+)",
            _nemo,
        ),
    ),
    Corpus(
        name="ased",
        title="ASED v1",
        language="am",
        speakers=65,
        clips=2474,
        labels=("anger", "fear", "happiness", "neutral", "sadness"),
        licence="none stated, research use",
        home="https://github.com/Ethio2021/ASED_V1",
        layout="05Angry/a5-03-01-02-50.wav",
        read=by_file_name(r"(?P<label>n1|f2|h3|s4|a5)-\d\d-\d\d-(?P<gender>0[12])-(?P<speaker>\d\d)", _ased),
    ),
)
