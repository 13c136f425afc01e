"""Small copies of the layouts that the authors of these corpora publish."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from edge_runtime.errors import UsageError
from sertool.corpora.adapters import corpus_clips, corpus_named
from sertool.corpora.manifest import Clip, load_manifest


def audio(root: Path, *names: str, seconds: float = 0.1) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.full(round(16000 * seconds), 0.1), 16000)


def text(root: Path, name: str, *lines: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_iemocap(root: Path) -> None:
    """Two dialogues; in the second the man wears the markers."""
    text(
        *(root, "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"),
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]",
        "",
        "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]",
        "C-E2:\tNeutral;\t()",
        "A-E3:\tval 3; act 2; dom  2;\t()",
        "",
        "[10.0100 - 11.3925]\tSes01F_impro01_M000\texc\t[4.0000, 4.0000, 3.0000]",
        "[11.5000 - 12.0000]\tSes01F_impro01_M001\txxx\t[4.0000, 4.0000, 3.0000]",
    )
    text(
        *(root, "Session5/dialog/EmoEvaluation/Ses05M_script03_2b.txt"),
        "[1.0000 - 2.0000]\tSes05M_script03_2b_FXX0\tang\t[1.0, 4.0, 4.0]",
        "[3.0000 - 4.0000]\tSes05M_script03_2b_M045\thap\t[4.0, 4.0, 4.0]",
    )
    (root / "Session5/dialog/EmoEvaluation/._Ses05M_script03_2b.txt").write_bytes(b"\x00\x05\x16\x07")
    text(root, "Session1/dialog/EmoEvaluation/Categorical/Ses01F_impro01_e1_cat.txt", "Ses01F_impro01_F000 :Anger; ()")
    wav = "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_"
    audio(root, f"{wav}F000.wav", f"{wav}M000.wav", f"{wav}M001.wav", "Session1/dialog/wav/Ses01F_impro01.wav")
    wav = "Session5/sentences/wav/Ses05M_script03_2b/Ses05M_script03_2b_"
    audio(root, f"{wav}FXX0.wav", f"{wav}M045.wav")


def write_msp_podcast(root: Path) -> None:
    text(
        *(root, "Labels/labels_consensus.csv"),
        "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set",
        "MSP-PODCAST_0001_0008.wav,N,2.2,4.0,2.6,30,Male,Test1",
        "MSP-PODCAST_0002_0033.wav,H,5.6,5.8,5.2,127,Female,Train",
        "MSP-PODCAST_0002_0039.wav,X,5.0,5.0,5.0,127,Female,Train",
        "MSP-PODCAST_0003_0001.wav,A,5.9,2.5,5.1,Unknown,Unknown,Train",
        "MSP-PODCAST_0004_0001.wav,C,5.9,2.5,5.1,8,Female,Development",
        "MSP-PODCAST_0005_0001.wav,U,5.9,2.5,5.1,30,Male,Test2",
    )
    text(root, "Previous_releases_information/previous_releases_info/labels_consensus.csv", "FileName,EmoClass")
    audio(root, *(f"Audios/MSP-PODCAST_{n}.wav" for n in ("0001_0008", "0002_0033", "0002_0039", "0003_0001")))
    audio(root, *(f"Audios/MSP-PODCAST_{n}.wav" for n in ("0004_0001", "0005_0001")))


def write_emozionalmente(root: Path) -> None:
    text(
        *(root, "metadata/samples.csv"),
        "timestamp,file_name,actor,sentence,emotion_expressed,language",
        '1612872848291,1612872848291.wav,anna91,"Sì, vengo",joy,it',
        "1612872848292,1612872848292.wav,user2,Oggi piove,neutrality,it",
        "1612872848293,1612872848293.wav,user3,Oggi piove,fear,it",
    )
    text(
        *(root, "metadata/users.csv"),
        "username,age,gender,mother_tongue",
        "anna91,32,female,it",
        "user2,50,male,it",
        "user3,27,other,it",
    )
    text(root, "metadata/evaluations.csv", "file_name,evaluator,emotion_recognized", "1612872848291.wav,user2,surprise")
    audio(root, *(f"audio/161287284829{n}.wav" for n in (1, 2, 3)))


MOSEI_ANSWERS = "HITId,WorkerId,Input.VIDEO_ID,Input.CLIP,Answer.anger,Answer.disgust,Answer.fear,Answer.happiness,"
MOSEI_ANSWERS += "Answer.sadness,Answer.sentiment,Answer.surprise"


def write_cmu_mosei(root: Path) -> None:
    text(
        *(root, "Raw/Labels/Batch_2980374_batch_results.csv"),
        MOSEI_ANSWERS,
        "h1,w1,-3g5yACwYnA,13,0,0,0,2,0,1,0",
        "h1,w2,-3g5yACwYnA,13,0,0,0,0,3,-1,0",
        "h1,w3,-3g5yACwYnA,13,0,0,0,2,0,2,0",
        "h2,w1,-3g5yACwYnA,2,0,0,0,0,0,0,0",
        "h2,w2,-3g5yACwYnA,2,0,0,0,0,0,0,0",
        "h3,w1,-3g5yACwYnA,3,1,0,0,1,0,0,0",
    )
    text(
        *(root, "Raw/Labels/5000_batch_raw.csv"),
        MOSEI_ANSWERS,
        "h1,w2,-3g5yACwYnA,13,0,0,0,0,3,-1,0",  # again
        "h1,w2,-3g5yACwYnA,9,0,0,0,0,3,-1,0",
        "h9,w1,extra/81406,0,0,3,0,0,1,-2,0",
        "h9,w1,nosound,0,0,3,0,0,1,-2,0",
    )
    text(
        *(root, "Raw/Transcript/Segmented/Combined/-3g5yACwYnA.txt"),
        "-3g5yACwYnA___13___0.5___1.5___We're a huge user of _____ adhesives",
        "-3g5yACwYnA___2___-0.2___0.5___Key",
        "-3g5yACwYnA___3___1.5___1.9___is",
        "-3g5yACwYnA___4___1.9___2.0___nobody rated this",
        "-3g5yACwYnA___9___2.0___2.0___nothing",
    )
    text(root, "Raw/Transcript/Segmented/Combined/81406.txt", "81406___0___0.25___1.0___no", "")
    text(root, "Raw/Transcript/Segmented/Combined/nosound.txt", "nosound___0___0.25___1.0___no")
    audio(root, "Raw/Audio/Full/WAV_16000/-3g5yACwYnA.wav", "Raw/Audio/Full/WAV_16000/81406.wav", seconds=2.0)


WRITERS: dict[str, Callable[[Path], None]] = {
    "iemocap": write_iemocap,
    "msp-podcast": write_msp_podcast,
    "emozionalmente": write_emozionalmente,
    "cmu-mosei": write_cmu_mosei,
}


@pytest.fixture(params=WRITERS)
def name(request, tmp_path) -> str:
    """Name of a corpus; a copy lies in tmp_path/corpus."""
    WRITERS[request.param](tmp_path / "corpus")
    return request.param


def clips_of(name: str, root: Path, *fields: str) -> dict[str, Any]:
    def told(clip: Clip) -> Any:
        return tuple(getattr(clip, field) for field in fields)

    return {clip.path.stem: told(clip) for clip in corpus_clips(corpus_named(name), root)}


def test_in_iemocap_the_last_letter_of_a_turn_tells_who_speaks(tmp_path):
    write_iemocap(tmp_path)
    assert clips_of("iemocap", tmp_path, "speaker", "gender", "label") == {
        "Ses01F_impro01_F000": ("Ses01F", "f", "neutral"),
        "Ses01F_impro01_M000": ("Ses01M", "m", "excitement"),
        "Ses01F_impro01_M001": ("Ses01M", "m", "no agreement"),
        "Ses05M_script03_2b_FXX0": ("Ses05F", "f", "anger"),
        "Ses05M_script03_2b_M045": ("Ses05M", "m", "happiness"),
    }


def test_msp_podcast_keeps_its_parts_and_leaves_out_who_is_not_known(tmp_path):
    write_msp_podcast(tmp_path)
    notes: list[str] = []
    corpus_clips(corpus_named("msp-podcast"), tmp_path, notes.append)
    assert notes == ["1 clips are left out: nobody knows who speaks in them"]
    assert clips_of("msp-podcast", tmp_path, "speaker", "gender", "label", "split") == {
        "MSP-PODCAST_0001_0008": ("30", "m", "neutral", "test"),
        "MSP-PODCAST_0002_0033": ("127", "f", "happiness", "train"),
        "MSP-PODCAST_0002_0039": ("127", "f", "no agreement", "train"),
        "MSP-PODCAST_0004_0001": ("8", "f", "contempt", "validation"),
        "MSP-PODCAST_0005_0001": ("30", "m", "surprise", "test2"),
    }


def test_the_first_releases_of_msp_podcast_misspell_their_table(tmp_path):
    write_msp_podcast(tmp_path)
    (tmp_path / "Labels/labels_consensus.csv").rename(tmp_path / "Labels/labels_concensus.csv")
    assert len(clips_of("msp-podcast", tmp_path)) == 5


def test_emozionalmente_is_labelled_by_what_the_actor_meant(tmp_path):
    write_emozionalmente(tmp_path)
    assert clips_of("emozionalmente", tmp_path, "speaker", "gender", "label", "sentence", "language") == {
        "1612872848291": ("anna91", "f", "happiness", "Sì, vengo", "it"),
        "1612872848292": ("user2", "m", "neutral", "Oggi piove", "it"),
        "1612872848293": ("user3", "", "fear", "Oggi piove", "it"),
    }


def test_cmu_mosei_segments_take_the_emotion_that_the_raters_together_see_most_of(tmp_path):
    write_cmu_mosei(tmp_path)
    notes: list[str] = []
    clips = corpus_clips(corpus_named("cmu-mosei"), tmp_path, notes.append)
    assert [(clip.path.stem, clip.speaker, clip.start, clip.end, clip.label) for clip in clips] == [
        ("-3g5yACwYnA", "-3g5yACwYnA", 0.0, 0.5, "neutral"),
        ("-3g5yACwYnA", "-3g5yACwYnA", 0.5, 1.5, "happiness"),  # 2 + 2 against 3, which is listed twice
        ("-3g5yACwYnA", "-3g5yACwYnA", 1.5, 1.9, "no agreement"),
        ("81406", "81406", 0.25, 1.0, "disgust"),
    ]
    assert notes == [
        "the authors tell no speakers; each video counts as one",
        "left out: 1 segments that nobody rated, 1 that end before they start",
        "1 of 5 labels have no audio, such as nosound",
    ]
    assert [len(clip.read()) for clip in clips] == [8000, 16000, 6400, 12000]


@pytest.mark.parametrize(
    ("name", "options", "summary"),
    [
        ("iemocap", ["--rename", "excitement=happiness"], "4 clips, 4 speakers (2 f, 2 m), 3 labels: anger 1, hap"),
        ("iemocap", ["--all-labels"], "5 clips, 4 speakers (2 f, 2 m), 5 labels: anger 1, excitement 1"),
        ("msp-podcast", [], "4 clips, 3 speakers (2 f, 1 m), 4 labels"),
        ("emozionalmente", [], "3 clips, 3 speakers (1 f, 1 m), 3 labels"),
        ("cmu-mosei", [], "3 clips, 2 speakers, 3 labels: disgust 1, happiness 1, neutral 1"),
    ],
)
def test_the_command_makes_a_manifest_that_loads(sertool, tmp_path, name, options, summary):
    WRITERS[name](tmp_path / "corpus")
    manifest = tmp_path / "m.csv"
    made = sertool("corpus", "make", name, "--root", tmp_path / "corpus", "-o", manifest, *options)
    assert made.code == 0
    assert summary in made.out
    assert all(line.startswith("note: ") for line in made.err.splitlines())
    assert all(len(clip.read()) for clip in load_manifest(manifest).clips)


def test_a_converted_copy_deeper_down_reads_alike(tmp_path, name):
    original = clips_of(name, tmp_path / "corpus", "speaker", "label", "start", "end", "split")
    for wav in (tmp_path / "corpus").rglob("*.wav"):
        samples, rate = soundfile.read(wav)
        soundfile.write(wav.with_suffix(".flac"), samples, rate)
        wav.unlink()
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpus").rename(tmp_path / "corpora" / name)
    assert clips_of(name, tmp_path / "corpora", "speaker", "label", "start", "end", "split") == original


def test_what_is_not_there_is_told_apart(tmp_path, name):
    corpus, root = corpus_named(name), tmp_path / "corpus"
    with pytest.raises(UsageError, match="no such folder"):
        corpus_clips(corpus, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"no {corpus.title} file here; expected names like {corpus.layout[:6]}"):
        corpus_clips(corpus, tmp_path / "empty")
    for wav in root.rglob("*.wav"):
        wav.unlink()
    with pytest.raises(UsageError, match=rf"holds labels of {corpus.title} but not the audio, such as \S+\.wav"):
        corpus_clips(corpus, root)


def test_a_second_copy_of_the_audio_is_refused(tmp_path, name):
    root = tmp_path / "corpus"
    wav = next(iter(root.rglob("*.wav")))
    (root / "copy").mkdir()
    shutil.copy(wav, root / "copy" / wav.name)
    with pytest.raises(UsageError, match=f"an audio file twice, .*{wav.name} and .*{wav.name}"):
        corpus_clips(corpus_named(name), root)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        ("iemocap", "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "\t", " ", r"impro01\.txt: labels no turn"),
        (
            *("iemocap", "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", "\tneu", "\tnue"),
            r"Ses01F_impro01_F000: emotion 'nue' is not known; did you mean 'neu'",
        ),
        ("msp-podcast", "Labels/labels_consensus.csv", "SpkrID", "Speaker", r"no column .SpkrID.; did you mean"),
        ("msp-podcast", "Labels/labels_consensus.csv", ",N,", ",Q,", r"line 2: emotion 'Q' is not known; valid: A"),
        ("msp-podcast", "Labels/labels_consensus.csv", ",Female,Train", "", r"line 3: no Gender"),
        ("emozionalmente", "metadata/samples.csv", '"Sì, vengo"', "Sì, vengo", r"line 2: 7 cells for 6 columns"),
        ("emozionalmente", "metadata/samples.csv", "joy", "gioia", r"line 2: emotion 'gioia' is not known"),
        ("emozionalmente", "metadata/users.csv", "username", "user", r"users\.csv: no column 'username'"),
        ("cmu-mosei", "Raw/Labels/5000_batch_raw.csv", "9,0,0", "9,x,0", r"line 3: an intensity is no number .*'x'"),
        ("cmu-mosei", "Raw/Labels/5000_batch_raw.csv", "WorkerId", "Worker", r"no column 'WorkerId'"),
        (
            *("cmu-mosei", "Raw/Transcript/Segmented/Combined/81406.txt", "___", "; "),
            r"81406\.txt: line 1: no segment; expected VIDEO___CLIP___START___END___words",
        ),
    ],
)
def test_a_damaged_table_is_one_line(sertool, tmp_path, name, file, old, new, message):
    root = tmp_path / "corpus"
    WRITERS[name](root)
    content = (root / file).read_text(encoding="utf-8")
    (root / file).write_text(content.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        corpus_clips(corpus_named(name), root)
    refused = sertool("corpus", "make", name, "--root", root, "-o", tmp_path / "m.csv")
    assert (refused.code, refused.out, refused.err.splitlines()[-1].startswith("sertool: ")) == (2, "", True)
    assert not (tmp_path / "m.csv").exists()


def test_two_tables_side_by_side_are_refused(tmp_path):
    write_msp_podcast(tmp_path)
    shutil.copytree(tmp_path / "Labels", tmp_path / "Labels 1.11")
    with pytest.raises(UsageError, match="holds two label tables"):
        corpus_clips(corpus_named("msp-podcast"), tmp_path)
