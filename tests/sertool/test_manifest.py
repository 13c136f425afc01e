import csv
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from edge_runtime.errors import AudioError, UsageError
from sertool.corpora.manifest import Clip, Manifest, load_manifest, read_manifest

HEADER = "file,speaker,label"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_least_table_gives_clips_with_unknown_extras(tmp_path):
    manifest = load_manifest(written(tmp_path, HEADER, "a.wav,01,anger", "b.wav,02,fear"))
    assert [(clip.speaker, clip.label) for clip in manifest.clips] == [("01", "anger"), ("02", "fear")]
    assert manifest.clips[0].path == tmp_path / "a.wav"
    assert manifest.clips[0].key == "a.wav"
    assert (manifest.clips[0].gender, manifest.clips[0].start, manifest.clips[0].end) == ("", None, None)
    assert manifest.labels == ["anger", "fear"]
    assert manifest.speakers == ["01", "02"]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    clips = (
        Clip("ä, b.wav", tmp_path / "ä, b.wav", "01", "anger", "f", "de", 's "1"', 0.5, 2.25, "train"),
        Clip("c.wav", tmp_path / "c.wav", "02", "fear"),
    )
    path = tmp_path / "manifest.csv"
    Manifest(clips, path).save(path)
    assert load_manifest(path).clips == clips


def test_columns_that_nobody_filled_in_are_not_written(tmp_path):
    path = tmp_path / "manifest.csv"
    Manifest((Clip("a.wav", tmp_path / "a.wav", "01", "anger", gender="f"),), path).save(path)
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == ["file", "speaker", "label", "gender"]


def test_a_spreadsheet_with_byte_order_mark_and_spaces_is_read(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_bytes("\ufefffile,speaker,label\r\n a.wav , 01 , anger \r\n".encode())
    assert load_manifest(path).clips[0].speaker == "01"


def test_a_clip_is_the_stretch_that_its_row_names(tmp_path):
    samples = np.linspace(-0.5, 0.5, 32000, dtype=np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16000, subtype="FLOAT")
    manifest = load_manifest(
        written(tmp_path, f"{HEADER},start,end", "long.wav,01,anger,0.5,1.5", "long.wav,01,fear,1.5,")
    )
    np.testing.assert_array_equal(manifest.clips[0].read(), samples[8000:24000])
    np.testing.assert_array_equal(manifest.clips[1].read(), samples[24000:])
    assert manifest.clips[0].key != manifest.clips[1].key


def test_indices_do_not_depend_on_the_order_of_the_rows(tmp_path):
    lines = [f"{name}.wav,{speaker},anger" for name, speaker in zip("dbca", "1121", strict=True)]
    one = load_manifest(written(tmp_path, HEADER, *lines))
    other = load_manifest(written(tmp_path, HEADER, *reversed(lines)))
    assert [one.clips[row].key for row in one.indices(["1"])] == ["a.wav", "b.wav", "d.wav"]
    assert [other.clips[row].key for row in other.indices(["1"])] == ["a.wav", "b.wav", "d.wav"]


def test_an_unknown_speaker_is_refused_with_the_nearest(tmp_path):
    manifest = load_manifest(written(tmp_path, HEADER, "a.wav,anna,anger", "b.wav,otto,anger"))
    with pytest.raises(UsageError, match=r"no clip of speaker 'ana'; did you mean 'anna'\?"):
        manifest.indices(["otto", "ana"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,speaker", "a.wav,01"], "no column 'label'"),
        ([HEADER], "lists no clip"),
        ([HEADER, "a.wav,,anger"], "line 2: speaker is empty"),
        ([HEADER, "a.wav,01,anger", "b.wav,01"], "line 3: label is empty"),
        ([HEADER, "a.wav,01,anger", "a.wav,02,fear"], "line 3: clip 'a.wav' stands in line 2 already"),
        ([HEADER + ",start", "a.wav,01,anger,soon"], "start 'soon' is not a number of seconds"),
        ([HEADER + ",end", "a.wav,01,anger,nan"], "end 'nan' is not a time"),
        ([HEADER + ",start", "a.wav,01,anger,-1"], "start '-1' is not a time"),
        ([HEADER, "a.wav,01,anger", "b,c.wav,02,fear"], "line 3: 4 cells for 3 columns; .* ',' in quotation marks"),
        ([HEADER, "", "a.wav,01,anger", "", "b.wav,,fear"], "line 5: speaker is empty$"),
        ([HEADER, "a.wav,,anger", "b.wav,,"], "line 2: speaker is empty .and 2 more; list all: sertool corpus check"),
    ],
)
def test_a_bad_table_is_refused_by_line_and_column(tmp_path, lines, message):
    with pytest.raises(UsageError, match=message):
        load_manifest(written(tmp_path, *lines))


def test_files_that_are_no_table_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such manifest"):
        load_manifest(tmp_path / "absent.csv")
    binary = tmp_path / "noise.csv"
    binary.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UsageError, match="not a CSV table"):
        load_manifest(binary)
    empty = tmp_path / "empty.csv"
    empty.touch()
    with pytest.raises(UsageError, match=r"empty\.csv: the file is empty"):
        load_manifest(empty)
    empty.write_text("\ufeff\n \n")
    with pytest.raises(UsageError, match=r"empty\.csv: the file is empty"):
        load_manifest(empty)
    with pytest.raises(UsageError, match="is a folder"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_with_the_remedy(tmp_path, encoding):
    path = tmp_path / "manifest.csv"
    path.write_text(f"{HEADER}\na.wav,01,fröhlich\n", encoding=encoding)
    with pytest.raises(UsageError, match=r"save it as CSV UTF-8$"):
        load_manifest(path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_tables_from_spreadsheets_are_read_whatever_separates_their_cells(tmp_path, delimiter):
    rows = [["file", "speaker", "label", "start"], ["a,b.wav", "01", "anger", "0.5"], ["", "", "", ""]]
    manifest = load_manifest(written(tmp_path, *map(delimiter.join, rows)))
    assert [(clip.file, clip.speaker, clip.label, clip.start) for clip in manifest.clips] == [
        ("a,b.wav", "01", "anger", 0.5)
    ]


def test_spaces_in_the_header_and_empty_cells_at_the_end_do_no_harm(tmp_path):
    assert load_manifest(written(tmp_path, "file, speaker, label", "a.wav,01,anger,,")).speakers == ["01"]


def test_reading_for_a_check_gives_the_sound_rows_and_every_fault_of_the_others(tmp_path):
    path = written(
        tmp_path,
        f"{HEADER},start,end",
        "a.wav,01,anger,,",
        "b.wav,,,,",
        "a.wav,02,fear,,",
        'c.wav,02,fear,"0,5",-1',
        "d,e.wav,02,fear,,,7",
        "f.wav,02,fear,0.5,1",
    )
    manifest, faults = read_manifest(path)
    assert [clip.key for clip in manifest.clips] == ["a.wav", "f.wav#0.5-1"]
    assert [(fault.line, fault.detail.split(";")[0]) for fault in faults] == [
        (3, "speaker is empty"),
        (3, "label is empty"),
        (4, "clip 'a.wav' stands in line 2 already"),
        (5, "start '0,5' is not a number of seconds, such as 0.5"),
        (5, "end '-1' is not a time in the file"),
        (6, "7 cells for 5 columns"),
    ]


def test_a_clip_beside_the_user_but_not_beside_the_manifest_is_told_apart(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    clip = load_manifest(written(tmp_path / "lists", HEADER, "a.wav,01,anger")).clips[0]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioError, match=r"lists/a\.wav: no such audio file$"):
        clip.read()
    soundfile.write(tmp_path / "a.wav", np.full(800, 0.1), 16000)
    with pytest.raises(AudioError, match=r"'a\.wav' lies in the current folder, but .* beside the manifest"):
        clip.read()


def test_a_million_rows_would_take_less_than_two_gigabytes(tmp_path):
    rows = 10_000
    path = tmp_path / "large.csv"
    with path.open("w", encoding="utf-8") as file:
        file.write("file,speaker,label,gender,language,sentence,start,end,split\n")
        for row in range(rows):
            file.write(
                f"audio/session{row % 50:02d}/speaker{row % 97:05d}/recording{row:07d}.wav,speaker{row % 97:05d},"
                f"{'joy' if row % 2 else 'fear'},f,en,sentence number {row % 997},{row % 20},{row % 20 + 3.25},train\n"
            )
    tracemalloc.start()
    try:
        manifest = load_manifest(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(manifest) == rows
    assert peak / rows < 1500  # 2 GB a million rows leave 500 MB for Python and all else
