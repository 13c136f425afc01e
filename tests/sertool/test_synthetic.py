import hashlib
import importlib.util
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile

from edge_runtime.errors import MissingDependencyError, UsageError
from edge_runtime.frontend import log_mel
from sertool.corpora.check import check_manifest
from sertool.corpora.manifest import Manifest
from sertool.corpora.synthetic import PROSODY, SENTENCES, synthesise

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader is not installed"
)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Manifest:
    clips = synthesise(tmp_path_factory.mktemp("synthetic"), "en", speakers=8, sentences=3)
    return Manifest(tuple(clips), Path("synthetic.csv"))


def digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.flac")}


@needs_espeak
def test_two_runs_give_the_same_bytes_and_a_larger_one_contains_them(tmp_path):
    for name, speakers, sentences in (("a", 2, 1), ("b", 2, 1), ("c", 3, 2)):
        list(synthesise(tmp_path / name, "it", speakers, sentences))
    assert len(digests(tmp_path / "a")) == 2 * len(PROSODY)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a").items() <= digests(tmp_path / "c").items()


@needs_espeak
def test_everyone_says_everything_in_every_emotion(spoken):
    assert len(spoken) == 8 * 3 * len(PROSODY)
    assert len({(clip.speaker, clip.sentence, clip.label) for clip in spoken.clips}) == len(spoken)
    assert sorted(spoken.genders.values()) == ["f"] * 4 + ["m"] * 4
    assert {clip.language for clip in spoken.clips} == {"en"}


@needs_espeak
def test_the_clips_pass_the_corpus_check_and_are_16_khz_mono(spoken):
    assert check_manifest(spoken).findings == ()
    for clip in spoken.clips[::10]:
        info = soundfile.info(clip.path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")


@needs_espeak
def test_languages_have_different_speakers(spoken, tmp_path):
    english = {speaker.removeprefix("en-") for speaker in spoken.speakers}
    german = {clip.speaker.removeprefix("de-") for clip in synthesise(tmp_path / "de", "de", 2, 1)}
    assert not english & german


@needs_espeak
def test_prosody_follows_the_emotion(spoken):
    def mean(measure, label):
        return np.mean([measure(clip.read()) for clip in spoken.clips if clip.label == label])

    def pitch(samples):
        return np.median(librosa.yin(samples, fmin=60, fmax=500, sr=16000, hop_length=1024))

    def level(samples):
        return 10 * np.log10(np.mean(samples**2))

    assert mean(len, "sadness") > mean(len, "neutral") > mean(len, "fear")
    assert mean(pitch, "happiness") > mean(pitch, "neutral") > mean(pitch, "sadness")
    assert mean(level, "anger") > mean(level, "neutral") + 3
    assert mean(level, "sadness") < mean(level, "neutral") - 3


@needs_espeak
def test_emotions_can_be_learnt_but_not_perfectly_on_unseen_speakers(spoken):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(samples):
        frames = log_mel(samples)
        return np.concatenate([frames.mean(axis=0), frames.std(axis=0)])

    labels = [clip.label for clip in spoken.clips]
    speakers = [clip.speaker for clip in spoken.clips]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    data = np.stack([features(clip.read()) for clip in spoken.clips])
    predicted = cross_val_predict(model, data, labels, groups=speakers, cv=GroupKFold(4))
    uar = recall_score(labels, predicted, average="macro")
    assert 2 / len(PROSODY) < uar < 0.9


@pytest.mark.parametrize(
    ("language", "speakers", "sentences", "message"),
    [
        ("fr", 2, 1, "no sentences in language 'fr'; valid: de, en, it"),
        ("en", 1, 1, "1 speakers cannot be synthesised; give 2 to 24"),
        ("en", 25, 1, "25 speakers"),
        ("en", 2, 0, "0 sentences cannot be synthesised; give 1 to 10"),
        ("en", 2, 11, "11 sentences"),
    ],
)
def test_what_is_not_offered_is_refused(tmp_path, language, speakers, sentences, message):
    with pytest.raises(UsageError, match=message):
        next(synthesise(tmp_path, language, speakers, sentences))
    assert not list(tmp_path.iterdir())


def test_without_espeak_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sertool\[synthetic\]'"):
        next(synthesise(tmp_path))


def test_every_language_has_ten_different_sentences():
    assert all(len(set(sentences)) == 10 for sentences in SENTENCES.values())
