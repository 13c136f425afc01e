from __future__ import annotations

import fcntl
import os
import struct
import sys
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import recordings
from edge_runtime.errors import AudioError, DeviceError, MissingDependencyError, SerError, UsageError
from edge_runtime.recordings import AudioFile, RawAudio, RealTime
from edge_runtime.resample import resample
from edge_runtime.settings import Settings
from edge_runtime.sources import Loss


def read(path, rate: int = 16000) -> np.ndarray:
    source = AudioFile(path, rate)
    source.open()
    try:
        blocks = list(source.blocks())
    finally:
        source.close()
    assert [b.position for b in blocks] == np.cumsum([0] + [len(b.samples) for b in blocks])[:-1].tolist()
    return np.concatenate([b.samples for b in blocks])


def riff(*chunks: tuple[bytes, bytes], length: int | None = None) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(content) if length is None or name != b"data" else length) + content
        for name, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def fmt(code=1, channels=1, rate=16000, bits=16) -> tuple[bytes, bytes]:
    frame = channels * bits // 8
    return b"fmt ", struct.pack("<HHIIHH", code, channels, rate, 0, frame, bits)


DATA = b"data", np.arange(100, dtype="<i2").tobytes()


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_wav_equals_libsndfile(tmp_path, speech, subtype, container, channels):
    path = tmp_path / "a.wav"
    signal = np.stack([speech(1.3, seed=c) for c in range(channels)], axis=1)
    soundfile.write(path, signal, 16000, subtype=subtype, format=container)
    expected, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert np.allclose(read(path), expected.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_one_channel_of_a_recording_is_heard(tmp_path, speech, suffix):
    path = tmp_path / f"a{suffix}"
    both = np.stack([speech(0.5, seed=1), speech(0.5, seed=2)], axis=1)
    soundfile.write(path, both, 16000, subtype="PCM_16")
    source = AudioFile(path, channel=2)
    source.open()
    assert np.array_equal(heard(list(source.blocks())), both[:, 1])
    source.close()
    source = AudioFile(path, channel=3)
    with pytest.raises(AudioError, match="no channel 3 in it; valid: 1 to 2"):
        source.open()
    source.close()


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".aiff", ".mp3"])
def test_other_formats_through_soundfile(tmp_path, speech, suffix):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, speech(2.1), 16000)
    expected, _ = soundfile.read(path, dtype="float32")
    # An MP3 decodes to the last bit or the one before it, depending on how much is asked for at a time.
    assert np.allclose(read(path), expected, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, speech, write_wav, rate):
    signal = speech(2.5)
    path = write_wav(tmp_path / "a.wav", signal, rate)
    assert np.array_equal(read(path), resample(signal, rate, 16000))


def test_the_length_is_known_before_reading(tmp_path, speech, write_wav):
    source = AudioFile(write_wav(tmp_path / "a.wav", speech(1.5)))
    source.open()
    assert source.seconds == 1.5
    source.close()


def test_a_long_file_is_read_in_pieces(tmp_path, write_wav):
    path = write_wav(tmp_path / "a.wav", np.full(16000 * 20, 0.1))
    source = AudioFile(path)
    source.open()
    assert max(len(block.samples) for block in source.blocks()) <= 16000
    source.close()


def test_stop_ends_the_reading(tmp_path, write_wav):
    source = AudioFile(write_wav(tmp_path / "a.wav", np.full(16000 * 20, 0.1)))
    source.open()
    blocks = source.blocks()
    next(blocks)
    source.stop()
    assert list(blocks) == []
    source.close()


def test_chunks_around_the_samples_are_skipped(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(
        riff((b"LIST", b"odd"), fmt(), (b"junk", bytes(10)), DATA, (b"tail", b"xx")).replace(b"odd", b"odd\0")
    )
    assert np.array_equal(read(path), np.arange(100, dtype=np.float32) / 32768)


def test_a_pipe_recorders_placeholder_length_means_until_the_end(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(riff(fmt(), DATA, length=0xFFFFFFFF))
    assert len(read(path)) == 100


@pytest.mark.parametrize("rate", [16000, 32000])
def test_damage_amid_a_live_pipe_is_left_out_and_shows_as_a_jump(pipe, speech, rate):
    source = RawAudio(pipe.end, rate=rate, encoding="f32le")
    blocks = source.blocks()
    sound = speech(0.2).astype("<f4")
    damaged = sound.copy()
    damaged[100] = np.nan
    pipe.write(sound.tobytes())
    position = len(next(blocks).samples)
    pipe.write(damaged.tobytes())
    threading.Timer(0.3, pipe.write, [sound.tobytes()]).start()
    after = next(blocks)
    assert after.gap == "damaged"
    assert after.position == 2 * len(sound) * 16000 // rate > position
    assert np.isfinite(after.samples).all()
    pipe.close()


def test_damage_without_end_is_a_loss(pipe, speech):
    source = RawAudio(pipe.end, encoding="f32le", settings=Settings(stall=0.5))
    blocks = source.blocks()
    pipe.write(speech(0.2).astype("<f4").tobytes())
    next(blocks)
    damaging = threading.Event()

    def damage() -> None:
        while not damaging.wait(0.05):
            pipe.write(np.full(100, np.inf, "<f4").tobytes())

    writer = threading.Thread(target=damage)
    writer.start()
    lost = next(blocks)
    damaging.set()
    writer.join()
    assert (lost.reason, "nothing for 0.5 s" in lost.detail) == ("stalled", True)
    pipe.close()


def test_damage_is_refused_where_nothing_is_live(pipe, speech):
    sound = speech(2.0).astype("<f4")
    with pytest.raises(AudioError, match=f"sample {len(sound)} is nan"):
        read_raw(pipe, sound.tobytes() + np.full(9, np.nan, "<f4").tobytes(), encoding="f32le", live=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"RIFF", "not audio|not a WAV"),
        (b"hello world, this is text", "not audio"),
        (riff(), "ends before its audio"),
        (riff(fmt()), "ends before its audio"),
        (riff(DATA), "ends before its audio"),
        (riff((b"fmt ", b"short"), DATA), "damaged WAV header"),
        (riff(fmt(), (b"data", b"")), "no audio in it"),
        (riff(fmt(), DATA, length=500), "truncated, 200 of 500 bytes"),
        (riff(fmt(), DATA)[:-50], "truncated, 150 of 200 bytes"),
        (riff(fmt(code=2, bits=4), DATA), "WAV encoding 2 with 4 bits"),
        (riff(fmt(channels=0), DATA), "damaged WAV header"),
        (riff(fmt(rate=0), DATA), "sample rate 0 Hz"),
        (riff(fmt(rate=4_000_000_000), DATA), "sample rate 4000000000 Hz"),
        (riff(fmt(code=3, bits=32), (b"data", struct.pack("<3f", 0, float("nan"), 0))), "sample 1 is nan"),
        (riff(fmt(code=3, bits=32), (b"data", bytes(68000) + struct.pack("<f", float("nan")))), "sample 17000 is nan"),
        (riff(fmt(code=3, bits=64), (b"data", struct.pack("<2d", 0, 1e300))), r"sample 1 is inf"),
        (riff(fmt(code=3, bits=32), (b"data", struct.pack("<2f", 0, 12000))), "sample 1 is 12000"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path, content, message):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(AudioError, match="no such audio file"):
        read(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="cannot be read"):
        read(tmp_path)


@settings(max_examples=150, deadline=None)
@given(header=st.binary(max_size=60), position=st.integers(0, 60))
def test_any_header_is_read_or_refused(tmp_path_factory, header, position):
    whole = riff(fmt(), DATA)
    path = tmp_path_factory.getbasetemp() / "fuzz.wav"
    path.write_bytes(b"RIFF" + whole[4:8] + b"WAVE" + whole[12:position] + header + whole[position:])
    try:
        assert np.abs(read(path)).max() <= 100
    except SerError as error:
        assert "\n" not in str(error)


def test_without_soundfile_other_formats_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC" + bytes(100))
    with pytest.raises(MissingDependencyError, match=r"convert it to WAV.*pip install soundfile"):
        read(path)


# Real time --------------------------------------------------------------------------------------------------------


class FakeClock:
    """Time that passes only while somebody waits."""

    def __init__(self, monkeypatch) -> None:
        self.time = 1000.0
        monkeypatch.setattr(recordings, "now", lambda: self.time)

    def wait(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    return FakeClock(monkeypatch)


def in_real_time(path, clock) -> RealTime:
    source = RealTime(AudioFile(path))
    source._stopped.wait = clock.wait
    source.open()
    return source


def test_a_recording_in_real_time_is_the_recording_at_its_pace(tmp_path, speech, write_wav, clock):
    path = write_wav(tmp_path / "a.wav", speech(2.3))
    given = 0
    pieces = []
    for block in in_real_time(path, clock).blocks():
        assert block.position == given
        given += len(block.samples)
        pieces.append(block.samples)
        assert 0 <= clock.time - 1000.0 - given / 16000 < 0.033
    assert np.array_equal(np.concatenate(pieces), read(path))


def test_a_slow_listener_gets_what_was_spoken_meanwhile_in_one_block(tmp_path, speech, write_wav, clock):
    sizes = []
    for block in in_real_time(write_wav(tmp_path / "a.wav", speech(1.0)), clock).blocks():
        sizes.append(len(block.samples))
        clock.wait(0.5)
    assert sizes[1] == pytest.approx(0.5 * 16000, abs=600)
    assert sum(sizes) == 16000


# Raw samples through a pipe ---------------------------------------------------------------------------------------


class Pipe:
    def __init__(self) -> None:
        self.end, self._start = os.pipe()

    def write(self, content: bytes) -> None:
        os.write(self._start, content)

    def close(self) -> None:
        os.close(self._start)


@pytest.fixture
def pipe():
    pipe = Pipe()
    yield pipe
    os.close(pipe.end)


def integers(samples: np.ndarray) -> bytes:
    return np.round(samples * 32768).astype("<i2").tobytes()


def heard(blocks: list) -> np.ndarray:
    return np.concatenate([block.samples for block in blocks])


def read_raw(pipe: Pipe, content: bytes, pieces: int = 5000, **options) -> np.ndarray:
    """Read what is written in pieces from another thread."""

    def write() -> None:
        for start in range(0, len(content), pieces):
            pipe.write(content[start : start + pieces])
        pipe.close()

    threading.Thread(target=write).start()
    source = RawAudio(pipe.end, **options)
    source.open()
    return heard(list(source.blocks()))


@pytest.mark.parametrize(
    ("encoding", "subtype"),
    [("u8", "PCM_U8"), ("s16le", "PCM_16"), ("s24le", "PCM_24"), ("s32le", "PCM_32"), ("f32le", "FLOAT")],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_raw_samples_equal_libsndfiles(tmp_path, pipe, speech, encoding, subtype, channels):
    path = tmp_path / "a.raw"
    signal = np.stack([speech(1.1, seed=c) for c in range(channels)], axis=1)
    soundfile.write(path, signal, 16000, subtype=subtype, format="RAW", endian="LITTLE")
    expected, _ = soundfile.read(
        path, samplerate=16000, channels=channels, subtype=subtype, format="RAW", endian="LITTLE", dtype="float32",
        always_2d=True,
    )  # fmt: skip
    taken = read_raw(pipe, path.read_bytes(), pieces=4999, encoding=encoding, channels=channels)
    assert np.allclose(taken, expected.mean(axis=1), atol=1e-6)


def test_one_channel_of_a_pipe_is_heard(pipe, speech):
    both = np.stack([speech(0.5, seed=1), speech(0.5, seed=2)], axis=1)
    taken = read_raw(pipe, integers(both), channels=2, settings=Settings(channel=2))
    assert np.array_equal(taken, both[:, 1])


def test_a_pipe_at_another_rate_is_resampled(pipe, speech):
    signal = speech(1.0)
    taken = read_raw(pipe, integers(signal), rate=48000)
    assert np.array_equal(taken, resample(signal, 48000, 16000))


def test_the_end_of_a_pipe_in_mid_frame_loses_the_half_frame(pipe, speech):
    assert len(read_raw(pipe, integers(speech(0.1)) + b"x")) == 1600


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(min_size=1, max_size=400), channels=st.integers(1, 5), encoding=st.sampled_from(["u8", "f32le"])
)
def test_any_bytes_are_audio_or_refused(content, channels, encoding):
    pipe = Pipe()
    try:
        blocks = RawAudio(pipe.end, channels=channels, encoding=encoding)
        pipe.write(content)
        pipe.close()
        for block in blocks.blocks():
            assert np.isfinite(block.samples).all()
    except SerError as error:
        assert "\n" not in str(error)
    finally:
        os.close(pipe.end)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input: no audio in it"), (b"RIFF....WAVEfmt ", "begins with a WAV header.*arecord -t raw")],
)
def test_what_is_no_raw_audio_gives_one_line(pipe, content, message):
    with pytest.raises(AudioError, match=message):
        read_raw(pipe, content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "s16"}, "unknown sample format 's16'; did you mean 's16le'"),
        ({"rate": 0}, "sample rate 0 Hz; valid: 4000 to 384000"),
        ({"channels": 0}, "0 channels; valid: 1 to 64"),
        ({"channels": 2, "settings": Settings(channel=3)}, "2 channels; valid: 3 to 64"),
    ],
)
def test_what_no_pipe_can_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        RawAudio(0, **options)


def test_a_terminal_is_refused():
    parent, terminal = os.openpty()
    try:
        with pytest.raises(UsageError, match=r"is a terminal; pipe audio into it: arecord"):
            RawAudio(terminal).open()
    finally:
        os.close(parent)
        os.close(terminal)


class Recorder:
    """Writes 16-bit samples into a pipe when their time has come, on a clock that passes while somebody waits.

    Args:
        written: times, in their order, and what is written then; the pipe is closed with the last of it.
    """

    def __init__(self, pipe: Pipe, clock: FakeClock, monkeypatch, written: list[tuple[float, np.ndarray]]) -> None:
        self._pipe, self._clock, self._began = pipe, clock, clock.time
        self._due = deque((self._began + time, integers(samples)) for time, samples in written)
        monkeypatch.setattr(recordings, "select", SimpleNamespace(select=self.select))

    def select(self, readers: list, _writers: list, _errors: list, timeout: float) -> tuple[list, ...]:
        until = self._clock.time + timeout
        while self._due and self._due[0][0] > self._clock.time:
            if self._due[0][0] > until:
                self._clock.time = until
                return [], [], []
            self._clock.time = self._due[0][0]
        if self._due:
            self._pipe.write(self._due.popleft()[1])
        else:
            self._pipe.close()
        return readers, [], []


@pytest.fixture
def recorder(pipe, clock, monkeypatch):
    """Return what hears a recorder and says which positions each block has, and why they jump."""

    def hear(written: list, away: dict[int, float] | None = None, live: bool = True, **options) -> list:
        Recorder(pipe, clock, monkeypatch, written)
        found = []
        for number, heard in enumerate(RawAudio(pipe.end, live=live, settings=Settings(**options)).blocks()):
            clock.wait((away or {}).get(number, 0.0))
            if isinstance(heard, Loss):
                found.append(str(heard.reason))
            elif found and not isinstance(found[-1], str) and found[-1][1] == heard.position:
                found[-1][1] += len(heard.samples)
            else:
                found.append([heard.position, heard.position + len(heard.samples), heard.gap])
        return found

    return hear


def recorded(*stretches: tuple[float, float], piece: float = 0.1, late: float = 0.0) -> list[tuple[float, np.ndarray]]:
    """Return what a recorder writes that captures from one second to another, and writes so much later."""
    times = [np.arange(start, end - 1e-6, piece) + piece for start, end in stretches]
    noise = np.random.default_rng(0).integers(1, 99, round(16000 * piece)) / 32768
    return [(float(time) + late, noise) for time in np.concatenate(times)]


def seconds(found: list) -> list:
    return [each if isinstance(each, str) else (each[0] / 16000, each[1] / 16000) for each in found]


def test_a_recorder_that_misses_nothing_has_no_gap(recorder):
    assert seconds(recorder(recorded((0, 30)))) == [(0, 30)]


def test_a_loss_shorter_than_a_stall_is_a_gap_of_its_length(recorder):
    found = recorder(recorded((0, 3), (4.5, 8), (8.5, 12)), stall=5.0)
    assert seconds(found) == [(0, 3), (4.5, 8), (8.5, 12)]
    assert [gap for _, _, gap in found[1:]] == ["dropout", "dropout"]


@pytest.mark.parametrize("delay", [0.4, 2.0, 4.5])
def test_what_is_late_and_comes_at_once_has_lost_nothing(recorder, delay):
    late = [(3 + delay, samples) for _, samples in recorded((3, 3 + delay))]
    assert seconds(recorder([*recorded((0, 3)), *late, *recorded((3 + delay, 9))])) == [(0, 9)]


def test_a_pipe_that_pauses_is_lost_and_comes_back_where_the_clock_is(recorder):
    found = recorder(recorded((0, 3), (10, 12)), stall=5.0)
    assert seconds(found) == [(0, 3), "stalled", (10, 12)]


@pytest.mark.parametrize("kept", [0.3, 4.0, 7.0])
def test_after_a_stall_what_comes_at_once_is_as_old_as_it_is_long(recorder, kept):
    burst = [(10.0, samples) for _, samples in recorded((10 - kept, 10))]
    found = recorder([*recorded((0, 3)), *burst, *recorded((10, 14))], stall=5.0)
    assert seconds(found) == [(0, 3), "stalled", (10 - kept, 14)]


def test_a_slow_listener_and_a_late_recorder_lose_nothing(recorder):
    draw = np.random.default_rng(0)
    written = [(time + draw.uniform(0, 0.25), samples) for time, samples in recorded((0, 60))]
    away = {int(number): draw.uniform(0.3, 3.0) for number in draw.integers(0, 200, 20)}
    assert seconds(recorder(written, away)) == [(0, 60)]


def test_what_waited_for_a_slow_listener_is_not_late(recorder):
    written = [(0.1, samples) for _, samples in recorded((0, 3))]
    assert seconds(recorder(written, away={28: 0.9})) == [(0, 3)]


def test_pauses_of_what_is_not_live_are_no_gaps(recorder):
    assert seconds(recorder(recorded((0, 3), (5, 8), (20, 21)), live=False)) == [(0, 7)]


def test_pieces_of_any_length_of_what_is_not_live_are_no_gaps(recorder):
    pieces = [(0.1, np.full(round(16000 * length), 0.5)) for length in (2.0, 0.5, 1.5, 0.1)]
    assert seconds(recorder(pieces, live=False)) == [(0, 4.1)]


def test_a_loss_while_nobody_listens_is_told_once_the_listener_has_caught_up(recorder):
    found = recorder(recorded((0, 3), (5, 12)), away={20: 4.0})
    assert [found[0][0], found[-1][1]] == [0, 12 * 16000]
    assert [gap for _, _, gap in found[1:]] == ["dropout"]


def test_what_waits_for_the_end_of_a_delay_does_not_wait_for_the_next_sound(recorder):
    assert seconds(recorder([*recorded((0, 3), (5, 5.1)), (9.0, np.ones(1600) / 2)])) == [(0, 3), (5, 5.1), (8.9, 9)]


def test_a_live_pipe_holds_what_may_wait(pipe):
    RawAudio(pipe.end, rate=48000, channels=2, settings=Settings(buffer=2.0)).open()
    assert 2 * 48000 * 2 * 2 <= fcntl.fcntl(pipe.end, fcntl.F_GETPIPE_SZ) <= 2 * 2 * 48000 * 2 * 2


def test_a_pipe_of_zeros_is_lost_until_it_sounds(pipe, speech):
    source = RawAudio(pipe.end, settings=Settings(digital_silence=0.5))
    blocks = source.blocks()
    pipe.write(bytes(32000))
    assert next(blocks).position == 0
    assert next(blocks).reason == "digital_silence"
    pipe.write(integers(speech(0.5)))
    assert next(blocks).position >= 16000
    pipe.close()
    list(blocks)


def test_a_lost_pipe_is_an_error_where_that_was_asked_for(pipe):
    source = RawAudio(pipe.end, settings=Settings(digital_silence=0.5, exit_on_loss=True))
    pipe.write(bytes(32000))
    pipe.close()
    blocks = source.blocks()
    next(blocks)
    assert next(blocks).reason == "digital_silence"
    with pytest.raises(DeviceError, match=r"nothing but zeros for 0\.5 s"):
        next(blocks)


def test_zeros_and_pauses_of_a_pipe_that_is_not_live_mean_nothing(pipe):
    taken = read_raw(pipe, bytes(64000), live=False, settings=Settings(digital_silence=0.5, stall=0.5))
    assert len(taken) == 32000


def test_stop_ends_the_wait_for_a_pipe(pipe):
    source = RawAudio(pipe.end)
    threading.Timer(0.05, source.stop).start()
    assert list(source.blocks()) == []
