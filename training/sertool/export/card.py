"""The model card: what a file is for, what it was made of and what was measured of it, as Markdown.

After Mitchell et al., *Model Cards for Model Reporting* (2019). It says nothing that the file's description does not
hold, and where something was not measured, it says that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.artifact import Artifact
from edge_runtime.errors import UsageError

TITLE = "# Model card: "
NOT_MEASURED = "not measured"

INTENDED_USE = """\
The model says which of its labels a stretch of speech sounds most like. Suitable: voice interfaces that react to tone,
games, accessibility, research with consent, all with people who know that it is in use."""

LIMITS = """\
It does not know what a person feels. It gives one of its labels or `uncertain`, also for speech that is none of them.
Its answers differ between speakers, languages, microphones and rooms; the results below hold for the corpora named here
and for no other speech. Acted corpora differ from life. Measure it on your own recordings before you rely on it."""

FORBIDDEN = """\
In the European Union, Article 5(1)(f) of Regulation (EU) 2024/1689 (AI Act) prohibits AI systems that infer emotions of
natural persons at work and in education, except for medical or safety reasons. Other emotion recognition is high-risk
(Annex III), and people exposed to it must be told (Article 50(3)). Voices are personal data (Regulation (EU) 2016/679).
This model must not be used where these rules forbid it."""


def card_path(model: Path) -> Path:
    """Return where the card of a model file stands: beside it, one for each format of a name.

    Example:
        >>> card_path(Path("models/emotion.onnx")).name
        'emotion.onnx.md'
    """
    return model.with_name(f"{model.name}.md")


def refuse_foreign_card(path: Path) -> None:
    """Refuse to write a card over something else.

    Raises:
        UsageError: the file is none of our cards.
    """
    if path.is_file() and not path.read_bytes().startswith(TITLE.encode()):
        raise UsageError(f"{path}: not a model card, and would be replaced by one; choose another name for the model")


def model_card(artifact: Artifact, proven: dict[str, Any] | None = None) -> str:
    """Return the card of a file. The file's name is not on it, so that it may be renamed.

    Args:
        artifact: its description; the card that it may hold is not looked at.
        proven: an entry of parity.json: how the file answers test speakers; None where that was not measured.
    """
    provenance = artifact.provenance
    sections = {
        "What it is": _identity(artifact),
        "Intended use": [INTENDED_USE],
        "Limits": [LIMITS],
        "Forbidden use": [FORBIDDEN],
        "Training data": _data(provenance),
        "Results on speakers it never heard": _results(artifact),
        "Neutral speech": _alarms(provenance["export"].get("alarms")),
        "Calibration": _calibration(provenance["export"]["temperature"], "vouched_by" in provenance["export"]),
        "Agreement of this file with the trained network": _parity(provenance["export"]["parity"], proven),
        "Teacher": _teacher(provenance.get("teacher")),
        "Recipe": ["```json", json.dumps(provenance.get("recipe"), indent=2, ensure_ascii=False), "```"],
    }
    blocks = [f"{TITLE}emotion in speech by {artifact.network}, {artifact.precision}"]
    for heading, lines in sections.items():
        if lines:
            blocks.append(f"## {heading}\n\n" + "\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _identity(artifact: Artifact) -> list[str]:
    front_end = artifact.front_end
    thresholds = ", ".join(f"{label} {share:.2f}" for label, share in artifact.thresholds.items())
    versions = artifact.provenance["export"]["versions"]
    rows = {
        "labels": ", ".join(artifact.labels),
        "network": f"{artifact.network}, {artifact.precision}, as a {artifact.form}",
        "parameters": f"{artifact.parameters:,}",
        "multiply-adds a window": f"{artifact.macs:,}",
        "window": f"{artifact.window_seconds:.3f} s; "
        + (
            "what is shorter is heard once"
            if artifact.form == "stream"
            else "shorter clips are repeated, longer ones cut"
        ),
        "input": f"{front_end.sample_rate} Hz mono, {front_end.mel_bands} mel bands {front_end.min_hz:g} to "
        f"{front_end.max_hz:g} Hz, frame {front_end.window}, hop {front_end.hop} samples",
        "thresholds of `uncertain`": thresholds or "none",
        "licence of the weights": artifact.licence,
        "exported by": ", ".join(f"{package} {version}" for package, version in versions.items()),
    }
    return _table(("", ""), rows.items())


def _data(provenance: dict[str, Any]) -> list[str]:
    split = provenance["split"]
    corpora = [(corpus["name"] or "unnamed", corpus["licence"]) for corpus in provenance["corpora"]]
    started = provenance["recipe"]["training"].get("start")
    trained = " and ".join(provenance["recipe"]["data"]["parts"])
    return [
        *_table(("corpus", "licence"), corpora),
        "",
        f"Split `{provenance['split_hash']}` ({split['protocol']}), fold {split['fold']} of {split['folds']}: "
        f"{split['train_speakers']} speakers to train, {split['validation_speakers']} to validate, "
        f"{split['test_speakers']} to test; none stands in two parts. Trained on: {trained}.",
        *(["", "Its weights began with those of an earlier run, whose corpora are among these."] if started else []),
    ]


def _results(artifact: Artifact) -> list[str]:
    if not artifact.metrics:
        return [f"{NOT_MEASURED.capitalize()}."]
    lines = []
    if folds := artifact.provenance["export"].get("vouched_by"):
        lines = [
            "This file's network was trained on all speakers, so nobody is left to test it. What follows are the "
            f"pooled results of {folds['folds']} networks of the same recipe (seed "
            f"{', '.join(map(str, folds['seeds']))}), each trained "
            f"without the speakers it was tested on: split `{folds['split_hash']}` ({folds['protocol']}).",
            "",
        ]
    for part, entry in artifact.metrics.items():
        lines += [*_result(part, entry, "The folds' networks" if folds else "The trained network"), ""]
    return lines[:-1]


def _result(part: str, test: dict[str, Any], who: str) -> list[str]:
    recalls, between = test["recall"], test.get("recall_interval", {})
    genders, of_gender = test["genders"], test.get("gender_interval", {})
    rows = [("UAR", _percent(test["uar"]), _interval(test["uar_interval"]))]
    rows += [("accuracy", _percent(test["accuracy"]), NOT_MEASURED)]
    rows += [(f"recall of {label}", _percent(recalls[label]), _interval(between.get(label))) for label in recalls]
    rows += [(f"UAR, gender {name}", _percent(genders[name]), _interval(of_gender.get(name))) for name in genders]
    if not genders:
        rows += [("UAR by gender", NOT_MEASURED, NOT_MEASURED)]
    heard = "heard once, as a stream" if test.get("form") == "stream" else "each repeated or cut to a window"
    if part.endswith("in-turn"):
        heard += ", each speaker's one after the other in random order, with statistics that run on"
    if part.endswith("calibrated"):
        heard += ", the device calibrated to the speaker's calm speech before (`ser-edge calibrate`)"
    return [
        f"{who} in float, {test['items']} clips of {test['speakers']} speakers, {heard}. "
        "The interval is that of other speakers (bootstrap over speakers); with fewer than ten it is rough.",
        "",
        *_table(("", "value", "95 % interval"), rows),
    ]


def _alarms(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    minutes = 60 * found["neutral_hours"]
    kept = ", ".join(f"{label} {_percent(share)}" for label, share in found["recall"].items())
    return [
        f"An emotion is named from a probability of {found['threshold']:.2f} on. Of {found['neutral_clips']} clips of "
        f"neutral speech of speakers unknown to the folds ({minutes:.1f} minutes), each answered once as a whole, "
        f"{found['false_alarms']} passed for an emotion; the same clips decided the threshold. While listening, "
        f"shorter stretches are answered too, and more may pass. Recall that is left: {kept}.",
    ]


def _calibration(found: dict[str, Any], vouched: bool) -> list[str]:
    temperature = found["temperature"]
    listeners = "speakers unknown to the folds" if vouched else "validation speakers"
    who = "the folds' networks" if vouched else "the trained network"
    how = (
        f"Not calibrated (temperature 1): {found['reason']}."
        if found["reason"]
        else f"Probabilities are softmax(logits / {temperature:.4f}); no other temperature gives a smaller negative "
        f"log-likelihood (NLL) on the {listeners}."
    )
    rows = []
    for part in ("validation",) if vouched else ("validation", "test"):
        name = listeners if part == "validation" else "test speakers"
        if measured := found[part]:
            cells = [[_percent(share) for share in measured["ece"]], [f"{nats:.3f}" for nats in measured["nll"]]]
            rows.append((f"{measured['clips']} clips of {name}", *(" to ".join(dict.fromkeys(c)) for c in cells)))
        else:
            rows.append((name, NOT_MEASURED, NOT_MEASURED))
    return [
        f"{how} Before and after it, {who} in float; ECE with 10 bins of equal width, NLL in nats:",
        "",
        *_table(("on", "ECE", "NLL"), rows),
    ]


def _parity(checked: dict[str, Any], proven: dict[str, Any] | None) -> list[str]:
    rows = [
        (
            f"{checked['clips']} clips of training speakers",
            _percent(checked["agreement"]),
            f"{checked['snr_db']:.0f} dB",
            f"{checked['max_error']:.2g}",
            NOT_MEASURED,
        )
    ]
    if proven:
        change = f"{100 * proven['difference']:+.2f} points, 95 % interval {_points(proven['difference_interval'])}"
        folds = f", {len(proven['folds'])} folds pooled" if len(proven["folds"]) > 1 else ""
        rows.append(
            (
                f"{proven['clips']} clips of {proven['speakers']} test speakers{folds}",
                _percent(proven["agreement"]),
                f"{proven['snr_db']:.0f} dB",
                f"{proven['max_error']:.2g}",
                change,
            )
        )
    lines = _table(("on", "same label", "logits SNR", "largest error of a logit", "UAR minus float"), rows)
    return (
        lines if proven else [*lines, "", "On test speakers: not measured (`sertool parity` does, before an export)."]
    )


def _teacher(teacher: dict[str, Any] | None) -> list[str]:
    if not teacher:
        return ["None: trained without a neighbour graph or distillation."]
    rows = {name.replace("_", " "): value for name, value in teacher.items() if not isinstance(value, dict)}
    lines = _table(("", ""), rows.items())
    if not teacher.keys() & {"corpora", "training_data"}:
        lines += ["", "What data it was trained on itself is not recorded here; see its own card."]
    return lines


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return a Markdown table; a bar in a cell stays a bar."""
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(columns)}", *lines[1:]]


def _percent(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{100 * share:.1f} %"


def _interval(ends: Sequence[float] | None) -> str:
    return NOT_MEASURED if ends is None else f"{_percent(ends[0])} to {_percent(ends[1])}"


def _points(ends: Sequence[float] | None) -> str:
    return NOT_MEASURED if ends is None else f"{100 * ends[0]:+.2f} to {100 * ends[1]:+.2f}"
