"""Published corpora: what they are, and manifests from the names of their files.

Every adapter reads what the authors encoded in the file names and nothing else, so it works on the original
download and on a converted copy alike. Labels are the same English words in every corpus.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edge_runtime.errors import UsageError, nearest
from sertool.corpora.manifest import Clip

# What libsndfile decodes, by the suffixes in use.
AUDIO_SUFFIXES = frozenset(
    {".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav"}
)


@dataclass(frozen=True)
class Corpus:
    """A published corpus.

    Attributes:
        name: how the command line calls it.
        title: how its authors call it.
        language: ISO 639-1 code.
        speakers: how many speak in the complete corpus.
        clips: how many clips the complete corpus has, those with a label in ``left_out`` not counted.
        labels: the emotions, sorted.
        licence: what its authors allow, in a few words.
        home: where to get it.
        layout: an example of a path inside it, for messages.
        pattern: what the end of a path without suffix looks like; case is ignored.
        describe: from a match to the clip's ``speaker``, ``label`` and, where the name tells, ``gender`` and
            ``sentence``.
        left_out: labels that publications on this corpus do not use.
    """

    name: str
    title: str
    language: str
    speakers: int
    clips: int
    labels: tuple[str, ...]
    licence: str
    home: str
    layout: str
    pattern: str
    describe: Callable[[re.Match[str]], dict[str, str]]
    left_out: tuple[str, ...] = ()


def corpus_named(name: str) -> Corpus:
    """Return the description of a published corpus.

    Raises:
        UsageError: no adapter has this name.

    Example:
        >>> corpus_named("emodb").speakers
        10
    """
    if name not in CORPORA:
        raise UsageError(f"corpus {name!r} is not known; {nearest(name, CORPORA)}")
    return CORPORA[name]


def corpus_clips(corpus: Corpus, root: str | Path) -> list[Clip]:
    """List the clips of a corpus below a folder, labels that publications leave out included.

    Args:
        corpus: which corpus.
        root: a folder that holds it at any depth.

    Returns:
        The clips in the order of their paths; files with other names are passed over.

    Raises:
        UsageError: the folder is missing or holds no file of this corpus, or holds a clip twice.
    """
    root = Path(root)
    matches: dict[str, tuple[Path, re.Match[str]]] = {}
    for path in audio_files(root):
        match = re.search(f"(?:^|/)({corpus.pattern})$", path.with_suffix("").as_posix(), re.IGNORECASE)
        if match is None:
            continue
        name = match[1].lower()
        if name in matches:
            raise UsageError(
                f"{root}: holds a clip twice, {matches[name][0]} and {path}; give one copy of {corpus.title} as --root"
            )
        matches[name] = (path, match)
    if not matches:
        raise UsageError(f"{root}: no {corpus.title} file here; expected names like {corpus.layout}")
    clips = [_clip(corpus, path, match) for path, match in matches.values()]
    return _with_one_gender_each(clips)


def _clip(corpus: Corpus, path: Path, match: re.Match[str]) -> Clip:
    told = corpus.describe(match)
    return Clip(
        str(path),
        path,
        told["speaker"],
        told["label"],
        told.get("gender", ""),
        corpus.language,
        told.get("sentence", ""),
    )


def audio_files(root: Path) -> Iterator[Path]:
    """Walk a folder's audio files, absolute and sorted; hidden files are no audio.

    Raises:
        UsageError: there is no such folder, or a path in it is not UTF-8 and no manifest could name it.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    # The folder is resolved, its files are not: a link's own name tells the label, its target's may not.
    for path in sorted(root.resolve().rglob("*")):
        if path.suffix.lower() not in AUDIO_SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise UsageError(f"{root}: the path {str(path)!r} is not UTF-8; rename it")
        yield path


def _with_one_gender_each(clips: list[Clip]) -> list[Clip]:
    # Five file names of ASED v1 carry the wrong gender: the speaker's other clips outvote them.
    votes: dict[str, Counter[str]] = {}
    for clip in clips:
        votes.setdefault(clip.speaker, Counter())[clip.gender] += 1
    return [replace(clip, gender=votes[clip.speaker].most_common(1)[0][0]) for clip in clips]


def relabelled(clips: list[Clip], rename: Mapping[str, str], drop: Collection[str]) -> list[Clip]:
    """Rename labels, then leave out the clips of others.

    Raises:
        UsageError: a label to rename or to drop that no clip has, or no clip is left.

    Example:
        >>> clips = [Clip("a.wav", Path("a.wav"), "01", "calm"), Clip("b.wav", Path("b.wav"), "01", "fear")]
        >>> [clip.label for clip in relabelled(clips, {"calm": "neutral"}, ["fear"])]
        ['neutral']
    """
    for label in rename:
        _refuse_unknown(label, clips)
    renamed = [replace(clip, label=rename.get(clip.label, clip.label)) for clip in clips]
    for label in drop:
        _refuse_unknown(label, renamed)
    kept = [clip for clip in renamed if clip.label not in drop]
    if not kept:
        raise UsageError("every label is dropped, no clip is left")
    return kept


def _refuse_unknown(label: str, clips: list[Clip]) -> None:
    labels = {clip.label for clip in clips}
    if label not in labels:
        raise UsageError(f"no clip has the label {label!r}; {nearest(label, labels)}")


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

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
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
            pattern=r"03-01-(?P<label>0[1-8])-0[12]-(?P<sentence>0[12])-0[12]-(?P<speaker>\d\d)",
            describe=_ravdess,
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
            pattern=r"(?P<label>dis|gio|neu|pau|rab|sor|tri)-(?P<speaker>[fm]\d)-(?P<sentence>[bdln]\d)",
            describe=_emovo,
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
            pattern=r"(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<label>[WLEAFTN])[a-z]?",
            describe=_emodb,
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
            pattern=(
                r"(?:(?:NP|PR)_)?(?P<gender>[fm])_(?P<speaker>\d\d)_"
                r"(?P<label>col|dis|gio|neu|pau|rab|sor|tri)\d\d[a-z]?"
            ),
            describe=_demos,
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
            pattern=r"(?P<speaker>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<label>ANG|DIS|FEA|HAP|NEU|SAD)_[A-Z]+",
            describe=_crema_d,
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
            pattern=r"(?P<speaker>DC|JE|JK|KL)[/_](?P<label>sa|su|[adfhn])\d\d",
            describe=_savee,
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
            pattern=(
                r"(?P<age>[OY])AF?_(?P<word>[a-z]+)_"
                r"(?P<label>angry|disgust|fear|happy|neutral|sad|ps|pleasant_surprised?)"
            ),
            describe=_tess,
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
            pattern=(
                r"(?P<speaker>[A-Z]{2}\d)_(?P<label>anger|fear|happiness|neutral|sadness|surprised)_(?P<sentence>\d+)"
            ),
            describe=_nemo,
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
            pattern=r"(?P<label>n1|f2|h3|s4|a5)-\d\d-\d\d-(?P<gender>0[12])-(?P<speaker>\d\d)",
            describe=_ased,
        ),
    )
}
