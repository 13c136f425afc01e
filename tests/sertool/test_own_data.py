from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from sertool.corpora.own_data import folder_clips, table_clips


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_folders_name_speaker_and_label(tmp_path):
    touched(tmp_path, "anna/anger/1.wav", "otto/fear/1.ogg", "anna/notes.txt")
    clips = folder_clips(tmp_path, language="de")
    assert [(c.speaker, c.label, c.language) for c in clips] == [
        ("anna", "anger", "de"),
        ("otto", "fear", "de"),
    ]


def test_patterns_find_speaker_and_label_elsewhere(tmp_path):
    touched(tmp_path, "anger/anna_1.wav", "fear/otto_2.wav")
    clips = folder_clips(tmp_path, speaker_pattern=r"([^/_]+)_[^/]*$")
    assert [(c.speaker, c.label) for c in clips] == [("anna", "anger"), ("otto", "fear")]
    touched(tmp_path / "flat", "anna-joy-1.wav")
    (clip,) = folder_clips(tmp_path / "flat", r"^([^-]+)-", r"-([^-]+)-")
    assert (clip.speaker, clip.label) == ("anna", "joy")


def test_a_folder_that_does_not_tell_the_speaker_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'anger/1\.wav' tells no speaker.*--speaker-pattern"):
        folder_clips(touched(tmp_path, "anger/1.wav"))


def test_a_folder_that_does_not_tell_the_label_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'1\.wav' tells no label"):
        folder_clips(touched(tmp_path, "1.wav"))


def test_bad_patterns_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no audio file"):
        folder_clips(tmp_path)
    with pytest.raises(UsageError, match=r"--speaker-pattern '\(' is not a regular expression"):
        folder_clips(tmp_path, "(")
    with pytest.raises(UsageError, match="--label-pattern 'x' has no group"):
        folder_clips(tmp_path, "(x)", "x")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_with_other_column_names(tmp_path, delimiter):
    touched(tmp_path / "audio", "a.wav", "b.wav")
    table = tmp_path / "clips.csv"
    rows = [["path", "who", "emotion", "sex", "start"], ["a.wav", "1", "joy", "Female", "0.5"]]
    rows.append(["b.wav", "2", "joy", "", ""])
    table.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    columns = {"file": "path", "speaker": "who", "label": "emotion", "gender": "sex"}
    first, second = table_clips(table, tmp_path / "audio", columns, "en")
    assert (first.speaker, first.label, first.gender, first.start) == ("1", "joy", "f", 0.5)
    assert Path(first.file) == tmp_path.resolve() / "audio" / "a.wav"
    assert (second.gender, second.start, second.language) == ("", None, "en")


@pytest.mark.parametrize(
    ("lines", "columns", "message"),
    [
        (["file,speaker,label"], {}, "lists no clip"),
        (["file,speaker,emotion", "a.wav,1,joy"], {}, "no column 'label' for the label"),
        (["file,speaker,label", "a.wav,1,joy"], {"gender": "sex"}, "no column 'sex' for the gender"),
        (["file,speaker,label", "a.wav,,joy"], {}, "line 2: speaker is empty"),
        (["file,speaker,label,gender", "a.wav,1,joy,q"], {}, "line 2: gender 'q'"),
        (["file,speaker,label", "a.wav,1,joy", "gone.wav,1,joy"], {}, r"line 3: no file .*gone\.wav; --root"),
        (["file,speaker,label,end", "a.wav,1,joy,late"], {}, "line 2: end 'late' is not a number"),
        (["file,speaker,label,end", "a.wav,1,joy,inf"], {}, "line 2: end 'inf' is not a time"),
        (["file,speaker,label", "a.wav,1,joy", "a,b.wav,1,joy"], {}, "line 3: 4 cells for 3 columns"),
        (["file;speaker;label", "a.wav;1;joy", "a;b.wav;1;joy"], {}, "line 3: 4 cells for 3 columns; .* ';'"),
    ],
)
def test_a_bad_table_is_refused_by_line(tmp_path, lines, columns, message):
    touched(tmp_path, "a.wav")
    table = tmp_path / "clips.csv"
    table.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=message):
        table_clips(table, None, columns)


def test_a_missing_or_binary_table_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such table"):
        table_clips(tmp_path / "absent.csv")
    (tmp_path / "noise.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="not a CSV table"):
        table_clips(tmp_path / "noise.csv")
    with pytest.raises(UsageError, match="is a folder"):
        table_clips(tmp_path)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UsageError, match="the file is empty"):
        table_clips(tmp_path / "empty.csv")
    (tmp_path / "wide.csv").write_text("file,speaker,label\n", encoding="utf-16")
    with pytest.raises(UsageError, match="save it as CSV UTF-8"):
        table_clips(tmp_path / "wide.csv")
