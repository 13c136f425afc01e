"""The command ``ser-edge``. Nothing heavy is imported before the command that needs it is known."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import threading
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from edge_runtime import __version__
from edge_runtime.errors import SerError, UsageError, nearest
from edge_runtime.options import add_settings_options, settings_from
from edge_runtime.sinks.options import add_sink_options, open_sinks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_runtime.artifact import Artifact
    from edge_runtime.listener import Listener
    from edge_runtime.recognizer import Recognizer
    from edge_runtime.settings import Settings
    from edge_runtime.sinks import Fanout
    from edge_runtime.sources import Source

EXAMPLES = """\
examples:
  ser-edge listen
  ser-edge info model.onnx
  ser-edge verify model.onnx
  ser-edge file model.onnx interview.wav *.flac --json
  ser-edge devices
  ser-edge listen model.onnx --device USB
  ser-edge listen model.onnx --json --hop 0.25 | your-program
  ser-edge listen model.onnx --enter anger=0.7 --min-duration 2 --refractory 30 --exec 'python3 lamp.py'
  ser-edge listen model.onnx --settings settings.toml
  ser-edge listen model.onnx --output events.jsonl --mqtt broker.local --mqtt-discovery
  ser-edge listen model.onnx --web 8765
  ser-edge calibrate model.onnx --device USB
  ser-edge bench model.onnx
  ser-edge doctor model.onnx --device USB
  arecord -q -t raw -f S16_LE -r 16000 | ser-edge listen model.onnx -
"""

HUNG_S = 10.0
"""Time that a block of audio may take before the service manager is no longer told that we are alive."""

MODEL_HELP = "model file, or the name of an installed model (default: the only one installed)"

CHANNEL_HELP = "which of its channels, from 1 (default: their mean)"

NO_CALIBRATION_HELP = "take the model's own constants, though 'ser-edge calibrate' has measured others"

MUCH_CLIPPED = 0.001
"""Share of the samples at full scale from which a calibration is that of a microphone turned up too far."""

LONG_RECORDING_S = 60.0
"""From this length on, progress is shown: shorter ones take a second or two."""


def main() -> None:
    """Run ``ser-edge``; a failure is one line on stderr, exit code 2 for usage, 1 for anything else."""
    # numpy reads this when it is imported. More threads would only spin between the short calls made here.
    for library in ("OPENBLAS", "OMP", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    arguments = _parser().parse_args()
    try:
        _find_models(arguments)
        status = arguments.command(arguments)
        sys.stdout.flush()
    except SerError as error:
        _complain(str(error))
        status = error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough. Without this, Python would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except OSError as error:
        _complain(f"{error.filename or 'output'}: {error.strerror or error}")
        status = 1
    except KeyboardInterrupt:
        _complain("interrupted")
        status = 130
    sys.exit(status)


def _find_models(arguments: argparse.Namespace) -> None:
    """Put files in the place of the names of installed models, and of none."""
    from edge_runtime.installed import find_model

    # The doctor also examines a board that has no model yet.
    if "model" in arguments and not (arguments.model is None and arguments.command is _doctor):
        arguments.model = str(find_model(arguments.model))
    if "others" in arguments:
        arguments.others = [str(find_model(other)) for other in arguments.others]


def _complain(message: str) -> None:
    print(f"ser-edge: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is."""
        self.exit(UsageError.exit_code, f"ser-edge: {message}; see: {self.prog} --help\n")


class _Command(_Parser):
    """Takes options anywhere: by itself argparse, before Python 3.13, gives up a SOURCE that follows an option."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what stands behind the command's name; the parsing of mixed arguments comes back here by parts."""
        if self._intermixed:
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            found, unknown = self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False
        if unknown and unknown[0].startswith("-"):
            options = re.findall(r"--[a-z-]+", self.format_help())
            self.error(f"unknown option {unknown[0]!r}; {nearest(unknown[0].split('=')[0], {*options})}")
        if unknown:
            self.error(f"one argument too many: {unknown[0]!r}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ser-edge",
        description="Recognise emotion in speech with a model made by: sertool export",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ser-edge {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Command)

    def command(name: str, function: Any, summary: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=function)
        added.add_argument("--json", action="store_true", help="write JSON, one object a line")
        return added

    info = command("info", _info, "show what a model file is, and check it", "ser-edge info model.onnx")
    info.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    info.add_argument("--card", action="store_true", help="print its model card alone: use, limits, data, results")

    check = command(
        "verify",
        _verify,
        "check a model file: bits, description, operators, self-test",
        "ser-edge verify model.onnx",
    )
    check.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)

    file = command("file", _file, "answer for recordings", "ser-edge file model.onnx a.wav b.wav")
    file.add_argument("model", metavar="MODEL", help="model file, or the name of an installed model")
    file.add_argument("audio", metavar="AUDIO", nargs="+", help="WAV files, or any format where soundfile is installed")
    file.add_argument("--channel", metavar="N", type=int, help=CHANNEL_HELP)
    file.add_argument("--no-calibration", action="store_true", help=NO_CALIBRATION_HELP)
    add_settings_options(file)

    calibrate = command(
        "calibrate",
        _calibrate,
        "measure a person's ordinary speech at this microphone, for a model that was trained for it",
        "ser-edge calibrate model.onnx --device USB",
    )
    _add_calibrate_options(calibrate)

    command("devices", _devices, "list the microphones", "ser-edge devices --json")

    bench = command("bench", _bench, "measure what a model costs on this board", "ser-edge bench model.onnx --json")
    bench.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    bench.add_argument("--seconds", metavar="S", type=float, default=20.0, help="of audio to listen to (default 20)")
    bench.add_argument("--threads", metavar="N", type=int, default=1, help="threads per inference (default 1)")
    add_settings_options(bench)

    doctor = command(
        "doctor", _doctor, "find what is broken between microphone and answer", "ser-edge doctor model.onnx"
    )
    doctor.add_argument("model", metavar="FILE", nargs="?", help="model file to be run")
    doctor.add_argument("--settings", metavar="FILE", help="read settings from a TOML file")
    doctor.add_argument("--device", metavar="NAME", help="microphone: its index or a part of its name")
    doctor.add_argument("--no-microphone", action="store_true", help="for applications that push their own audio")

    listen = command("listen", _listen, "answer live until interrupted", "ser-edge listen model.onnx --device USB")
    _add_listen_options(listen)
    return parser


def _add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "audio",
        metavar="AUDIO",
        nargs="*",
        help="instead of a microphone: recordings of the person, made with it",
    )
    parser.add_argument("--device", metavar="NAME", help="microphone: its index or a part of its name")
    parser.add_argument("--channel", metavar="N", type=int, help=CHANNEL_HELP)
    parser.add_argument(
        "--seconds", metavar="S", type=float, help="of speech to measure (default 30; of recordings, all)"
    )
    parser.add_argument(
        "--patience", metavar="S", type=float, default=300.0, help="give up after so long at a microphone (default 300)"
    )
    parser.add_argument(
        "--output", "-o", metavar="FILE", help="where to write it (default: where 'listen' looks for it)"
    )
    add_settings_options(parser)


def _add_listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "--and", metavar="FILE", dest="others", action="append", default=[], help="another model; may be given again"
    )
    parser.add_argument(
        "audio",
        metavar="AUDIO",
        nargs="?",
        help="instead of a microphone: a recording, at the pace of its time, or - for raw samples on standard input",
    )
    parser.add_argument("--device", metavar="NAME", help="microphone: its index or a part of its name")
    parser.add_argument("--channel", metavar="N", type=int, help=CHANNEL_HELP)
    parser.add_argument("--fast", action="store_true", help="take AUDIO as fast as possible, and leave out no score")
    parser.add_argument("--rate", metavar="HZ", type=int, help="of standard input (default 16000)")
    parser.add_argument("--channels", metavar="N", type=int, help="of standard input (default 1)")
    parser.add_argument(
        "--format", metavar="F", help="of standard input: u8, s16le, s24le, s32le or f32le (default s16le)"
    )
    parser.add_argument("--exit-on-loss", action="store_true", help="end when the source is lost; do not wait for it")
    parser.add_argument("--stall", metavar="S", type=float, help="seconds without a sample that are a loss (default 5)")
    parser.add_argument(
        "--digital-silence", metavar="S", type=float, help="seconds of exact zeros that are a loss (default 10)"
    )
    parser.add_argument("--retry", metavar="S", type=float, help="longest wait between attempts to reopen (default 30)")
    parser.add_argument(
        "--buffer", metavar="S", type=float, help="captured audio that may wait for inference, seconds (default 10)"
    )
    parser.add_argument("--no-calibration", action="store_true", help=NO_CALIBRATION_HELP)
    add_settings_options(parser)
    add_sink_options(parser)
    views = parser.add_argument_group("watching")
    views.add_argument(
        "--plain", action="store_true", help="on a terminal: a line for each event instead of the live view"
    )
    views.add_argument(
        "--web",
        metavar="[HOST:]PORT",
        help="show the live view as a page, to this machine alone or, with HOST, to whoever has the token",
    )


def _info(arguments: argparse.Namespace) -> int:
    from edge_runtime.errors import ArtifactError
    from edge_runtime.recognizer import Recognizer

    recognizer = Recognizer(arguments.model)
    size = recognizer.path.stat().st_size
    if arguments.card and not recognizer.artifact.card:
        raise ArtifactError(f"{arguments.model}: carries no model card; export it again")
    if arguments.card:
        print(json.dumps({"card": recognizer.artifact.card}) if arguments.json else recognizer.artifact.card)
    elif arguments.json:
        found = {
            "file": str(recognizer.path),
            "bytes": size,
            "self_test": "passed",
            **asdict(recognizer.artifact),
        }
        print(json.dumps(found))
    else:
        print("\n".join(_describe(recognizer.artifact, str(recognizer.path), size)))
    return 0


def _describe(artifact: Artifact, path: str, size: int) -> list[str]:
    front_end = artifact.front_end
    rows = {
        "file": f"{path} ({size / 1e6:.2f} MB)",
        "labels": ", ".join(artifact.labels),
        "network": f"{artifact.network}, {artifact.precision}, {artifact.parameters:,} parameters, "
        f"{artifact.macs / 1e6:.1f} M multiply-adds a window",
        "window": f"{artifact.window_seconds:.2f} s ({artifact.window_frames} frames)",
        "form": _form(artifact),
        "front-end": f"{front_end.mel_bands} mel bands {front_end.min_hz:g} to {front_end.max_hz:g} Hz, "
        f"frame {front_end.window}, hop {front_end.hop}, {front_end.sample_rate} Hz",
        "temperature": f"{artifact.temperature:.3f}",
        "calibration": _calibration_of(artifact),
        "thresholds": ", ".join(f"{k} {v:.2f}" for k, v in artifact.thresholds.items()) or "none",
        "licence": artifact.licence,
        "self-test": "passed",
    }
    rows |= {f"on {part}": _result(found) for part, found in artifact.metrics.items()}
    rows |= _origin(artifact.provenance)
    return [f"{name:<12} {value}" for name, value in rows.items()]


def _calibration_of(artifact: Artifact) -> str:
    """Say what this installation knows of its speaker and its microphone."""
    from edge_runtime.calibration import Calibration, default_path

    if not artifact.normalization.personal:
        return "not trained for it"
    if not default_path().is_file():
        return "none; make one with: ser-edge calibrate"
    return f"{Calibration.load(default_path())} ({default_path()})"


def _form(artifact: Artifact) -> str:
    if artifact.form == "window":
        return "window: each score computes its whole window"
    feature, past = (frames / artifact.front_end.frame_rate for frames in (artifact.stride, artifact.receptive_field))
    return f"stream: every {feature:.3f} s is computed once, with the {past:.2f} s before it"


def _result(found: Any) -> str:
    """Say how good the model was on one part of its split."""
    if not isinstance(found, dict) or not isinstance(found.get("uar"), float):
        return json.dumps(found)
    interval = found.get("uar_interval")
    between = f" (95 % interval {interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return f"UAR {found['uar']:.1%}{between}, {found.get('items')} clips of {found.get('speakers')} unseen speakers"


def _origin(provenance: dict[str, Any]) -> dict[str, str]:
    """Say what the model was made of; the recipe and all versions are in the JSON form."""
    named = {
        "corpora": ", ".join(corpus.get("name") or "unnamed" for corpus in provenance.get("corpora", [])),
        "speakers": provenance.get("speakers"),
        "teacher": (provenance.get("teacher") or {}).get("name"),
        "made by": f"sertool {provenance['versions'].get('sertool')}" if "versions" in provenance else None,
    }
    return {name: str(value) for name, value in named.items() if value}


def _verify(arguments: argparse.Namespace) -> int:
    from edge_runtime.verify import CHECKS, verify

    checks = list(verify(arguments.model))
    if arguments.json:
        found = [asdict(check) for check in checks]
        print(json.dumps({"file": arguments.model, "passed": checks[-1].passed, "checks": found}))
    else:
        for check in checks:
            print(f"{check.name:<12} {'ok' if check.passed else 'FAILED':<8} {check.detail}")
        for name in CHECKS[len(checks) :]:
            print(f"{name:<12} not checked")
    return 0 if checks[-1].passed else 1


def _file(arguments: argparse.Namespace) -> int:
    (recognizer,), read_settings = _loaded(arguments, [arguments.model])
    settings = read_settings()
    status = 0
    for path in arguments.audio:
        try:
            result = _recognize_file(recognizer, settings, path)
        except SerError as error:
            _complain(str(error))
            status = 1
            continue
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            certainty = "" if result["probability"] is None else f"{result['probability']:.2f}"
            print(f"{result['label']:<12} {certainty:<5} {result['seconds']:8.2f} s  {path}", flush=True)
    return status


def _recognize_file(recognizer: Recognizer, settings: Settings, path: str) -> dict[str, Any]:
    """Return one recording's answer as a whole, and its events."""
    import numpy as np

    from edge_runtime.events import answer
    from edge_runtime.recordings import AudioFile
    from edge_runtime.session import Session

    artifact = recognizer.artifact
    source = AudioFile(path, artifact.front_end.sample_rate, settings.channel)
    session = Session(recognizer, settings)
    # Training cuts a clip to the window from its beginning: nothing after it enters the answer as a whole.
    clip = np.zeros(0, np.float32)
    events = []
    source.open()
    try:
        for block in source.blocks():
            events += session.push(block.samples)
            clip = np.concatenate([clip, block.samples])[: artifact.window_samples]
            _show_progress(path, session.position / artifact.front_end.sample_rate, source.seconds)
    finally:
        source.close()
    seconds = session.position / artifact.front_end.sample_rate
    events += session.finish()
    if any(event.probability is not None for event in events):
        whole = answer(session.recognizer.probabilities(clip), artifact, settings.threshold)
    else:
        whole = {"label": events[-1].label, "probability": None, "probabilities": {}}
    return {"file": path, "seconds": seconds, **whole, "events": [event.to_dict() for event in events]}


def _show_progress(path: str, done: float, total: float | None) -> None:
    """Say on a terminal how far a long recording is; ``done`` and ``total`` are seconds."""
    if total is not None and total >= LONG_RECORDING_S and sys.stderr.isatty():
        end = "\r\x1b[K" if done >= total else "\r"
        print(f"ser-edge: {path}: {min(done / total, 1.0):4.0%}", end=end, file=sys.stderr, flush=True)


def _calibrate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from edge_runtime.calibrate import ENOUGH_S, LEAST_S, Calibrator
    from edge_runtime.calibration import default_path
    from edge_runtime.errors import AudioError
    from edge_runtime.microphone import Microphone
    from edge_runtime.recognizer import Recognizer
    from edge_runtime.recordings import AudioFile

    if arguments.audio and arguments.device is not None:
        raise UsageError(f"both a microphone {arguments.device!r} and {arguments.audio[0]!r} to listen to; choose one")
    for name, value in {"seconds": arguments.seconds, "patience": arguments.patience}.items():
        if value is not None and not LEAST_S <= value <= 3600:
            raise UsageError(f"--{name} {value:g}; valid: {LEAST_S:g} to 3600")
    settings = replace(settings_from(arguments), exit_on_loss=True)
    recognizer = Recognizer(arguments.model)
    rate = recognizer.artifact.front_end.sample_rate
    calibrator = Calibrator(recognizer, settings)
    sources: list[Source] = [AudioFile(path, rate, settings.channel) for path in arguments.audio]
    enough = arguments.seconds or (math.inf if sources else ENOUGH_S)
    patience = math.inf if sources else arguments.patience
    for source in sources or [Microphone(settings, rate)]:
        with closing(source):
            source.open()
            if source.live:  # only now: what is said to a microphone that is not open yet is lost
                _complain(f"listening to {source.name}: talk or read aloud, calmly, as you usually do")
            calibrator.hear(source, enough, patience, _show_speech)
    name = ", ".join(arguments.audio) or source.name
    if source.live and calibrator.seconds < enough:
        raise AudioError(
            f"{name}: {calibrator.seconds:.0f} s of speech in {patience:g} s, not {enough:g}; speak closer to it, see "
            "what it hears with: ser-edge listen, or ask for less with --seconds"
        )
    found = calibrator.calibration(name)
    path = Path(arguments.output) if arguments.output else default_path()
    found.save(path)
    if arguments.json:
        print(json.dumps({"file": str(path), "clipped": calibrator.clipped, **asdict(found)}))
    else:
        print(f"{path}: {found}")
    if calibrator.clipped > MUCH_CLIPPED:
        _complain(f"{calibrator.clipped:.1%} of the speech is at full scale: turn {name} down and calibrate again")
    return 0


def _show_speech(seconds: float, enough: float) -> None:
    """Say on a terminal how much speech was measured."""
    if sys.stderr.isatty():
        of = f" of {enough:.0f}" if math.isfinite(enough) else ""
        end = "\r\x1b[K" if seconds >= enough else "\r"
        print(f"ser-edge: {seconds:.0f}{of} s of speech", end=end, file=sys.stderr, flush=True)


def _loaded(arguments: argparse.Namespace, paths: Sequence[str]) -> tuple[list[Recognizer], Callable[[], Settings]]:
    """Return the models, and what reads the settings for them from the options and their files, as often as asked."""
    from edge_runtime.recognizer import Recognizer

    settings_from(arguments)  # a mistake in them is said before models are looked for
    models = [Recognizer(path) for path in paths]
    return models, lambda: _calibrated(arguments, models)


def _calibrated(arguments: argparse.Namespace, models: Sequence[Recognizer]) -> Settings:
    """Return the settings, with the calibration of this installation where there is one for these models."""
    from edge_runtime.calibration import default_path

    settings = settings_from(arguments)
    asked = settings.calibration is not None or arguments.no_calibration
    if asked or not all(model.artifact.normalization.personal for model in models) or not default_path().is_file():
        return settings
    return replace(settings, calibration=default_path())


def _calibration_note(settings: Settings) -> str:
    from edge_runtime.calibration import Calibration

    return f"calibrated on {Calibration.load(settings.calibration)}; " if settings.calibration else ""


def _bench(arguments: argparse.Namespace) -> int:
    from edge_runtime.bench import bench

    for name, least in {"seconds": 1, "threads": 1}.items():
        if not least <= getattr(arguments, name) <= 3600:
            raise UsageError(f"--{name} {getattr(arguments, name):g}; valid: {least} to 3600")
    measured = bench(arguments.model, settings_from(arguments), arguments.seconds, arguments.threads)
    if arguments.json:
        print(json.dumps(measured.to_dict()))
        return 0
    board = measured.board
    states = [f"{board.temperature:.0f} °C"] if board.temperature is not None else []
    states += board.throttled or ()
    rows = {
        "board": ", ".join([board.model or "unknown", f"{board.cores} cores", *states]),
        "load": f"{measured.load:.2f} s",
        **{stage.name: f"{stage.median:.2f} ms (p95 {stage.p95:.2f})" for stage in measured.stages},
        "a second of speech": f"{1000 * measured.speech:.1f} ms of CPU (real-time factor {measured.speech:.4f}), "
        f"{measured.scores:.1f} scores",
        "a second of silence": f"{1000 * measured.silence:.2f} ms of CPU",
        "memory": "unknown" if measured.memory is None else f"{measured.memory / 1e6:.0f} MB",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(measured.verdict)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from edge_runtime.doctor import examine

    broken = False
    for finding in examine(arguments.model, settings_from(arguments), microphone=not arguments.no_microphone):
        print(json.dumps(finding.to_dict()) if arguments.json else finding, flush=True)
        broken |= finding.verdict == "broken"
    return int(broken)


def _devices(arguments: argparse.Namespace) -> int:
    from edge_runtime.errors import DeviceError
    from edge_runtime.microphone import input_devices

    devices = input_devices()
    if not devices:
        raise DeviceError("no microphone found; plug one in or start the sound server")
    for device in devices:
        if arguments.json:
            print(json.dumps(asdict(device)))
        else:
            mark = "*" if device.default else " "
            print(f"{mark} {device.index:>3}  {device.name}  ({device.channels} channels, {device.default_rate} Hz)")
    return 0


def _listen(arguments: argparse.Namespace) -> int:
    from edge_runtime.listener import Listener
    from edge_runtime.monitor import Monitor
    from edge_runtime.service import ServiceManager
    from edge_runtime.sinks import Fanout, LineSink

    models, read_settings = _loaded(arguments, [arguments.model, *arguments.others])
    settings = read_settings()
    source = _source(arguments, settings, models[0].artifact.front_end.sample_rate)
    ear = Listener(models if arguments.others else models[0], settings, source=source)
    lost_output: list[Exception] = []

    def end_without_output(error: Exception) -> None:
        lost_output.append(error)
        ear.stop()

    def say(message: str) -> None:
        monitor.say(message)
        if not (live and sys.stderr.isatty()):
            _complain(message)

    def health() -> dict[str, Any]:
        return {**ear.health().to_dict(), "undelivered": fanout.dropped}

    monitor = Monitor(
        ear,
        models[0].artifact.labels,
        undelivered=lambda: fanout.dropped,
        model=models[0].name if arguments.others else None,
    )
    live = _is_watched(arguments)
    with ExitStack() as views, Fanout(say=say, patient=not ear.source.live) as fanout:
        _answer_signals(ear, fanout, arguments, read_settings, say)
        if not live:
            fanout.add(LineSink(sys.stdout.fileno(), arguments.json), on_error=end_without_output)
        for sink in open_sinks(arguments, say=say, health=health):
            fanout.add(sink)
        note = f"{_calibration_note(settings)}end with Ctrl-C"
        if arguments.web is not None:
            from edge_runtime.web import LivePage

            note += f"; page: {views.enter_context(LivePage(monitor, arguments.web)).url}"
        _keep_stderr_for_ourselves()
        with ear, ServiceManager(alive=lambda: ear.health().busy < HUNG_S) as manager:
            manager.ready(f"listening to {ear.source.name}")
            _complain(f"listening to {ear.source.name}; {note}")
            if live:
                from edge_runtime.liveview import LiveView

                views.enter_context(LiveView(monitor, sys.stdout.fileno(), note, end_without_output))
            for event in ear:
                fanout.send(event)
                monitor.note(event)
                if event.kind == "source_lost" and not settings.exit_on_loss:
                    manager.status(f"waiting: {event.detail}")
                    say(f"{event.detail}; waiting for it")
                elif event.kind == "source_restored":
                    manager.status(f"listening to {ear.source.name}")
                    say(f"hears {ear.source.name} again")
    if skipped := ear.health().coalesced:
        _complain(f"inference could not keep up: {skipped} scores were left out; a longer --hop needs fewer")
    if lost_output:
        raise lost_output[0]
    return 0


def _answer_signals(
    ear: Listener,
    fanout: Fanout,
    arguments: argparse.Namespace,
    settings: Callable[[], Settings],
    say: Callable[[str], None],
) -> None:
    """End at Ctrl-C and SIGTERM; at SIGHUP, reread settings file and calibration, or end where there is none."""

    def stop(*_: object) -> None:
        fanout.patient = False
        ear.stop()

    def reread(*_: object) -> None:
        threading.Thread(target=_reread, args=(ear, arguments.settings, settings, say, hang_up)).start()

    # A terminal that goes away ends us, unless nohup has asked for the contrary.
    hang_up = (lambda: None) if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else stop
    for interruption in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interruption, stop)
    signal.signal(signal.SIGHUP, reread)


def _reread(
    ear: Listener,
    file: str | None,
    settings: Callable[[], Settings],
    say: Callable[[str], None],
    hang_up: Callable[[], None],
) -> None:
    """Take changed files over; on a thread, because a signal may come in the middle of anything."""
    try:
        wanted = settings()
        files = [str(named) for named in (file, wanted.calibration) if named]
        if not files:
            hang_up()
            return
        ear.update(wanted)
    except SerError as error:
        say(f"{error}; listening goes on with the settings of before")
    else:
        say(f"listens with the settings in {' and '.join(files)}")


def _is_watched(arguments: argparse.Namespace) -> bool:
    """Return whether standard output is a terminal to draw on, on which no command of the user's writes, too."""
    if arguments.plain or arguments.json or arguments.fast or not sys.stdout.isatty():
        return False
    from edge_runtime.liveview import is_fit

    return is_fit(sys.stdout.fileno()) and not (arguments.exec and sys.stderr.isatty())


def _source(arguments: argparse.Namespace, settings: Settings, sample_rate: int) -> Source | None:
    """Return what the arguments name, or None for a microphone."""
    from edge_runtime.recordings import AudioFile, RawAudio, RealTime

    form = {"rate": arguments.rate, "channels": arguments.channels, "encoding": arguments.format}
    form = {name: value for name, value in form.items() if value is not None}
    if form and arguments.audio != "-":
        raise UsageError("--rate, --channels and --format describe standard input; name it: ser-edge listen FILE -")
    if arguments.audio is None:
        if arguments.fast:
            raise UsageError("--fast is for recordings and pipes; a microphone is as fast as time")
        return None
    if arguments.device is not None:
        raise UsageError(f"both a microphone {arguments.device!r} and {arguments.audio!r} to listen to; choose one")
    if arguments.audio == "-":
        return RawAudio(0, sample_rate, settings=settings, live=not arguments.fast, **form)
    recording = AudioFile(arguments.audio, sample_rate, settings.channel)
    return recording if arguments.fast else RealTime(recording, sample_rate)


def _keep_stderr_for_ourselves() -> None:
    """Silence PortAudio, which writes the names of its failed C expressions to standard error from its own thread."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
