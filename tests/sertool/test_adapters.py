import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from sertool.corpora.adapters import CORPORA, corpus_clips, corpus_named, relabelled
from sertool.corpora.file_names import NAMED_CORPORA
from sertool.corpora.manifest import Clip


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# name, file as its authors publish it, and what their documentation says about that file
DOCUMENTED = [
    ("ravdess", "Actor_12/03-01-06-01-02-01-12.wav", "12", "f", "fear", "02"),
    ("ravdess", "Actor_01/03-01-08-02-01-02-01.wav", "01", "m", "surprise", "01"),
    ("emovo", "f2/rab-f2-b1.wav", "f2", "f", "anger", "b1"),
    ("emovo", "m3/gio-m3-n4.wav", "m3", "m", "happiness", "n4"),
    ("emodb", "wav/03a01Fa.wav", "03", "m", "happiness", "a01"),
    ("emodb", "wav/16b10Wb.wav", "16", "f", "anger", "b10"),
    ("emodb", "wav/08a02La.wav", "08", "f", "boredom", "a02"),
    ("demos", "DEMOS/PR_f_01_rab01a.wav", "01", "f", "anger", ""),
    ("demos", "DEMOS/NP_m_19_col09b.wav", "19", "m", "guilt", ""),
    ("demos", "NEU/m_18_neu00a.wav", "18", "m", "neutral", ""),
    ("demos", "f_44_tri04b.wav", "44", "f", "sadness", ""),
    ("crema-d", "AudioWAV/1001_DFA_ANG_XX.wav", "1001", "m", "anger", "DFA"),
    ("crema-d", "AudioWAV/1002_IEO_SAD_HI.wav", "1002", "f", "sadness", "IEO"),
    ("savee", "AudioData/DC/sa01.wav", "DC", "m", "sadness", ""),
    ("savee", "ALL/KL_n30.wav", "KL", "m", "neutral", ""),
    ("savee", "ALL/JE_a05.wav", "JE", "m", "anger", ""),
    ("tess", "OAF_angry/OAF_back_angry.wav", "OAF", "f", "anger", "back"),
    ("tess", "YAF_pleasant_surprised/YAF_dog_ps.wav", "YAF", "f", "surprise", "dog"),
    ("tess", "OAF_neutral/OA_bite_neutral.wav", "OAF", "f", "neutral", "bite"),
    ("nemo", "samples/WR0_surprised_64.wav", "WR0", "m", "surprise", "64"),
    ("nemo", "samples/EB0_neutral_13.wav", "EB0", "f", "neutral", "13"),
    ("ased", "05Angry/a5-03-01-02-50.wav", "50", "m", "anger", ""),
    ("ased", "02Fearful/f2-01-01-01-21.wav", "21", "f", "fear", ""),
]


@pytest.mark.parametrize(("name", "file", "speaker", "gender", "label", "sentence"), DOCUMENTED)
def test_a_published_name_is_read_as_documented(tmp_path, name, file, speaker, gender, label, sentence):
    (clip,) = corpus_clips(corpus_named(name), touched(tmp_path, file))
    assert (clip.speaker, clip.gender, clip.label, clip.sentence) == (speaker, gender, label, sentence)
    assert clip.language == CORPORA[name].language
    assert Path(clip.file) == tmp_path.resolve() / file


@pytest.mark.parametrize(("name", "file"), [row[:2] for row in DOCUMENTED])
def test_a_converted_copy_reads_alike(tmp_path, name, file):
    original = corpus_clips(corpus_named(name), touched(tmp_path / "a", file))
    copy = corpus_clips(corpus_named(name), touched(tmp_path / "b", str(Path(file).with_suffix(".FLAC"))))
    assert [(c.speaker, c.label) for c in copy] == [(c.speaker, c.label) for c in original]


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=lambda corpus: corpus.name)
def test_a_description_is_complete(corpus):
    assert list(corpus.labels) == sorted(set(corpus.labels))
    assert not set(corpus.labels) & set(corpus.left_out)
    assert all((corpus.title, corpus.licence, corpus.home, corpus.language))


@pytest.mark.parametrize("corpus", NAMED_CORPORA, ids=lambda corpus: corpus.name)
def test_the_example_of_a_description_matches(tmp_path, corpus):
    assert len(corpus_clips(corpus, touched(tmp_path, corpus.layout.split(" or ")[0]))) == 1


def test_crema_d_has_43_women_and_48_men(tmp_path):
    files = [f"{actor}_DFA_ANG_XX.wav" for actor in range(1001, 1092)]
    clips = corpus_clips(corpus_named("crema-d"), touched(tmp_path, *files))
    assert Counter(clip.gender for clip in clips) == {"f": 43, "m": 48}


def test_songs_videos_notes_and_hidden_files_are_passed_over(tmp_path):
    touched(tmp_path, "Actor_01/03-01-05-01-01-01-01.wav", "Actor_01/03-02-05-01-01-01-01.wav")
    touched(tmp_path, "Actor_01/02-01-05-01-01-01-01.mp4", "Actor_01/._03-01-05-01-01-01-01.wav", "readme.txt")
    assert [Path(clip.file).name for clip in corpus_clips(corpus_named("ravdess"), tmp_path)] == [
        "03-01-05-01-01-01-01.wav"
    ]


def test_a_speaker_keeps_one_gender_where_a_file_name_is_misprinted(tmp_path):
    touched(tmp_path, "a5-01-01-01-09.wav", "a5-02-01-01-09.wav", "a5-03-01-02-09.wav")
    assert {clip.gender for clip in corpus_clips(corpus_named("ased"), tmp_path)} == {"f"}


def test_links_into_a_data_store_keep_their_names(tmp_path):
    touched(tmp_path, "store/0a1b2c")
    (tmp_path / "emodb").mkdir()
    (tmp_path / "emodb" / "03a01Fa.wav").symlink_to(tmp_path / "store" / "0a1b2c")
    (clip,) = corpus_clips(corpus_named("emodb"), tmp_path / "emodb")
    assert Path(clip.file).name == "03a01Fa.wav"


def test_the_root_may_be_a_speaker_s_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(touched(tmp_path, "DC/a01.wav") / "DC")
    assert [clip.speaker for clip in corpus_clips(corpus_named("savee"), ".")] == ["DC"]


def test_a_second_copy_below_the_root_is_refused(tmp_path):
    touched(tmp_path, "wav/03a01Fa.wav", "copy/wav/03a01Fa.flac")
    with pytest.raises(UsageError, match=r"holds a clip twice, .*03a01Fa.* and .*give one copy of EmoDB"):
        corpus_clips(corpus_named("emodb"), tmp_path)


def test_savee_speakers_may_share_base_names(tmp_path):
    touched(tmp_path, "DC/a01.wav", "KL/a01.wav")
    assert [clip.speaker for clip in corpus_clips(corpus_named("savee"), tmp_path)] == ["DC", "KL"]


def test_a_folder_without_the_corpus_is_refused_with_the_expected_layout(tmp_path):
    with pytest.raises(UsageError, match=r"no EMOVO file here; expected names like f1/dis-f1-b1\.wav"):
        corpus_clips(corpus_named("emovo"), touched(tmp_path, "03a01Fa.wav"))
    with pytest.raises(UsageError, match="no such folder"):
        corpus_clips(corpus_named("emovo"), tmp_path / "absent")


def test_a_path_that_is_not_utf_8_is_refused(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    touched(tmp_path, os.fsdecode(b"caf\xe9/03a01Fa.wav"))
    with pytest.raises(UsageError, match="is not UTF-8; rename it"):
        corpus_clips(corpus_named("emodb"), tmp_path)


def test_an_unknown_corpus_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'ravdess'"):
        corpus_named("radvess")


def test_relabelling_renames_before_it_drops():
    clips = [Clip(f, Path(f), "01", label) for f, label in (("a", "calm"), ("b", "neutral"), ("c", "fear"))]
    kept = relabelled(clips, {"calm": "neutral"}, ["neutral"])
    assert [(clip.file, clip.label) for clip in kept] == [("c", "fear")]
    with pytest.raises(UsageError, match="no clip has the label 'clam'; did you mean 'calm'"):
        relabelled(clips, {"clam": "neutral"}, [])
    with pytest.raises(UsageError, match="no clip is left"):
        relabelled(clips, {}, ["calm", "neutral", "fear"])


@pytest.mark.corpora
@pytest.mark.skipif("SERTOOL_DATA" not in os.environ, reason="SERTOOL_DATA is not set")
@pytest.mark.parametrize("name", ["ravdess", "emovo", "emodb"])
def test_the_real_corpora_agree_with_an_independent_table(name):
    root = Path(os.environ["SERTOOL_DATA"]) / "corpora" / name
    clips = corpus_clips(corpus_named(name), root)
    with (root / "metadata.csv").open(newline="") as file:
        table = {str((root / row["file"]).resolve()): row for row in csv.DictReader(file)}
    assert {clip.file for clip in clips} == set(table)
    for clip in clips:
        row = table[clip.file]
        assert (clip.speaker, clip.gender, clip.label, clip.language) == (
            row["speaker"],
            row["gender"],
            row["emotion"],
            row["language"],
        )
    corpus = CORPORA[name]
    assert len(clips) == corpus.clips
    assert len({clip.speaker for clip in clips}) == corpus.speakers
    assert {clip.label for clip in clips} == set(corpus.labels)
