from pathlib import Path

import numpy as np
import pytest
import soundfile

from sertool.corpora.check import check_manifest
from sertool.corpora.manifest import Clip, Manifest, RowFault


def speech_like(seed: int, seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(rate * seconds)).clip(-4, 4)


@pytest.fixture
def sound_clips(tmp_path) -> list[Clip]:
    clips = []
    for number, (speaker, gender) in enumerate([("anna", "f"), ("otto", "m")] * 2):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, speech_like(number), 16000)
        clips.append(Clip(path.name, path, speaker, ("anger", "fear")[number // 2], gender))
    return clips


def found(clips: list[Clip], **options: float) -> list[tuple[str, str]]:
    report = check_manifest(Manifest(tuple(clips), Path("manifest.csv")), **options)
    return [(finding.kind, finding.subject) for finding in report.findings]


def added(clips: list[Clip], samples: np.ndarray, rate: int = 16000, **format: str) -> list[Clip]:
    path = clips[0].path.with_name("odd.wav")
    soundfile.write(path, samples, rate, **format)
    return [*clips, Clip("odd.wav", path, "anna", "fear", "f")]


def test_a_sound_corpus_has_no_findings(sound_clips):
    report = check_manifest(Manifest(tuple(sound_clips), Path("manifest.csv")))
    assert report.findings == ()
    assert report.seconds == pytest.approx(4.0)


def test_all_findings_come_at_once(sound_clips):
    bad = [Clip(name, Path(name), "anna", "fear", "f") for name in ("gone.wav", "lost.wav")]
    assert found([bad[0], *sound_clips, bad[1]]) == [("unreadable", "gone.wav"), ("unreadable", "lost.wav")]


def test_files_that_cannot_be_decoded_are_unreadable(sound_clips, tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio")
    (tmp_path / "folder.wav").mkdir()
    nan = speech_like(9)
    nan[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 16000, subtype="FLOAT")
    names = ["empty.wav", "text.wav", "folder.wav", "nan.wav"]
    odd = [Clip(name, tmp_path / name, "anna", "fear", "f") for name in names]
    odd.append(Clip("0.wav", tmp_path / "0.wav", "anna", "fear", "f", start=5.0))
    assert found([*sound_clips, *odd]) == [("unreadable", clip.key) for clip in odd]


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "ogg"])
def test_a_file_cut_off_by_a_broken_transfer_is_truncated(sound_clips, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, speech_like(9, 3.0), 16000)
    clips = [*sound_clips, Clip(path.name, path, "anna", "fear", "f")]
    assert found(clips) == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert found(clips) == [("truncated", path.name)]


def test_a_file_written_to_a_pipe_is_not_truncated(sound_clips, tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, speech_like(9), 16000)
    header = bytearray(path.read_bytes())
    for place in (4, header.index(b"data") + 4):
        header[place : place + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(header)
    assert found([*sound_clips, Clip(path.name, path, "anna", "fear", "f")]) == []


def test_silence_is_found_and_quiet_speech_is_not(sound_clips):
    assert found(added(sound_clips, np.zeros(16000))) == [("silent", "odd.wav")]
    assert found(added(sound_clips, 0.05 * speech_like(9))) == []


def test_clipping_is_found_and_a_full_scale_peak_is_not(sound_clips):
    overdriven = (8 * speech_like(9)).clip(-1, 1 - 2**-15)
    assert found(added(sound_clips, overdriven)) == [("clipped", "odd.wav")]
    normalised = speech_like(9) / np.abs(speech_like(9)).max()
    assert found(added(sound_clips, normalised)) == []
    peaked = speech_like(9)
    peaked[500:502] = 1 - 2**-15
    assert found(added(sound_clips, peaked)) == []


def test_clipping_in_one_channel_of_a_48_khz_recording_is_found(sound_clips):
    channels = np.stack([speech_like(8, rate=48000), (8 * speech_like(9, rate=48000)).clip(-1, 1)], axis=1)
    assert found(added(sound_clips, channels, 48000)) == [("clipped", "odd.wav")]


def test_short_long_and_narrow_band_clips(sound_clips):
    assert found(added(sound_clips, speech_like(9, 0.25))) == [("too short", "odd.wav")]
    assert found(added(sound_clips, speech_like(9, 0.25)), shortest=0.2) == []
    assert found(added(sound_clips, speech_like(9, 3.0)), longest=2.0) == [("too long", "odd.wav")]
    assert found(added(sound_clips, speech_like(9, rate=8000), 8000)) == [("narrow band", "odd.wav")]


def test_a_single_sample_at_48_khz_is_reported_and_stops_nothing(sound_clips):
    assert found(added(sound_clips, np.full(1, 0.1), 48000)) != []


def test_a_long_file_may_be_cut_by_start_and_end(sound_clips, tmp_path):
    soundfile.write(tmp_path / "long.wav", speech_like(9, 3.0), 16000)
    part = Clip("long.wav", tmp_path / "long.wav", "anna", "fear", "f", start=1.0, end=2.5)
    assert found([*sound_clips, part], longest=2.0) == []


@pytest.mark.parametrize(("end", "kinds"), [(3.0, []), (3.04, []), (3.1, ["past the end"]), (9.0, ["past the end"])])
def test_a_clip_that_ends_after_its_file_is_found(sound_clips, tmp_path, end, kinds):
    soundfile.write(tmp_path / "long.wav", speech_like(9, 3.0), 16000)
    part = Clip("long.wav", tmp_path / "long.wav", "anna", "fear", "f", start=1.0, end=end)
    assert found([*sound_clips, part]) == [(kind, part.key) for kind in kinds]
    both = [("too long", part.key), *((kind, part.key) for kind in kinds)]
    assert found([*sound_clips, part], longest=1.5) == both


def test_rows_that_are_no_clip_are_listed_first(sound_clips):
    faults = [RowFault(3, "label is empty"), RowFault(3, "start 'x' is not a number")]
    bad = Clip("gone.wav", Path("gone.wav"), "anna", "fear", "f")
    manifest = Manifest((*sound_clips, bad), Path("manifest.csv"))
    findings = check_manifest(manifest, faults=faults).findings
    assert [(one.kind, one.subject) for one in findings] == [
        ("row", "line 3"),
        ("row", "line 3"),
        ("unreadable", "gone.wav"),
    ]


def test_a_table_without_one_sound_row_is_checked_too():
    report = check_manifest(Manifest((), Path("manifest.csv")), faults=[RowFault(2, "label is empty")])
    assert [(one.kind, one.detail) for one in report.findings] == [("row", "label is empty")]


def test_a_single_label_is_found(sound_clips):
    assert found(sound_clips[:2]) == [("one label", "anger")]


def test_the_same_audio_in_another_format_under_another_label_is_a_duplicate(sound_clips, tmp_path):
    samples, rate = soundfile.read(sound_clips[0].path)
    soundfile.write(tmp_path / "copy.flac", samples, rate)
    clips = [*sound_clips, Clip("copy.flac", tmp_path / "copy.flac", "otto", "fear", "m")]
    (finding,) = check_manifest(Manifest(tuple(clips), Path("manifest.csv"))).findings
    assert (finding.kind, finding.subject) == ("duplicate", "copy.flac")
    assert finding.detail == (
        "the same audio as 0.wav; speaker 'anna' there, 'otto' here; label 'anger' there, 'fear' here"
    )


def relabelled(clips: list[Clip], **columns: str) -> list[Clip]:
    from dataclasses import replace

    return [replace(clips[0], **columns), *clips[1:]]


def test_names_that_look_alike_are_found(sound_clips):
    assert found(relabelled(sound_clips, label="Anger ")) == [
        ("spelling", "Anger "),
        ("one speaker", "Anger "),
        ("one speaker", "anger"),
    ]
    assert ("spelling", "Anna") in found(relabelled(sound_clips, speaker="Anna"))
    assert ("spelling", "Very_Angry") in found(
        [*relabelled(sound_clips, label="very angry")[:1], *relabelled(sound_clips[::-1], label="Very_Angry")]
    )
    numbered = [
        Clip(clip.file, clip.path, speaker, clip.label, clip.gender)
        for clip, speaker in zip(sound_clips, ("01", "2", "1", "10"), strict=True)
    ]
    assert [one for one in found(numbered) if one[0] == "spelling"] == [("spelling", "01")]


def test_a_speaker_has_one_gender(sound_clips):
    assert found(relabelled(sound_clips, gender="m")) == [("gender", "anna")]
    assert found(relabelled(sound_clips, gender="")) == [("gender", "anna")]
    assert found(relabelled(sound_clips, gender="female")) == [("gender", "anna")]


def test_a_single_speaker_is_found(sound_clips):
    assert found(sound_clips[::2]) == [("one speaker", "anna")]
    assert found(relabelled(sound_clips, label="guilt")) == [
        ("one speaker", "anger"),
        ("one speaker", "guilt"),
    ]
