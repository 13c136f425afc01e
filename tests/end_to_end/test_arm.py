"""``ser-edge`` on ARM, installed by pip and emulated: what a model file answers there is what it answers here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.frontend import log_mel

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from arm_root import ArmRoot
from count_instructions import QUICK, count_all, off_budget
from quick_run import quick_run, syllables, write_wav
from virtual_microphone import VirtualMicrophone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-user"),
]

Run = Callable[[Path, str], str]

MODELS = ("window.onnx", "stream.onnx", "window.tflite", "stream.tflite")
"""Files of one run; each is named after its form."""

PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
"""By release of Debian, and so of Raspberry Pi OS."""

ANSWERED = [*(("bookworm", model) for model in MODELS), ("trixie", "stream.onnx")]
"""What commands are asked about. The emulator takes seconds for each question: on the newer Debian, about one file."""

COMPUTED = [
    ("bookworm", "window.onnx", "cortex-a72"),
    ("bookworm", "stream.onnx", "cortex-a76"),
    ("bookworm", "window.tflite", "cortex-a76"),
    ("bookworm", "stream.tflite", "cortex-a72"),
    ("trixie", "stream.onnx", "cortex-a76"),
    ("trixie", "window.tflite", "cortex-a72"),
]
"""Whose logits are compared: each file, and each library on each processor, whose kernels are not the other's."""

SECONDS = {"short": 0.9, "window": 1.536, "long": 6.0}

LOG_MEL_TOLERANCE = 1e-4
"""dB. C libraries differ in the last bit of a logarithm."""

PROBABILITY_TOLERANCE = 5e-3
"""Where such a bit changes the 8-bit step that an input value falls on."""

# Spectrograms and logits of clips, and logits of spectrograms that were made elsewhere.
PROBE = """
import sys
import numpy as np
from edge_runtime.frontend import log_mel
from edge_runtime.recognizer import Recognizer

model, given, target = sys.argv[1:]
recognizer = Recognizer(model)
found = {}
for name, values in np.load(given).items():
    if name.startswith("clip"):
        found[name] = log_mel(values)
    else:
        found[name] = recognizer._backend.predict(values[None])[0]
np.savez(target, **found)
"""


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest) -> Iterator[ArmRoot]:
    with ExitStack() as stack:
        try:
            arm = stack.enter_context(ArmRoot(getattr(request, "param", "bookworm")))
        except RuntimeError as error:  # no mirror, no index: that says nothing of ser-edge
            pytest.skip(f"no ARM root can be built here: {error}")
        yield arm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a ResNet-9 that tells pitches apart."""
    folder = tmp_path_factory.mktemp("trained")
    quick_run(folder, "resnet9")
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, trained: Path, run: Run) -> Path:
    """Return an int8 file of each kind."""
    file = trained / request.param
    if not file.exists():
        run(trained, f"sertool export run --force --precision int8 --form {file.stem} -o {file.name}")
    return file


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        name: write_wav(folder / f"{name}.wav", syllables(seconds, 150 + 200 * seed))
        for seed, (name, seconds) in enumerate(SECONDS.items())
    }


@pytest.mark.parametrize(("root", "model", "cpu"), COMPUTED, indirect=["root", "model"])
def test_logits_are_the_same_bits(cpu: str, model: Path, root: ArmRoot, tmp_path: Path) -> None:
    given = {name: syllables(seconds, 350) / np.float32(32768) for name, seconds in SECONDS.items()}
    spectra = {name: log_mel(samples) for name, samples in given.items()}
    # Full range: a spectrogram as it is would leave most of the 8-bit input steps unused.
    normalized = {name: (frames - frames.mean()) / frames.std() for name, frames in spectra.items()}
    np.savez(tmp_path / "given", **normalized, **{f"clip {name}": samples for name, samples in given.items()})
    arguments = ["-c", PROBE, model, tmp_path / "given.npz"]
    subprocess.run([sys.executable, *arguments, tmp_path / "here"], check=True)
    root.run("python", *arguments, tmp_path / "there", cpu=cpu)

    here, there = np.load(tmp_path / "here.npz"), np.load(tmp_path / "there.npz")
    for name in normalized:
        assert np.ptp(here[name]) > 0.1, "a network that answers nothing shows nothing"
        np.testing.assert_array_equal(there[name], here[name])
        np.testing.assert_allclose(there[f"clip {name}"], here[f"clip {name}"], rtol=0, atol=LOG_MEL_TOLERANCE)


@pytest.mark.parametrize(("root", "version"), PYTHONS.items(), indirect=["root"])
def test_it_runs_on_the_processor_it_says(root: ArmRoot, version: str) -> None:
    said = root.run("python", "-c", "import platform; print(platform.machine(), platform.python_version())").stdout
    assert said.startswith(f"aarch64 {version}.")


@pytest.mark.parametrize(("root", "model"), ANSWERED, indirect=True)
def test_info_passes_the_self_test(model: Path, root: ArmRoot, run: Run) -> None:
    here = json.loads(run(model.parent, f"ser-edge info {model} --json"))
    assert json.loads(root.run("ser-edge", "info", model, "--json").stdout) == here
    assert here["self_test"] == "passed"


@pytest.mark.parametrize("model", ["stream.onnx"], indirect=True)
def test_verify_passes(model: Path, root: ArmRoot) -> None:
    root.run("ser-edge", "verify", model)


@pytest.mark.parametrize(("root", "model"), ANSWERED, indirect=True)
def test_recordings_get_the_same_answers(model: Path, clips: dict[str, Path], root: ArmRoot, run: Run) -> None:
    words = ["file", model, *clips.values(), "--json"]
    here = run(model.parent, " ".join(map(str, ["ser-edge", *words])))
    there = root.run("ser-edge", *words).stdout
    answers = [[json.loads(line) for line in lines.splitlines()] for lines in (here, there)]
    assert len(answers[0]) == len(clips)
    for expected, found in zip(*answers, strict=True):
        assert found["label"] == expected["label"]
        assert_same_events([found, *found["events"]], [expected, *expected["events"]])


def assert_same_events(found: list[dict], expected: list[dict]) -> None:
    for one, same in zip(found, expected, strict=True):
        assert one.get("kind") == same.get("kind")
        assert list(one["probabilities"]) == list(same["probabilities"])
        difference = np.subtract(list(one["probabilities"].values()), list(same["probabilities"].values()))
        assert np.abs(difference).max(initial=0) < PROBABILITY_TOLERANCE


@pytest.mark.parametrize("model", ["stream.onnx"], indirect=True)
def test_bench_measures(model: Path, root: ArmRoot) -> None:
    found = json.loads(root.run("ser-edge", "bench", model, "--seconds", "1", "--json").stdout)
    assert found["scores"] >= 1


@pytest.mark.parametrize("model", ["stream.onnx"], indirect=True)
@pytest.mark.skipif(not shutil.which("pulseaudio"), reason="needs pulseaudio and pulseaudio-utils")
def test_a_microphone_gives_the_events_of_the_file(model: Path, root: ArmRoot, tmp_path: Path, run: Run) -> None:
    pause = np.random.default_rng(0).integers(1, 10, 16000).astype(np.int16)
    clip = write_wav(tmp_path / "clip.wav", np.concatenate([syllables(1.9, 150), pause, syllables(1.4, 550), pause]))
    # One score in a segment and one at its end: a slow machine has none to leave out.
    words = [model, "--hop", "3", "--json"]
    expected = json.loads(run(tmp_path, " ".join(map(str, ["ser-edge", "file", model, clip, "--hop 3 --json"]))))
    with VirtualMicrophone() as microphone:
        listening = subprocess.Popen(
            root.command("ser-edge", "listen", *words), env=microphone.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert listening.stderr.readline().startswith("ser-edge: listening to ")
        microphone.play(clip)
        lines = [listening.stdout.readline() for _ in expected["events"]]
        listening.send_signal(signal.SIGTERM)
        rest, complaints = listening.communicate(timeout=60)
    assert (listening.returncode, rest, complaints) == (0, "", "")
    events = [json.loads(line) for line in lines]
    assert [event["kind"] for event in events] == ["begin", "end", "begin", "end"]
    assert_same_events(events, expected["events"])


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_inference_and_listening_cost_no_more_than_their_budget(root: ArmRoot) -> None:
    """Calls of one network, and listening; python tools/count_instructions.py --check counts the calls of all four."""
    assert not off_budget(count_all(QUICK, root), QUICK)
