"""Files are whole or absent, and an error names the file that was meant."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from edge_runtime.errors import UsageError
from sertool.files import atomic_path, write_json, write_text


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (path.parent, path.suffix)
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_the_earlier_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "earlier")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_with_the_file_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["", "taken", "taken/..", "taken/"])
def test_a_folder_where_a_file_is_meant_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match=": is a folder; give the name of a file"):
        write_text(name, "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["taken"]


def test_folders_made_for_a_file_that_fails_are_taken_away_again(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    with pytest.raises(ValueError), atomic_path(tmp_path / "before" / "new" / "newer" / "a.txt"):
        raise ValueError
    assert list(tmp_path.rglob("*")) == [tmp_path / "before"]


def test_a_place_that_cannot_be_written_is_reported_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "file" / "a.txt", "text")
    assert caught.value.filename == str(tmp_path / "file")


def test_another_files_error_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"gioia": "è"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "gioia": "è"\n}\n' and json.loads(text) == {"gioia": "è"}
