"""What listening costs beside its neighbours: CPU seconds for a minute of audio, each in a process of its own.

    python tools/benchmark_listener.py
    python tools/benchmark_listener.py --rounds 9 --json

The same minute of continuous speech, and of a quiet room, goes in blocks of 32 ms through our whole listener (threads,
gate, front-end, network, events as JSON lines), through what a user would write instead (every 0.25 s librosa's log-Mel
spectrogram of the whole window and onnxruntime on it in fp32), and through two always-on neighbours from PyPI,
pymicro-wakeword and Silero's voice activity detector. Everything has one thread. Loading is not counted, nor the first
two seconds. All are run in turn, several rounds, and the quickest round of each counts; read the ratios.

Speech is EmoDB's where ``SERTOOL_DATA`` names a folder with ``corpora/emodb``, else the synthetic corpus's. The
networks are trained for a moment: what they cost does not depend on their weights. They and an environment with the
neighbours are made once, which takes minutes, and kept in ``SERTOOL_CACHE``, else in the user's cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quick_run import quick_run
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge_runtime.gate import BLOCK, level_db
from sertool.audio import read_audio
from sertool.corpora.synthetic import synthesise

RATE = 16000
SECONDS = 60
WARM_UP_S = 2
WINDOW_SAMPLES = 95744

PIPED_WIDTH = 120
"""Columns of the tables where no terminal says how many there are."""

NETWORKS = ("resnet9", "cnn6")
FILES = {"stream.onnx": "int8", "stream.tflite": "int8", "window.onnx": "fp32"}
"""Files of each network: ours, in both formats, and the one of the hand-written loop."""

MEASURE = f"""
import json, os, resource, sys, time
import numpy as np

def measure(blocks, hear):
    for block in blocks[:warm]:
        hear(block)
    began = time.process_time()
    for block in blocks[warm:]:
        hear(block)
    return time.process_time() - began

def blocks_of(path):
    samples = np.load(path)
    return [samples[start : start + 512] for start in range(0, len(samples) - 511, 512)]

def tell(cpu, scores):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({{"cpu": cpu * 60 / ({SECONDS} - {WARM_UP_S}), "memory": memory, "scores": scores}}))

path, model = sys.argv[1:3]
warm, window_samples = round({WARM_UP_S} * 16000 / 512), {WINDOW_SAMPLES}
blocks = blocks_of(path)
"""

OURS = """
from edge_runtime.listener import Listener
from edge_runtime.settings import Settings
from edge_runtime.sources import Block

class Source:
    name, live = "benchmark", False
    def open(self): pass
    def stop(self): pass
    def close(self): pass
    def blocks(self):
        position = 0
        for number, block in enumerate(blocks):
            if number == warm:
                self.began = time.process_time()
            yield Block(position, (block / 32768).astype(np.float32))
            position += len(block)
        self.cpu = time.process_time() - self.began

source = Source()
nowhere = open(os.devnull, "w")
with Listener(model, Settings(hop=0.25), source=source) as ear:
    for event in ear:
        print(event.to_json(), file=nowhere, flush=True)
tell(source.cpu, ear.health().windows)
"""

BY_HAND = """
import librosa, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
name, window, waiting, scores = session.get_inputs()[0].name, np.zeros(window_samples, np.float32), 0, 0

def hear(block):
    global window, waiting, scores
    window = np.concatenate([window[len(block):], block / np.float32(32768)])
    waiting += len(block)
    if waiting >= 4000:
        waiting -= 4000
        power = librosa.feature.melspectrogram(
            y=window, sr=16000, n_fft=512, hop_length=256, n_mels=64, fmax=8000, center=False
        )
        frames = (librosa.power_to_db(power, top_db=None).T + 40) / 20
        session.run(None, {name: frames[None, None].astype(np.float32)})
        scores += 1

tell(measure(blocks, hear), scores)
"""

WAKEWORD = """
from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures, Model
word, features, scores = MicroWakeWord.from_builtin(Model.OKAY_NABU), MicroWakeWordFeatures(), 0

def hear(block):
    global scores
    for feature in features.process_streaming(block.tobytes()):
        word.process_streaming(feature)
        scores += 1

tell(measure(blocks, hear), scores)
"""

SILERO = """
import onnxruntime
from importlib.metadata import files
model = next(f.locate() for f in files("silero-vad") if f.name == "silero_vad_16k_op15.onnx")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
names = [entry.name for entry in session.get_inputs()]
state, context, scores = np.zeros((2, 1, 128), np.float32), np.zeros(64, np.float32), 0

def hear(block):
    global state, context, scores
    samples = np.concatenate([context, block / np.float32(32768)])
    given = {"input": samples[None], "state": state, "sr": np.array(16000, np.int64)}
    _, state = session.run(None, {name: given[name] for name in names})
    context, scores = samples[-64:], scores + 1

tell(measure(blocks, hear), scores)
"""


@dataclass(frozen=True)
class Contender:
    """Something that listens.

    Attributes:
        name: for the table.
        program: Python, after :data:`MEASURE`.
        model: its file, or nothing.
        neighbour: whether it runs in the neighbours' environment.
    """

    name: str
    program: str
    model: str = ""
    neighbour: bool = False


CONTENDERS = (
    *(
        Contender(f"ser-edge {name} int8 {file}", OURS, f"{name}/{file}")
        for name in NETWORKS
        for file in list(FILES)[:2]
    ),
    *(Contender(f"by hand {name} fp32", BY_HAND, f"{name}/window.onnx") for name in NETWORKS),
    Contender("pymicro-wakeword", WAKEWORD, neighbour=True),
    Contender("silero-vad", SILERO, neighbour=True),
)

OURS_BY_NETWORK = {name: f"ser-edge {name} int8 stream.onnx" for name in NETWORKS}


@dataclass(frozen=True)
class Cost:
    """What a minute of audio costs.

    Attributes:
        contender: its name.
        speech: CPU seconds for a minute of speech.
        silence: for a minute of a quiet room.
        memory: most resident memory, MB.
        scores: answers in the minute of speech.
        first_event: of ours, CPU seconds from the process's start to its first event; None of others.
    """

    contender: str
    speech: float
    silence: float
    memory: float
    scores: int
    first_event: float | None


# What is listened to ----------------------------------------------------------------------------------------------


def speech_minute(folder: Path) -> NDArray[np.int16]:
    """Return a minute of people who speak without a pause, 16-bit."""
    corpus = Path(os.environ.get("SERTOOL_DATA", "")) / "corpora" / "emodb"
    clips = sorted(corpus.rglob("*.flac")) if os.environ.get("SERTOOL_DATA") else []
    clips = clips or [clip.path for clip in synthesise(folder / "synthetic", speakers=4, sentences=6)]
    order = np.random.default_rng(0).permutation(len(clips))
    pieces: list[NDArray[np.float32]] = []
    while sum(map(len, pieces)) < SECONDS * RATE:
        pieces.append(_without_edges(read_audio(clips[order[len(pieces) % len(clips)]])))
    minute = np.concatenate(pieces)[: SECONDS * RATE] + room(SECONDS, 1)
    return np.round(minute * 32767).clip(-32768, 32767).astype(np.int16)


def _without_edges(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a clip at a common loudness, from its first to its last loud block."""
    samples = samples * np.float32(0.5 / max(float(np.abs(samples).max()), 1e-6))
    blocks = samples[: len(samples) // BLOCK * BLOCK].reshape(-1, BLOCK)
    loud = np.flatnonzero([level_db(block) > -40 for block in blocks])
    return np.asarray(blocks[loud[0] : loud[-1] + 1].reshape(-1))


def room(seconds: int, seed: int) -> NDArray[np.float32]:
    """Return the noise of a quiet room, -63 dBFS."""
    return np.random.default_rng(seed).normal(0, 0.0007, seconds * RATE).astype(np.float32)


# What listens -----------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return where models and the neighbours' environment are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sertool"
    return Path(os.environ.get("SERTOOL_CACHE") or default).absolute() / "benchmark-listener"


def make_models(folder: Path) -> None:
    """Make what is missing of the networks' files."""
    for name in NETWORKS:
        corpus = folder / name
        for file, precision in FILES.items():
            if (corpus / file).exists():
                continue
            corpus.mkdir(parents=True, exist_ok=True)
            if not (corpus / "run").exists():
                quick_run(corpus, name, WINDOW_SAMPLES, takes=1, epochs=4)
            command: list[str | Path] = [sys.executable, "-m", "sertool", "export", corpus / "run", "--force"]
            options = ["--calibration-clips", "6", "--precision", precision, "--form", Path(file).stem]
            subprocess.run([*command, *options, "-o", corpus / file], check=True, stdout=subprocess.DEVNULL)


def neighbours_python(folder: Path) -> Path:
    """Return the interpreter of an environment with the neighbours, made where there is none."""
    python, done = folder / "neighbours" / "bin" / "python", folder / "neighbours" / "installed"
    if not done.exists():
        venv.create(folder / "neighbours", with_pip=True, clear=True)
        install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "pymicro-wakeword", "onnxruntime"], check=True)
        subprocess.run([*install, "--no-deps", "silero-vad"], check=True)  # its model needs no torch
        done.touch()
    return python


def one_thread() -> dict[str, str]:
    """Return this process's environment with one thread for everybody."""
    return os.environ | {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}


def run(contender: Contender, audio: Path, folder: Path) -> dict[str, float]:
    """Let a contender listen to a file of samples; return ``cpu``, ``memory`` and ``scores``."""
    python = neighbours_python(folder) if contender.neighbour else sys.executable
    command = [python, "-c", MEASURE + contender.program, audio, folder / contender.model]
    environment = one_thread()
    if contender.neighbour:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"benchmark_listener: {contender.name}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def first_event(model: Path, speech: NDArray[np.int16]) -> float:
    """Return the CPU seconds that ``ser-edge listen`` takes from its start to its first event."""
    command: list[str | Path] = [sys.executable, "-m", "edge_runtime", "listen", model, "-", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin and process.stdout
        process.stdin.write(speech[: 2 * RATE].tobytes())
        process.stdin.flush()
        process.stdout.readline()
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
        process.kill()
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def measure(rounds: int, folder: Path) -> Iterator[Cost]:
    """Measure every contender, all of them in each round; the quickest counts."""
    found: dict[str, list[tuple[dict[str, float], dict[str, float], float | None]]] = {}
    with tempfile.TemporaryDirectory() as name:
        files = {kind: Path(name) / f"{kind}.npy" for kind in ("speech", "silence")}
        speech = speech_minute(Path(name))
        np.save(files["speech"], speech)
        np.save(files["silence"], np.round(room(SECONDS, 2) * 32767).astype(np.int16))
        turns = [contender for _ in range(rounds) for contender in CONTENDERS]
        for contender in track(turns, "listening", console=Console(stderr=True)):
            first = first_event(folder / contender.model, speech) if contender.program is OURS else None
            results = [run(contender, files[kind], folder) for kind in files]
            found.setdefault(contender.name, []).append((results[0], results[1], first))
    for contender_name, rounds_of_it in found.items():
        firsts = [first for _, _, first in rounds_of_it if first is not None]
        yield Cost(
            contender_name,
            min(speech["cpu"] for speech, _, _ in rounds_of_it),
            min(silence["cpu"] for _, silence, _ in rounds_of_it),
            min(speech["memory"] for speech, _, _ in rounds_of_it),
            int(rounds_of_it[0][0]["scores"]),
            min(firsts, default=None),
        )


# What is said of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Something that is to hold.

    Attributes:
        name: in words.
        measured: a number.
        limit: that it must not exceed.
    """

    name: str
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.measured <= self.limit


def targets(costs: dict[str, Cost]) -> list[Target]:
    """Return what is to hold of the costs."""
    resnet9, cnn6 = (costs[OURS_BY_NETWORK[name]] for name in NETWORKS)
    litert = costs["ser-edge cnn6 int8 stream.tflite"]
    neighbour, by_hand = costs["pymicro-wakeword"], costs["by hand cnn6 fp32"]
    first = max(cost.first_event or 0.0 for cost in costs.values())
    return [
        Target("speech: ResNet-9 over pymicro-wakeword", resnet9.speech / neighbour.speech, 1.0),
        Target("speech: CNN-6 over its loop by hand", cnn6.speech / by_hand.speech, 1 / 60),
        Target("silence: ResNet-9 over pymicro-wakeword", resnet9.silence / neighbour.silence, 0.25),
        Target("memory of CNN-6 with LiteRT, MB", litert.memory, 80.0),
        Target("memory of CNN-6 with onnxruntime, MB", cnn6.memory, 110.0),
        Target("first event, CPU seconds", first, 1.0),
    ]


def print_tables(costs: dict[str, Cost], found: list[Target]) -> None:
    ours = costs[OURS_BY_NETWORK["resnet9"]]
    table = Table("CPU s a minute", "speech", "ratio", "silence", "ratio", "memory MB", "scores", "first event s")
    for cost in costs.values():
        table.add_row(
            cost.contender, f"{cost.speech:.3f}", f"{cost.speech / ours.speech:.1f}", f"{cost.silence:.4f}",
            f"{cost.silence / ours.silence:.1f}", f"{cost.memory:.0f}", str(cost.scores),
            "" if cost.first_event is None else f"{cost.first_event:.2f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(table)
    verdicts = Table("target", "measured", "at most", "met")
    for target in found:
        verdicts.add_row(target.name, f"{target.measured:.4g}", f"{target.limit:.4g}", "yes" if target.met else "NO")
    console.print(verdicts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON: costs, targets, seconds taken")
    options = parser.parse_args()
    began, folder = time.monotonic(), cache_folder()
    make_models(folder)
    costs = {cost.contender: cost for cost in measure(options.rounds, folder)}
    found = targets(costs)
    if options.json:
        told = [{**asdict(target), "met": target.met} for target in found]
        print(json.dumps({"costs": list(map(asdict, costs.values())), "targets": told}))
    else:
        print_tables(costs, found)
    print(f"benchmark_listener: took {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
