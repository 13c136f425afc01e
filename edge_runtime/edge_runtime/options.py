"""The options of ``ser-edge`` that say how audio becomes events: one for each such field of the settings."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from edge_runtime.settings import FILES, PER_LABEL, PerLabel, Settings

PROBABILITY = "P|LABEL=P,..."
TEXTS = ("mode", *FILES)

DECIDING = {
    "mode": ("M", "window: answers each hop; utterance: one for each speech segment, at its end"),
    "hop": ("S", "seconds from one score to the next"),
    "threshold": (
        PROBABILITY,
        "smallest probability of an answer other than 'uncertain': one number, or anger=0.7,joy=0.8 (default: "
        "the model's own)",
    ),
    "enter": (
        PROBABILITY,
        "say with emotion_begin and emotion_end where emotions do: from a score of this on, or of labels that are "
        "named alone: anger=0.7 (default: say nothing of it)",
    ),
    "exit": (PROBABILITY, "end an emotion where a score falls below this (default: 0.15 below --enter)"),
    "min_duration": ("S", "shortest emotion that is mentioned, seconds"),
    "refractory": ("S", "seconds after an emotion in which the same does not begin again"),
    "calibration": ("FILE", "of a person and a microphone (default: what 'ser-edge calibrate' wrote on this machine)"),
}
SEGMENTS = {
    "min_audio": ("S", "seconds of a speech segment before its first score"),
    "max_segment": ("S", "longest speech segment, seconds"),
    "padding": ("S", "seconds before the first and after the last loud block that belong to a segment"),
    "hangover": ("S", "pause that ends a speech segment, seconds"),
    "silence": ("S", "seconds without speech after which no_speech says so"),
    "gate_margin": ("DB", "how far above the noise floor sound counts as speech"),
    "gate_minimum": ("DBFS", "level below which nothing counts as speech"),
    "vad": ("FILE", "silero_vad.onnx, to judge whether what is loud is a voice (default: the gate alone)"),
    "vad_threshold": ("P", "its probability from which it is"),
}


def add_settings_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--settings`` and the options that override the file."""
    parser.add_argument(
        "--settings", metavar="FILE", help="read settings from a TOML file: these options with '_' for '-', as keys"
    )
    defaults = {setting.name: setting.default for setting in fields(Settings)}
    for title, options in {"what is answered": DECIDING, "what is speech": SEGMENTS}.items():
        group = parser.add_argument_group(title)
        for name, (metavar, summary) in options.items():
            default = defaults[name]
            shown = f"{default:g}" if isinstance(default, float) else default
            group.add_argument(
                f"--{name.replace('_', '-')}",
                metavar=metavar,
                type=str if name in TEXTS else probability if name in PER_LABEL else float,
                help=summary if default is None else f"{summary} (default {shown})",
            )


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Return what the settings file says, overridden by the options that are given.

    Args:
        arguments: parsed by a parser with any fields of the settings as options, and maybe ``--settings``.

    Raises:
        UsageError: see :class:`~edge_runtime.settings.Settings`.
    """
    given: dict[str, Any] = {setting.name: getattr(arguments, setting.name, None) for setting in fields(Settings)}
    # A switch that is not given is False, and must not override the file.
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    file = getattr(arguments, "settings", None)
    return Settings.from_file(file, **given) if file else Settings(**given)


def probability(text: str) -> PerLabel:
    """Read a probability, or one by label.

    Example:
        >>> probability("0.7"), probability("anger=0.7,joy=0.8")
        (0.7, {'anger': 0.7, 'joy': 0.8})
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        return {label.strip(): float(number) for label, _, number in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; valid: 0.7, or by label: anger=0.7,joy=0.8") from None
