"""The embeddings folder and ``sertool embed``: complete, resumable, tied to audio and teacher."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import soundfile
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edge_runtime.errors import AudioError, SerError, UsageError
from sertool.audio import content_hash
from sertool.cli import main
from sertool.corpora.manifest import Clip, Manifest, load_manifest
from sertool.teacher.embed import CLIPS_PER_FILE, Embeddings, embed_manifest, load_embeddings

RATE = 16000


class Moments:
    """A teacher whose vectors are worked out by hand: mean, standard deviation and length of the clip."""

    dimension = 3

    def __init__(self, identity: str = "moments", stop_after: int | None = None) -> None:
        self.name = f"teacher {identity}"
        self.identity = identity
        self.description: dict[str, Any] = {"name": self.name, "dimension": self.dimension}
        self.stop_after = stop_after
        self.heard_audio: frozenset[str] | None = None
        self.seen: list[float] = []

    def embed(self, samples: np.ndarray) -> np.ndarray:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(float(samples[0]))
        return moments(samples)


def moments(samples: np.ndarray) -> np.ndarray:
    return np.array([samples.mean(), samples.std(), len(samples)], np.float32)


def write_clip(path: Path, seed: int, samples: int = 400) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, samples)
    soundfile.write(path, noise, RATE, subtype="PCM_16")


def corpus(folder: Path, clips: int, name: str = "manifest.csv") -> Manifest:
    """A manifest of ``clips`` different clips; those that exist already are left as they are."""
    for number in range(clips):
        if not (folder / f"{number}.wav").exists():
            write_clip(folder / f"{number}.wav", number)
    rows = [f"{number}.wav,s{number % 2},anger" for number in range(clips)]
    (folder / name).write_text("\n".join(["file,speaker,label", *rows]) + "\n")
    return load_manifest(folder / name)


def expected(manifest: Manifest) -> np.ndarray:
    return np.stack([moments(clip.read()) for clip in manifest.clips])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_vectors_stand_in_the_order_of_the_manifest_and_survive_the_disk(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, CLIPS_PER_FILE + 6)
    made = embed_manifest(manifest, Moments(), tmp_path / "embeddings")
    loaded = load_embeddings(tmp_path / "embeddings")
    for embeddings in (made, loaded):
        assert embeddings.keys == tuple(clip.key for clip in manifest.clips)
        assert embeddings.vectors.dtype == np.float32
        np.testing.assert_array_equal(embeddings.vectors, expected(manifest))
        np.testing.assert_array_equal(embeddings.of(manifest), expected(manifest))
    assert made.teacher == loaded.teacher
    assert loaded.teacher["identity"] == "moments"
    assert loaded.teacher["manifest"] == "manifest.csv"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Embeddings]:
    folder = tmp_path_factory.mktemp("corpus")
    manifest = corpus(folder, 8)
    return manifest, embed_manifest(manifest, Moments(), folder / "embeddings")


@given(order=st.permutations(range(8)), count=st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_any_part_of_the_manifest_in_any_order_finds_its_vectors(
    embedded: tuple[Manifest, Embeddings], order: list[int], count: int
) -> None:
    manifest, embeddings = embedded
    part = Manifest(tuple(manifest.clips[row] for row in order[:count]), manifest.path)
    np.testing.assert_array_equal(embeddings.of(part), embeddings.vectors[order[:count]])


def test_a_corpus_that_was_moved_and_renamed_keeps_its_vectors(tmp_path: Path) -> None:
    manifest = corpus(tmp_path / "old", 4)
    embeddings = embed_manifest(manifest, Moments(), tmp_path / "embeddings")
    clips = []
    for clip in reversed(manifest.clips):
        path = tmp_path / "new" / f"renamed-{clip.file}"
        path.parent.mkdir(exist_ok=True)
        clip.path.rename(path)
        clips.append(Clip(path.name, path, clip.speaker, clip.label))
    np.testing.assert_array_equal(embeddings.of(Manifest(tuple(clips), tmp_path / "x.csv")), embeddings.vectors[::-1])


def test_audio_replaced_under_the_same_name_loses_its_vector(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, 3)
    embeddings = embed_manifest(manifest, Moments(), tmp_path / "embeddings")
    write_clip(tmp_path / "1.wav", seed=99)
    with pytest.raises(UsageError, match=r"no embedding of '1\.wav', its audio has changed; run sertool embed on"):
        embeddings.of(manifest)
    again = Moments()
    np.testing.assert_array_equal(
        embed_manifest(manifest, again, tmp_path / "embeddings").of(manifest), expected(manifest)
    )
    assert len(again.seen) == 1


def test_embeddings_of_other_clips_are_refused_by_name(tmp_path: Path) -> None:
    embeddings = embed_manifest(corpus(tmp_path / "a", 3), Moments(), tmp_path / "embeddings")
    write_clip(tmp_path / "b" / "0.wav", seed=50)
    write_clip(tmp_path / "b" / "other.wav", seed=51)
    other = Manifest((Clip("other.wav", tmp_path / "b" / "other.wav", "s", "anger"),), tmp_path / "b.csv")
    with pytest.raises(UsageError, match=r"no embedding of 'other\.wav', only of 3 other clips"):
        embeddings.of(other)
    missing = Manifest((Clip("gone.wav", tmp_path / "gone.wav", "s", "anger"),), tmp_path / "b.csv")
    with pytest.raises(AudioError, match=r"gone\.wav: no such audio file"):
        embeddings.of(missing)


def test_added_clips_alone_are_computed(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    embed_manifest(corpus(tmp_path, 5), Moments(), folder)
    teacher = Moments()
    asked: list[int] = []

    def progress(clips: Any) -> Any:
        asked.append(len(clips))
        return clips

    manifest = corpus(tmp_path, 9)
    embeddings = embed_manifest(manifest, teacher, folder, progress)
    assert asked == [4]
    assert len(teacher.seen) == 4
    np.testing.assert_array_equal(embeddings.vectors, expected(manifest))
    untouched = Moments()
    embed_manifest(manifest, untouched, folder)
    assert untouched.seen == []


def test_copies_of_a_file_are_computed_once(tmp_path: Path) -> None:
    corpus(tmp_path, 3)
    shutil.copy(tmp_path / "0.wav", tmp_path / "3.wav")
    manifest, teacher = corpus(tmp_path, 4), Moments()
    embeddings = embed_manifest(manifest, teacher, tmp_path / "embeddings")
    assert len(teacher.seen) == 3
    np.testing.assert_array_equal(embeddings.vectors[3], embeddings.vectors[0])


def test_stretches_of_one_file_have_vectors_of_their_own(tmp_path: Path) -> None:
    write_clip(tmp_path / "long.wav", seed=0, samples=RATE)
    (tmp_path / "m.csv").write_text(
        "file,speaker,label,start,end\nlong.wav,a,joy,,0.5\nlong.wav,a,joy,0.25,\nlong.wav,a,joy,,\n"
    )
    manifest = load_manifest(tmp_path / "m.csv")
    embeddings = embed_manifest(manifest, Moments(), tmp_path / "embeddings")
    assert len(set(embeddings.contents)) == 3
    assert embeddings.vectors[:, 2].tolist() == [RATE / 2, 0.75 * RATE, RATE]
    np.testing.assert_array_equal(embeddings.of(manifest), expected(manifest))


@pytest.mark.parametrize("stop_after", [0, 3, CLIPS_PER_FILE, CLIPS_PER_FILE + 2])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, stop_after: int) -> None:
    manifest = corpus(tmp_path, CLIPS_PER_FILE + 4)
    folder = tmp_path / "embeddings"
    with pytest.raises(KeyboardInterrupt):
        embed_manifest(manifest, Moments(stop_after=stop_after), folder)
    with pytest.raises(UsageError, match="not all clips are embedded yet" if stop_after else "no embeddings folder"):
        load_embeddings(folder)
    assert folder.exists() == (stop_after > 0)
    rest = Moments()
    embeddings = embed_manifest(manifest, rest, folder)
    assert len(rest.seen) == len(manifest) - stop_after
    np.testing.assert_array_equal(embeddings.vectors, expected(manifest))


KILLED_RUN = """
import os, sys, types
import numpy as np
from sertool.corpora.manifest import load_manifest
from sertool.teacher.embed import embed_manifest

calls = 0

def embed(samples):
    global calls
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    calls += 1
    return np.array([samples.mean(), samples.std(), len(samples)], np.float32)

teacher = types.SimpleNamespace(name="killed", identity="moments", dimension=3, description={}, embed=embed)
embed_manifest(load_manifest(sys.argv[1]), teacher, sys.argv[2])
"""


def test_a_killed_run_keeps_what_it_had_written(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, CLIPS_PER_FILE + 4)
    folder = tmp_path / "embeddings"
    arguments = [manifest.path, folder, CLIPS_PER_FILE + 2]
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, *map(str, arguments)], check=False)
    assert done.returncode == -9
    # What a kill in the middle of a write leaves behind.
    (folder / ".vectors-0123456789abcdef.4711.safetensors").write_bytes(b"\x00half")
    rest = Moments()
    embeddings = embed_manifest(manifest, rest, folder)
    assert len(rest.seen) == 4
    np.testing.assert_array_equal(embeddings.vectors, expected(manifest))


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, CLIPS_PER_FILE + 3)
    for name in ("first", "second"):
        embed_manifest(manifest, Moments(), tmp_path / name)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert len(files_of(tmp_path / "first")) == 4


def test_a_folder_of_another_teacher_is_refused_and_left_alone(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, 2)
    embed_manifest(manifest, Moments("A"), tmp_path / "embeddings")
    before = files_of(tmp_path / "embeddings")
    teacher = Moments("B")
    with pytest.raises(UsageError, match="made by teacher A, not by teacher B"):
        embed_manifest(manifest, teacher, tmp_path / "embeddings")
    teacher.name = "teacher A"
    with pytest.raises(UsageError, match="made by another teacher A, not by teacher A"):
        embed_manifest(manifest, teacher, tmp_path / "embeddings")
    assert teacher.seen == []
    assert files_of(tmp_path / "embeddings") == before


def test_vectors_without_their_teacher_are_not_taken_over(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, 2)
    embed_manifest(manifest, Moments("A"), tmp_path / "embeddings")
    (tmp_path / "embeddings" / "teacher.json").unlink()
    with pytest.raises(SerError, match="vectors of an unknown teacher"):
        embed_manifest(manifest, Moments("B"), tmp_path / "embeddings")


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no audio":
        path.write_text("hello")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:20])
    elif how == "NaN":
        soundfile.write(path, np.full(400, np.nan), RATE, subtype="FLOAT")
    elif how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["missing", "empty", "no audio", "truncated", "NaN", "folder"])
def test_an_unreadable_clip_is_named_and_the_others_are_kept(tmp_path: Path, how: str) -> None:
    manifest = corpus(tmp_path, 5)
    spoil(tmp_path / "1.wav", how)
    with pytest.raises(SerError, match=r"1 of 5 clips could not be embedded: .*1\.wav: .*others are stored") as caught:
        embed_manifest(manifest, Moments(), tmp_path / "embeddings")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="not all clips are embedded yet"):
        load_embeddings(tmp_path / "embeddings")
    shutil.rmtree(tmp_path / "1.wav") if how == "folder" else (tmp_path / "1.wav").unlink(missing_ok=True)
    teacher, repaired = Moments(), corpus(tmp_path, 5)
    np.testing.assert_array_equal(
        embed_manifest(repaired, teacher, tmp_path / "embeddings").vectors, expected(repaired)
    )
    assert len(teacher.seen) == 1


def test_many_unreadable_clips_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, 6)
    for number in range(5):
        (tmp_path / f"{number}.wav").unlink()
    with pytest.raises(SerError, match=r"^5 of 6 clips .*0\.wav.*1\.wav.*2\.wav: no such audio file; and 2 more;"):
        embed_manifest(manifest, Moments(), tmp_path / "embeddings")


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, number: float) -> None:
    class Broken(Moments):
        def embed(self, samples: np.ndarray) -> np.ndarray:
            return super().embed(samples) * np.float32(number if len(self.seen) == 2 else 1)

    with pytest.raises(SerError, match=r"1 of 3 clips .*1\.wav: teacher moments gives no finite numbers"):
        embed_manifest(corpus(tmp_path, 3), Broken(), tmp_path / "embeddings")
    stored = [safetensors.numpy.load_file(path) for path in (tmp_path / "embeddings").glob("vectors-*.safetensors")]
    assert [np.isfinite(tensors["vectors"]).all() for tensors in stored] == [True]
    assert len(stored[0]["vectors"]) == 2


def test_what_the_teacher_refuses_is_named_with_its_file(tmp_path: Path) -> None:
    class Picky(Moments):
        def embed(self, samples: np.ndarray) -> np.ndarray:
            raise AudioError("too short: 25.0 ms")

    with pytest.raises(SerError, match=r"2 of 2 clips .*/0\.wav: too short: 25\.0 ms; .*/1\.wav: too short"):
        embed_manifest(corpus(tmp_path, 2), Picky(), tmp_path / "embeddings")
    assert not (tmp_path / "embeddings").exists()


def test_whom_the_teacher_has_heard_is_known_by_the_audio(tmp_path: Path) -> None:
    manifest = corpus(tmp_path, 5)  # spoken by s0 and s1 in turn
    unknown = embed_manifest(manifest, Moments(), tmp_path / "unknown")
    assert (unknown.heard_audio, unknown.heard_speakers(manifest)) == (None, set())

    run = Moments()
    run.description["speakers"] = ["s1", "someone else"]  # of another corpus
    run.heard_audio = frozenset({content_hash(tmp_path / "4.wav"), "0" * 64})
    for embeddings in (embed_manifest(manifest, run, tmp_path / "audio"), load_embeddings(tmp_path / "audio")):
        assert embeddings.heard_speakers(manifest) == {"s0"}
    (tmp_path / "audio" / "heard.json").write_text("[")
    with pytest.raises(SerError, match=r"heard\.json: damaged; run sertool embed again"):
        load_embeddings(tmp_path / "audio")


def disk_full(path: Path, data: bytes) -> int:
    """Write as the disk does on which ten more bytes fit."""
    with path.open("wb") as file:
        file.write(data[:10])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = corpus(tmp_path, 3)
    folder = tmp_path / "embeddings"

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "write_bytes", disk_full)
        embed_manifest(manifest, Moments(), folder)
    assert not folder.exists()
    np.testing.assert_array_equal(embed_manifest(manifest, Moments(), folder).vectors, expected(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def vectors_file(folder: Path) -> Path:
    return next(folder.glob("vectors-*.safetensors"))


def fill_with_nan(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(vectors_file(folder))
    safetensors.numpy.save_file({**tensors, "vectors": tensors["vectors"] * np.nan}, vectors_file(folder))


def drop_a_vector(folder: Path) -> None:
    tensors = safetensors.numpy.load_file(vectors_file(folder))
    safetensors.numpy.save_file({name: t[1:] for name, t in tensors.items()}, vectors_file(folder))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated vectors": (lambda folder: truncate(vectors_file(folder)), "damaged; delete this file"),
    "vectors of another kind": (
        lambda folder: safetensors.numpy.save_file({"x": np.zeros(3)}, vectors_file(folder)),
        "damaged; delete this file",
    ),
    "NaN vectors": (fill_with_nan, "not 3 numbers a clip; delete this file"),
    "fewer vectors": (drop_a_vector, r"the vectors of '0\.wav' are gone; run: sertool embed"),
    "no vectors": (lambda folder: vectors_file(folder).unlink(), r"the vectors of '0\.wav' are gone"),
    "truncated teacher": (lambda folder: truncate(folder / "teacher.json"), "damaged; delete the folder"),
    "foreign teacher": (
        lambda folder: (folder / "teacher.json").write_text("[1]"),
        "damaged; delete the folder",
    ),
    "empty index": (lambda folder: (folder / "index.csv").write_text(""), "damaged; run sertool embed again"),
    "garbled index": (
        lambda folder: (folder / "index.csv").write_text("a,b\nc\n"),
        "damaged; run sertool embed",
    ),
    "binary index": (
        lambda folder: (folder / "index.csv").write_bytes(b"\xff\x00\n\xfe"),
        "damaged; run sertool",
    ),
    "no index": (lambda folder: (folder / "index.csv").unlink(), "not all clips are embedded yet"),
    "no teacher": (
        lambda folder: (folder / "teacher.json").unlink(),
        r"no embeddings folder \(it has no teacher",
    ),
    "nothing": (shutil.rmtree, "no embeddings folder"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_gives_one_clear_line(tmp_path: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    embed_manifest(corpus(tmp_path, 2), Moments(), tmp_path / "embeddings")
    damage(tmp_path / "embeddings")
    with pytest.raises(SerError, match=message) as caught:
        load_embeddings(tmp_path / "embeddings")
    assert "\n" not in str(caught.value)


# The command line


@pytest.fixture(scope="module")
def encoder_folder() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=50
    )
    with tempfile.TemporaryDirectory() as folder:
        WhisperEncoder(config).save_pretrained(folder)
        transformers.WhisperFeatureExtractor().save_pretrained(folder)
        yield folder


@pytest.fixture
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sertool_embed(
    tmp_path: Path,
    encoder_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    _same_threads: None,
) -> Callable[..., tuple[int, str, str]]:
    """Run ``sertool embed`` beside a corpus of 4 clips: exit code, stdout, stderr."""
    corpus(tmp_path, 4)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sertool", "embed", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_the_command_embeds_and_says_what_it_did(
    sertool_embed: Callable[..., tuple[int, str, str]], encoder_folder: str
) -> None:
    code, out, err = sertool_embed("manifest.csv", "--teacher", encoder_folder, "--layer", "2", "-o", "e")
    name = f"{Path(encoder_folder).name} layer 2"
    assert (code, out) == (0, f"e: 4 clips x 16 numbers by {name}, 4 computed now\n")
    assert err == f"{name}: 4 of 4 clips to embed\n"
    code, out, _ = sertool_embed("manifest.csv", "--teacher", encoder_folder, "--layer", "2", "-o", "e", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["folder"], result["clips"], result["computed"], result["dimension"]) == ("e", 4, 0, 16)
    assert result["teacher"]["layer"] == 2
    assert load_embeddings("e").vectors.shape == (4, 16)


def test_the_whole_program_gives_the_same_bytes_twice(
    sertool_embed: Callable[..., tuple[int, str, str]], encoder_folder: str, tmp_path: Path
) -> None:
    arguments = ["manifest.csv", "--teacher", encoder_folder, "--threads", "1", "--device", "cpu", "-o"]
    command = [sys.executable, "-c", "from sertool.cli import main; main()", "embed", *arguments, "first"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sertool_embed(*arguments, "second")[0] == 0
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


def test_a_full_disk_is_one_line(
    sertool_embed: Callable[..., tuple[int, str, str]], encoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        code, out, err = sertool_embed("manifest.csv", "--teacher", encoder_folder, "-o", "e")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].endswith("No space left on device")
    assert "Traceback" not in err
    assert not Path("e").exists()


BAD_INPUT: dict[str, tuple[list[str], int, str]] = {
    "no arguments": ([], 2, "Missing argument"),
    "no teacher": (["manifest.csv"], 2, "Missing option '--teacher'"),
    "no manifest": (["nothing.csv", "--teacher", "ENCODER"], 2, "nothing.csv: no such manifest"),
    "empty manifest": (["empty.csv", "--teacher", "ENCODER"], 2, "empty.csv: "),
    "layer too high": (["manifest.csv", "--teacher", "ENCODER", "--layer", "3"], 2, "no layer 3; valid: 0"),
    "layer no number": (
        ["manifest.csv", "--teacher", "ENCODER", "--layer", "last"],
        2,
        "Invalid value for '--layer'",
    ),
    "no teacher folder": (["manifest.csv", "--teacher", "nowhere"], 2, "nowhere: no such folder"),
    "teacher no model": (["manifest.csv", "--teacher", "."], 2, ".: holds no model"),
    "teacher a file": (["manifest.csv", "--teacher", "manifest.csv"], 2, "manifest.csv: no such folder"),
    "no device": (["manifest.csv", "--teacher", "ENCODER", "--device", "cpuu"], 2, "did you mean 'cpu'?"),
    "no threads": (["manifest.csv", "--teacher", "ENCODER", "--threads", "0"], 2, "--threads"),
    "output a file": (["manifest.csv", "--teacher", "ENCODER", "-o", "0.wav"], 1, "0.wav"),
    "clip missing": (
        ["missing.csv", "--teacher", "ENCODER"],
        1,
        "1 of 2 clips could not be embedded: gone.wav",
    ),
    "clip too short": (["short.csv", "--teacher", "ENCODER"], 1, "short.wav: too short: 6.2 ms"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_gives_one_line_and_the_exit_code(
    sertool_embed: Callable[..., tuple[int, str, str]], encoder_folder: str, tmp_path: Path, what: str
) -> None:
    (tmp_path / "empty.csv").touch()
    write_clip(tmp_path / "short.wav", seed=1, samples=100)
    (tmp_path / "short.csv").write_text("file,speaker,label\nshort.wav,a,joy\n")
    (tmp_path / "missing.csv").write_text("file,speaker,label\ngone.wav,a,joy\n0.wav,a,joy\n")
    arguments, expected_code, message = BAD_INPUT[what]
    code, out, err = sertool_embed(*[encoder_folder if a == "ENCODER" else a for a in arguments])
    assert (code, out) == (expected_code, "")
    assert message in err
    if "Usage:" not in err:
        assert [line.startswith("sertool: ") for line in err.splitlines() if "clips to embed" not in line] == [True]


def test_short_long_and_silent_clips_are_embedded(
    sertool_embed: Callable[..., tuple[int, str, str]], encoder_folder: str, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / "0.wav", np.zeros(RATE), RATE)
    write_clip(tmp_path / "1.wav", seed=1, samples=RATE // 10)
    write_clip(tmp_path / "2.wav", seed=2, samples=120 * RATE)
    soundfile.write(tmp_path / "3.wav", np.random.default_rng(0).uniform(-0.5, 0.5, (4410, 2)), 44100)
    code, _, err = sertool_embed("manifest.csv", "--teacher", encoder_folder, "-o", "e")
    assert code == 0, err
    assert np.isfinite(load_embeddings("e").vectors).all()
