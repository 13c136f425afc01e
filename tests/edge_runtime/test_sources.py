from __future__ import annotations

import struct
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.errors import AudioError, DeviceError, MissingDependencyError, SerError, UsageError
from edge_runtime.resample import resample
from edge_runtime.sources import AudioFile, InputDevice, Microphone, find_device, input_devices


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


# Microphones: a sound system that does what the test says ----------------------------------------------------------


class PortAudioError(Exception):
    pass


class FakeStream:
    def __init__(self, system: FakeSoundSystem, **options) -> None:
        if options["samplerate"] not in system.rates:
            raise PortAudioError("Error opening InputStream: Invalid sample rate [PaErrorCode -9997]")
        if options["channels"] < system.fewest_channels:
            raise PortAudioError("Error opening InputStream: Invalid number of channels [PaErrorCode -9998]")
        self.options = options
        self.closed = False
        system.stream = self

    def start(self) -> None:
        pass

    def close(self, ignore_errors: bool) -> None:
        self.closed = True

    def capture(self, samples: np.ndarray, overflow: bool = False) -> None:
        """Deliver samples in blocks as PortAudio does: it reuses the memory afterwards."""
        integers = np.round(samples * 32768).astype(np.int16)
        frames = np.repeat(integers[:, None], self.options["channels"], axis=1)
        for start in range(0, len(frames), self.options["blocksize"]):
            block = frames[start : start + self.options["blocksize"]].copy()
            self.options["callback"](block, len(block), None, SimpleNamespace(input_overflow=overflow))
            block[:] = -1


class FakeSoundSystem(SimpleNamespace):
    """Stands in for the module sounddevice."""

    def __init__(self) -> None:
        self.PortAudioError = PortAudioError
        self.rates = {16000, 48000}
        self.fewest_channels = 1
        self.default = SimpleNamespace(device=[1, -1])
        self.devices = [("HDMI", 0), ("USB PnP Sound Device", 2), ("USB Camera", 1)]
        self.stream = None

    def query_devices(self):
        return [
            {"name": name, "max_input_channels": channels, "default_samplerate": 48000.0}
            for name, channels in self.devices
        ]

    def InputStream(self, **options):
        return FakeStream(self, **options)


@pytest.fixture
def system(monkeypatch) -> FakeSoundSystem:
    system = FakeSoundSystem()
    monkeypatch.setitem(sys.modules, "sounddevice", system)
    return system


def take(microphone: Microphone, samples: int) -> tuple[np.ndarray, list[int]]:
    taken, positions = [], []
    for block in microphone.blocks():
        taken.append(block.samples)
        positions.append(block.position)
        if sum(map(len, taken)) >= samples:
            break
    return np.concatenate(taken), positions


def test_what_is_captured_is_given(system, speech):
    microphone = Microphone()
    microphone.open()
    signal = speech(1.0)
    system.stream.capture(signal)
    taken, positions = take(microphone, 16000)
    assert np.array_equal(taken, signal)
    assert positions == list(range(0, 16000, 512))
    assert system.stream.options["dither_off"]


def test_a_device_that_refuses_16_khz_is_resampled(system, speech):
    system.rates = {48000}
    microphone = Microphone()
    microphone.open()
    signal = speech(1.0)
    system.stream.capture(signal)
    taken, _ = take(microphone, 5000)
    assert np.array_equal(taken, resample(signal, 48000, 16000)[: len(taken)])


def test_a_device_that_refuses_one_channel_is_averaged(system, speech):
    system.fewest_channels = 2
    microphone = Microphone()
    microphone.open()
    signal = speech(1.0)
    system.stream.capture(signal)
    taken, _ = take(microphone, 16000)
    assert np.allclose(taken, signal, atol=1e-6)


def test_a_device_that_refuses_everything_gives_one_line(system):
    system.rates = set()
    with pytest.raises(DeviceError, match=r"'USB PnP Sound Device' cannot be opened \(.*Invalid sample rate"):
        Microphone().open()


@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_consumer_that_falls_behind_loses_the_oldest_and_sees_where(system, speech, rate):
    system.rates = {rate}
    microphone = Microphone(buffer=1.0)
    microphone.open()
    signal = speech(3.0)
    system.stream.capture(resample(signal, 16000, rate) if rate != 16000 else signal)
    _, positions = take(microphone, 15000)
    assert positions[0] == pytest.approx(2.0 * 16000, abs=600)
    assert np.all(np.diff(positions) < 600)


def test_a_reported_overflow_shows_as_a_jump(system, speech):
    microphone = Microphone()
    microphone.open()
    system.stream.capture(speech(0.032))
    system.stream.capture(speech(0.032), overflow=True)
    _, positions = take(microphone, 1024)
    assert positions == [0, 1024]


def test_a_device_that_vanishes_is_an_error_after_what_it_gave(system, speech):
    microphone = Microphone()
    microphone.open()
    system.stream.capture(speech(0.064))
    system.stream.options["finished_callback"]()
    blocks = microphone.blocks()
    assert [next(blocks).position, next(blocks).position] == [0, 512]
    with pytest.raises(DeviceError, match="'USB PnP Sound Device' is gone"):
        next(blocks)


def test_a_device_that_falls_silent_is_an_error(system):
    microphone = Microphone(stall=0.5)
    microphone.open()
    with pytest.raises(DeviceError, match=r"has given nothing for 0\.5 s"):
        next(microphone.blocks())


def test_stop_from_another_thread_ends_the_wait(system):
    microphone = Microphone(stall=60.0)
    microphone.open()
    threading.Timer(0.05, microphone.stop).start()
    assert list(microphone.blocks()) == []


def test_close_releases_the_device(system):
    microphone = Microphone()
    microphone.open()
    microphone.close()
    microphone.close()
    assert system.stream.closed


def test_devices_that_only_play_are_not_listed(system):
    assert [(d.index, d.name, d.default) for d in input_devices()] == [
        (1, "USB PnP Sound Device", True),
        (2, "USB Camera", False),
    ]


DEVICES = [
    InputDevice(1, "USB PnP", 1, 48000, True),
    InputDevice(2, "USB Camera", 1, 48000, False),
    InputDevice(5, "USB", 1, 48000, False),
]


@pytest.mark.parametrize(
    ("wanted", "index"), [(None, 1), (2, 2), ("2", 2), ("camera", 2), ("USB", 5), ("pnp", 1), ("USB PnP", 1)]
)
def test_a_device_is_found(wanted, index):
    assert find_device(wanted, DEVICES).index == index


@pytest.mark.parametrize(
    ("wanted", "devices", "error", "message"),
    [
        (None, [], DeviceError, "no microphone found"),
        ("usb", DEVICES, UsageError, "3 microphones match 'usb'; name one of: 1 'USB PnP', 2"),
        ("Yeti", DEVICES, UsageError, "no microphone 'Yeti'; valid: 1 'USB PnP', 2"),
        (9, DEVICES, UsageError, "no microphone 9; valid"),
    ],
)
def test_a_device_that_cannot_be_found_lists_the_valid_ones(wanted, devices, error, message):
    with pytest.raises(error, match=message):
        find_device(wanted, devices)


def test_without_sounddevice_the_line_to_type_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ser-edge\[mic\]'"):
        input_devices()


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        ("OSError('PortAudio library not found')", MissingDependencyError, "apt install libportaudio2"),
        ("RuntimeError('Error initializing PortAudio: -9999\\nmore')", DeviceError, r"PortAudio: -9999\)"),
    ],
)
def test_an_import_that_fails_says_what_to_do(tmp_path, monkeypatch, raised, error, message):
    (tmp_path / "sounddevice.py").write_text(f"raise {raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    with pytest.raises(error, match=message) as caught:
        input_devices()
    assert "\n" not in str(caught.value)
