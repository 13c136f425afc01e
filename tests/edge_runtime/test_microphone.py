from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from edge_runtime import microphone as microphone_module
from edge_runtime.errors import DeviceError, MissingDependencyError, UsageError
from edge_runtime.microphone import InputDevice, Microphone, find_device, input_devices
from edge_runtime.resample import resample
from edge_runtime.settings import Settings
from edge_runtime.sources import Block, Loss


class PortAudioError(Exception):
    pass


class FakeStream:
    def __init__(self, system: FakeSoundSystem, **options) -> None:
        if system.refuses:
            raise PortAudioError("Error opening InputStream: Illegal combination of I/O devices [PaErrorCode -9993]")
        if options["samplerate"] not in system.rates:
            raise PortAudioError("Error opening InputStream: Invalid sample rate [PaErrorCode -9997]")
        if options["channels"] < system.fewest_channels:
            raise PortAudioError("Error opening InputStream: Invalid number of channels [PaErrorCode -9998]")
        self.options = options
        self.closed = False
        system.stream = self
        system.opened += 1
        system.open_now.set()

    def start(self) -> None:
        pass

    def close(self, ignore_errors: bool) -> None:
        self.closed = True

    def capture(self, samples: np.ndarray, overflow: bool = False) -> None:
        """Deliver samples in blocks as PortAudio does: it reuses the memory afterwards."""
        integers = np.round(samples * 32768).astype(np.int16)
        frames = np.repeat(integers[:, None], self.options["channels"], axis=1) if integers.ndim == 1 else integers
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
        self.refuses = False
        self.opened = self.initialized = 0
        self.open_now = threading.Event()

    def _terminate(self) -> None:
        pass

    def _initialize(self) -> None:
        self.initialized += 1

    def _exit_handler(self) -> None:
        pass

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
    monkeypatch.setattr(microphone_module, "_open_streams", set())
    return system


def take(microphone: Microphone, samples: int) -> tuple[np.ndarray, list[int]]:
    taken, positions = [], []
    for block in microphone.blocks():
        assert isinstance(block, Block)
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
    assert positions == [0]
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
        Microphone(Settings(exit_on_loss=True)).open()


@pytest.mark.parametrize("rate", [16000, 48000])
def test_a_consumer_that_falls_behind_loses_the_oldest_and_sees_where(system, speech, rate):
    system.rates = {rate}
    microphone = Microphone(Settings(buffer=1.0))
    microphone.open()
    blocks = microphone.blocks()
    signal = speech(3.0)
    system.stream.capture(resample(signal[:1600], 16000, rate))
    first = next(blocks)
    system.stream.capture(resample(signal, 16000, rate))
    second = next(blocks)
    assert second.gap == "overflow"
    assert second.position == pytest.approx(1600 + 2.0 * 16000, abs=600)
    assert len(second.samples) == pytest.approx(16000, abs=600)
    assert first.position == 0


def test_everything_that_waits_comes_as_one_block(system, speech):
    microphone = Microphone()
    microphone.open()
    system.stream.capture(speech(3.0))
    assert len(next(microphone.blocks()).samples) == 48000


@pytest.mark.parametrize("fewest", [1, 2])
def test_one_channel_is_heard(system, speech, fewest):
    system.fewest_channels = fewest
    microphone = Microphone(Settings(channel=2))
    microphone.open()
    both = np.stack([speech(0.5, seed=1), speech(0.5, seed=2)], axis=1)
    system.stream.capture(both)
    taken, _ = take(microphone, 8000)
    assert np.array_equal(taken, both[:, 1])


def test_a_channel_that_does_not_exist_is_refused(system):
    with pytest.raises(UsageError, match="'USB PnP Sound Device' has no channel 3; valid: 1 to 2"):
        Microphone(Settings(channel=3)).open()


def test_a_reported_overflow_shows_as_a_jump(system, speech):
    microphone = Microphone()
    microphone.open()
    system.stream.capture(speech(0.032))
    system.stream.capture(speech(0.032), overflow=True)
    _, positions = take(microphone, 1024)
    assert positions == [0, 1024]


def next_loss(blocks) -> Loss:
    return next(block for block in blocks if isinstance(block, Loss))


def test_a_device_that_vanishes_is_opened_again_by_its_name(system, speech):
    microphone = Microphone(Settings(device="PnP"))
    microphone.open()
    system.stream.capture(speech(0.064))
    system.devices = [("Dock", 2), ("HDMI", 0), ("USB PnP Sound Device", 1)]
    system.stream.options["finished_callback"]()
    blocks = microphone.blocks()
    assert next(blocks).position == 0
    loss = next(blocks)
    assert (loss.reason, system.stream.closed) == ("device_gone", False)
    assert "'USB PnP Sound Device' is gone" in loss.detail
    lost = system.stream
    system.open_now.clear()
    capture_when_open(system, np.concatenate([np.zeros(5120), speech(0.5)]))
    back = next(blocks)
    assert lost.closed
    assert system.stream.options["device"] == 2
    assert back.position >= 1024
    assert np.array_equal(back.samples, speech(0.5)[: len(back.samples)])


def capture_when_open(system, samples: np.ndarray) -> None:
    def capture() -> None:
        system.open_now.wait(20)
        system.stream.capture(samples)

    threading.Thread(target=capture, daemon=True).start()


def test_alsas_card_number_may_change(system, speech):
    system.devices = [("USB: Audio (hw:1,0)", 1), ("Dock: Audio (hw:0,0)", 1)]
    microphone = Microphone(Settings(device=0))
    microphone.open()
    system.devices = [("Dock: Audio (hw:1,0)", 1), ("USB: Audio (hw:2,0)", 1)]
    system.stream.options["finished_callback"]()
    blocks = microphone.blocks()
    next_loss(blocks)
    system.open_now.clear()
    capture_when_open(system, speech(0.5))
    next(blocks)
    assert microphone.name == "USB: Audio (hw:2,0)"


def test_a_lost_device_is_an_error_where_that_was_asked_for(system):
    microphone = Microphone(Settings(exit_on_loss=True))
    microphone.open()
    system.stream.options["finished_callback"]()
    blocks = microphone.blocks()
    assert next(blocks).reason == "device_gone"
    with pytest.raises(DeviceError, match="'USB PnP Sound Device' is gone"):
        next(blocks)


@pytest.mark.parametrize(
    ("absence", "reason"), [({"devices": []}, "absent"), ({"refuses": True}, "refused"), ({"rates": set()}, "refused")]
)
def test_a_device_that_is_absent_at_the_start_is_waited_for(system, speech, absence, reason):
    before = {name: getattr(system, name) for name in absence}
    vars(system).update(absence)
    microphone = Microphone()
    microphone.open()
    blocks = microphone.blocks()
    assert next(blocks).reason == reason
    assert system.initialized == 1
    vars(system).update(before)
    capture_when_open(system, speech(0.1))  # less than was waited for
    assert next(blocks).position > 0


def test_a_device_that_stays_away_is_tried_ever_more_rarely(system, monkeypatch):
    waits = []
    microphone = Microphone(Settings(retry=4.0))
    microphone.open()
    system.stream.options["finished_callback"]()
    blocks = microphone.blocks()
    next_loss(blocks)
    system.devices = []

    def wait(seconds: float) -> list:
        waits.append(seconds)
        if len(waits) == 8:
            microphone.stop()
        return []

    monkeypatch.setattr(microphone, "_await_sound", wait)
    assert list(blocks) == []
    assert waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0]
    assert system.initialized == 7


def test_portaudio_is_not_initialised_again_under_another_open_microphone(system):
    other = Microphone(Settings(device="Camera"))
    other.open()
    system.refuses = True
    with pytest.raises(DeviceError):
        Microphone(Settings(exit_on_loss=True)).open()
    assert system.initialized == 0
    other.close()


def test_a_device_that_gives_nothing_is_lost(system):
    microphone = Microphone(Settings(stall=0.5))
    microphone.open()
    loss = next(microphone.blocks())
    assert loss.reason == "stalled"
    assert "'USB PnP Sound Device' gives nothing for 0.5 s" in loss.detail
    microphone.close()


def test_zeros_for_ever_are_a_loss_and_sound_on_the_same_stream_ends_it(system, speech):
    microphone = Microphone(Settings(digital_silence=1.0))
    microphone.open()
    system.stream.capture(np.concatenate([speech(1.0), np.zeros(16000)]))
    blocks = microphone.blocks()
    assert len(next(blocks).samples) == 32000
    assert next(blocks).reason == "digital_silence"
    system.stream.capture(np.zeros(8192))
    system.stream.capture(speech(0.5))
    assert np.array_equal(next(blocks).samples, speech(0.5))
    assert system.opened == 1


def test_a_sound_server_that_hangs_does_not_hang_the_end(system, monkeypatch):
    frozen = threading.Event()
    monkeypatch.setattr(microphone_module, "CLOSE_S", 0.05)
    monkeypatch.setattr(FakeStream, "close", lambda self, ignore_errors: frozen.wait(20))
    microphone = Microphone(Settings(stall=0.5))
    microphone.open()
    blocks = microphone.blocks()
    assert next(blocks).reason == "stalled"
    threading.Timer(0.4, microphone.stop).start()
    assert list(blocks) == []
    microphone.close()
    assert not frozen.is_set()
    frozen.set()


def test_a_loss_of_time_shows_in_the_positions(system, speech, monkeypatch):
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr(microphone_module, "now", lambda: clock.time)
    microphone = Microphone()
    microphone.open()

    def capture(samples: np.ndarray) -> None:
        for start in range(0, len(samples), 512):
            clock.time += 0.032
            system.stream.capture(samples[start : start + 512])

    capture(speech(2.048))
    clock.time += 3.0
    capture(speech(2.048))
    blocks = microphone.blocks()
    first, second = next(blocks), next(blocks)
    assert (first.position, len(first.samples)) == (0, 32768)
    assert (second.position, second.gap) == (32768 + 48000, "dropout")
    assert np.array_equal(second.samples, speech(2.048))


def test_stop_from_another_thread_ends_the_wait(system):
    microphone = Microphone(Settings(stall=60.0))
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
        ("Yeti", DEVICES, DeviceError, "no microphone 'Yeti'; valid: 1 'USB PnP', 2"),
        (9, DEVICES, DeviceError, "no microphone 9; valid"),
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
