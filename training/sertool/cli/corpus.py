"""``sertool corpus``: which corpora are known, manifests from them, and what is wrong with a manifest."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.errors import UsageError, nearest
from sertool.cli.console import print_json, progress_bar

if TYPE_CHECKING:
    from sertool.corpora.check import Finding
    from sertool.corpora.corpus import Corpus
    from sertool.corpora.manifest import Clip, Manifest

app = typer.Typer(no_args_is_help=True, help="List, make and check corpora.")

# What stands where the name of a published corpus would, and what it is.
_OWN_SOURCES = {
    "folder": "your own clips; label and speaker stand in their paths",
    "csv": "your own table, with any column names",
    "synthetic": "spoken by espeak-ng on this machine; no download",
}
_OWN_OPTIONS = {
    "folder": {"--root", "--language", "--speaker-pattern", "--label-pattern"},
    "csv": {
        *("--table", "--root", "--language", "--file-column", "--speaker-column", "--label-column"),
        *("--gender-column", "--sentence-column"),
    },
    "synthetic": {"--root", "--language", "--speakers", "--sentences"},
}
# Findings of one kind that a check prints for people.
_SHOWN = 5
_FOLDER = "Only for folder"
_CSV = "Only for csv"
_SYNTHETIC = "Only for synthetic"


@app.command("list")
def list_corpora(
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the corpora that have an adapter: language, size, emotions, licence and where to get them.

    Example: sertool corpus list
    """
    from sertool.corpora.adapters import CORPORA

    if json:
        fields = ("name", "title", "language", "speakers", "clips", "labels", "licence", "home", "layout")
        print_json([{field: getattr(corpus, field) for field in fields} for corpus in CORPORA.values()])
        return
    for corpus in CORPORA.values():
        typer.echo(
            f"{corpus.name:14} {corpus.language}  {corpus.speakers or '?':>3} speakers  {len(corpus.labels)} labels  "
            f"{corpus.clips or '?':>5} clips  {corpus.licence:34}  {corpus.home}"
        )
    for name, what in _OWN_SOURCES.items():
        typer.echo(f"{name:14} {what}")


@app.command()
def make(
    name: Annotated[str, typer.Argument(help="A corpus of 'sertool corpus list', or folder, csv, synthetic.")],
    root: Annotated[Path | None, typer.Option(help="The corpus' folder; for csv, where relative files lie.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest to write.")] = Path("manifest.csv"),
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a label; may be repeated.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Leave a label out; may be repeated.")] = None,
    all_labels: Annotated[
        bool, typer.Option("--all-labels", help="Keep labels that publications leave out (DEMoS: neutral).")
    ] = False,
    relative: Annotated[
        bool, typer.Option("--relative", help="Write files relative to the manifest, not absolute.")
    ] = False,
    language: Annotated[
        str | None, typer.Option(help="Language code, for folder, csv and synthetic (synthetic: en, de, it).")
    ] = None,
    speaker_pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Its first group, in the path, is the speaker.", rich_help_panel=_FOLDER),
    ] = None,
    label_pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Its first group, in the path, is the label.", rich_help_panel=_FOLDER),
    ] = None,
    table: Annotated[Path | None, typer.Option(help="The table to read.", rich_help_panel=_CSV)] = None,
    file_column: Annotated[str | None, typer.Option(help="Column of the files.", rich_help_panel=_CSV)] = None,
    speaker_column: Annotated[str | None, typer.Option(help="Column of the speakers.", rich_help_panel=_CSV)] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.", rich_help_panel=_CSV)] = None,
    gender_column: Annotated[str | None, typer.Option(help="Column of the genders.", rich_help_panel=_CSV)] = None,
    sentence_column: Annotated[str | None, typer.Option(help="Column of the sentences.", rich_help_panel=_CSV)] = None,
    speakers: Annotated[
        int | None, typer.Option(help="How many speakers; 12 if not given.", rich_help_panel=_SYNTHETIC)
    ] = None,
    sentences: Annotated[
        int | None, typer.Option(help="How many sentences; 6 if not given.", rich_help_panel=_SYNTHETIC)
    ] = None,
) -> None:
    r"""Make a manifest: one row a clip, with file, speaker, label and what else the corpus tells.

    Examples:

      sertool corpus make emodb --root ~/corpora/emodb -o emodb.csv

      sertool corpus make ravdess --root ~/corpora/ravdess --rename calm=neutral -o ravdess.csv

      sertool corpus make iemocap --root ~/corpora/IEMOCAP --rename excitement=happiness -o iemocap.csv
      (the usual four classes, 5531 clips)

      sertool corpus make folder --root recordings -o mine.csv      (recordings/SPEAKER/LABEL/clip.wav)

      sertool corpus make folder --root recordings --speaker-pattern '([^/_]+)_[^/]*$' -o mine.csv
      (recordings/LABEL/SPEAKER_clip.wav)

      sertool corpus make csv --table clips.csv --file-column path --label-column emotion -o mine.csv

      sertool corpus make synthetic --root synthetic/en -o synthetic-en.csv
    """
    from sertool.corpora.adapters import relabelled

    _refuse_other_suffix(output)
    renames = parse_renames(rename or [])
    options = {
        "--language": language,
        "--speaker-pattern": speaker_pattern,
        "--label-pattern": label_pattern,
        "--table": table,
        "--file-column": file_column,
        "--speaker-column": speaker_column,
        "--label-column": label_column,
        "--gender-column": gender_column,
        "--sentence-column": sentence_column,
        "--speakers": speakers,
        "--sentences": sentences,
        "--all-labels": all_labels or None,
    }
    given = {option: value for option, value in options.items() if value is not None}
    _save(relabelled(_clips(name, root, given), renames, drop or []), output, relative)


@app.command()
def join(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="Two or more manifests.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The manifest to write.")] = Path("joined.csv"),
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a label; may be repeated.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Leave a label out; may be repeated.")] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="Write files relative to the manifest, not absolute.")
    ] = False,
) -> None:
    """Join corpora into one manifest, their speakers told apart: to pretrain on, or for one model of many languages.

    Labels are joined by name; --rename makes those of one meaning one.

    Example: sertool corpus join ravdess.csv nemo.csv ased.csv --rename surprised=surprise -o sources.csv
    """
    from sertool.corpora.adapters import relabelled
    from sertool.corpora.join import joined, partial_labels
    from sertool.corpora.manifest import load_manifest

    _refuse_other_suffix(output)
    if len(manifests) < 2:
        raise UsageError(f"{manifests[0]}: one manifest alone; give two or more to join")
    every = joined([load_manifest(path) for path in manifests])
    clips = relabelled(every, parse_renames(rename or []), drop or [])
    _save(clips, output, relative)
    for label, names in partial_labels(clips).items():
        typer.echo(f"note: {label!r} only in {', '.join(names)}", err=True)


def _refuse_other_suffix(output: Path) -> None:
    if output.suffix != ".csv":
        raise UsageError(f"{output}: a manifest is written as CSV; give a name that ends in .csv")


def _save(clips: list[Clip], output: Path, relative: bool) -> None:
    from sertool.corpora.manifest import Manifest

    if relative:
        folder = output.parent.resolve()
        clips = [replace(clip, file=os.path.relpath(clip.path, folder)) for clip in clips]
    manifest = Manifest(tuple(clips), output)
    manifest.save(output)
    typer.echo(f"{output}: {summary(manifest)}")
    if len(manifest.labels) == 1:
        typer.echo(f"note: one label only, {manifest.labels[0]!r}: a network has nothing to tell apart", err=True)


def _clips(name: str, root: Path | None, given: dict[str, Any]) -> list[Clip]:
    from sertool.corpora.adapters import CORPORA

    if name not in _OWN_SOURCES and name not in CORPORA:
        raise UsageError(f"corpus {name!r} is not known; {nearest(name, [*CORPORA, *_OWN_SOURCES])}")
    stray = sorted(set(given) - _OWN_OPTIONS.get(name, {"--all-labels"}))
    if stray:
        raise UsageError(f"{stray[0]} does not apply to {name}; see: sertool corpus make --help")
    if name == "csv":
        return _table_clips(root, given)
    if root is None:
        what = "write the clips to" if name == "synthetic" else "read the clips from"
        raise UsageError(f"give --root DIR, the folder to {what}")
    if name == "folder":
        from sertool.corpora.own_data import folder_clips

        return folder_clips(
            root, given.get("--speaker-pattern"), given.get("--label-pattern"), given.get("--language", "")
        )
    if name == "synthetic":
        return _synthetic_clips(root, given)
    return _published_clips(CORPORA[name], root, "--all-labels" in given)


def _published_clips(corpus: Corpus, root: Path, all_labels: bool) -> list[Clip]:
    from sertool.corpora.adapters import corpus_clips

    clips = corpus_clips(corpus, root, lambda what: typer.echo(f"note: {corpus.title}: {what}", err=True))
    usual = [clip for clip in clips if clip.label not in corpus.left_out]
    if corpus.clips is not None and len(usual) != corpus.clips:
        typer.echo(f"note: {corpus.title} has {corpus.clips} clips when complete, {root} has {len(usual)}", err=True)
    return clips if all_labels else usual


def _table_clips(root: Path | None, given: dict[str, Any]) -> list[Clip]:
    from sertool.corpora.own_data import table_clips

    if "--table" not in given:
        raise UsageError("give --table FILE, the table to read")
    columns = {
        column: given[f"--{column}-column"]
        for column in ("file", "speaker", "label", "gender", "sentence")
        if f"--{column}-column" in given
    }
    return table_clips(given["--table"], root, columns, given.get("--language", ""))


def _synthetic_clips(root: Path, given: dict[str, Any]) -> list[Clip]:
    from sertool.corpora.synthetic import PROSODY, synthesise

    speakers, sentences = given.get("--speakers", 12), given.get("--sentences", 6)
    spoken = synthesise(root, given.get("--language", "en"), speakers, sentences)
    with progress_bar() as progress:
        return list(progress.track(spoken, total=speakers * sentences * len(PROSODY), description="speaking"))


def parse_renames(texts: list[str]) -> dict[str, str]:
    """Read the values of ``--rename``.

    Raises:
        UsageError: one is not OLD=NEW.
    """
    pairs = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--rename {text!r}: write OLD=NEW, such as calm=neutral")
        pairs[old] = new
    return pairs


def summary(manifest: Manifest) -> str:
    """Say in one line what a manifest holds."""
    genders = Counter(manifest.genders.values())
    known = f" ({genders['f']} f, {genders['m']} m)" if genders["f"] + genders["m"] else ""
    labels = Counter(clip.label for clip in manifest.clips)
    return f"{len(manifest)} clips, {len(manifest.speakers)} speakers{known}, {len(labels)} labels: " + ", ".join(
        f"{label} {labels[label]}" for label in manifest.labels
    )


@app.command()
def check(
    path: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The manifest to check.")],
    shortest: Annotated[float, typer.Option(help="Shorter clips are a problem (seconds).")] = 0.3,
    longest: Annotated[float, typer.Option(help="Longer clips are a problem (seconds).")] = 300.0,
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="Report this kind, but as no problem; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Decode every clip and list all that is wrong; the exit code is 1 if there is a problem.

    Kinds: row, unreadable, truncated, silent, too short, too long, past the end, clipped, duplicate, gender,
    spelling, one speaker, one label, narrow band.

    The first of each kind are shown, --json prints all.

    Problems you know of and live with become remarks with --accept.

    Examples:

      sertool corpus check manifest.csv

      sertool corpus check manifest.csv --accept clipped --accept "narrow band" --json
    """
    from sertool.corpora.check import KINDS, check_manifest
    from sertool.corpora.manifest import read_manifest

    accepted = set(accept or [])
    for kind in sorted(accepted - set(KINDS)):
        raise UsageError(f"--accept {kind!r}: no such kind; {nearest(kind, KINDS)}")
    if not 0 <= shortest < longest:
        raise UsageError(f"--shortest {shortest:g} must be less than --longest {longest:g}, and neither negative")
    manifest, faults = read_manifest(path)
    with progress_bar() as progress:
        report = check_manifest(
            manifest,
            shortest,
            longest,
            lambda heard: progress.track(heard, total=len(manifest), description="decoding"),
            faults,
        )
    problems = [finding for finding in report.findings if finding.kind not in accepted]
    remarks = [finding for finding in report.findings if finding.kind in accepted]
    if json:
        print_json(
            {
                "clips": len(manifest),
                "speakers": len(manifest.speakers),
                "labels": dict(sorted(Counter(clip.label for clip in manifest.clips).items())),
                "seconds": round(report.seconds, 3),
                "problems": [asdict(finding) for finding in problems],
                "remarks": [asdict(finding) for finding in remarks],
            }
        )
    else:
        for kind in KINDS:
            _print_findings(kind, [finding for finding in report.findings if finding.kind == kind], kind in accepted)
        typer.echo(f"{path}: {summary(manifest)}; {report.seconds / 60:.1f} minutes")
        typer.echo(f"{path}: {len(problems)} problem(s), {len(remarks)} remark(s)")
    if problems:
        raise typer.Exit(1)


def _print_findings(kind: str, findings: list[Finding], accepted: bool) -> None:
    from sertool.corpora.check import PREVENTS_TRAINING

    if not findings:
        return
    name = f"{kind} (accepted)" if accepted else kind
    for finding in findings[:_SHOWN]:
        typer.echo(f"{name}: {finding.subject}: {finding.detail}")
    hidden = f", {len(findings) - _SHOWN} not shown" if len(findings) > _SHOWN else ""
    if accepted:
        remedy = ""
    elif kind in PREVENTS_TRAINING:
        remedy = "; training needs it mended"
    else:
        remedy = f"; to live with it: --accept {shlex.quote(kind)}"
    typer.echo(f"{name}: {len(findings)} in all{hidden}{remedy}")
