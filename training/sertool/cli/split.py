"""``sertool split``: divide the speakers of a corpus, and show a division."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sertool.cli.console import OUTPUT, print_json, print_status

if TYPE_CHECKING:
    from sertool.corpora.manifest import Manifest
    from sertool.corpora.splits import Fold, Split

FEWEST_TEST_SPEAKERS = 3
"""With fewer, a bootstrap over the test speakers says next to nothing."""

app = typer.Typer(no_args_is_help=True, help="Divide speakers into train, validation and test.")


@app.command()
def make(
    manifest: Annotated[Path, typer.Argument(help="The corpus.")],
    protocol: Annotated[str, typer.Option(help="loso, loco, kfold:K, fractions:A,B,C, paper or release.")],
    seed: Annotated[int, typer.Option(help="Decides which speakers fall together.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The split to write.")] = Path("split.json"),
) -> None:
    """Make a speaker-independent split, women and men in proportion where the manifest knows them.

    loso: every speaker tests once, all others train. loco: so every corpus of a joined manifest (leave one corpus out).
    kfold:K: K groups of speakers take turns. fractions:A,B,C: shares of the speakers for train, validation and test.
    paper: 10/8/6 speakers on RAVDESS, 27/25/16 on DEMoS.
    release: all train, for a model to be given away, which folds of the same recipe vouch for (sertool export --folds).

    Examples:

      sertool split make emodb.csv --protocol loso -o emodb-loso.json

      sertool split make emodb.csv --protocol kfold:5 --seed 1

      sertool split make mine.csv --protocol fractions:.4,.3,.3 -o split.json
    """
    from sertool.corpora.manifest import load_manifest
    from sertool.corpora.splits import make_split

    split = make_split(load_manifest(manifest), protocol, seed)
    split.save(output)
    fewest = min(len(fold.test) for fold in split.folds)
    if protocol.startswith("fractions") and fewest < FEWEST_TEST_SPEAKERS:
        print_status(
            f"{output}: tests {fewest} speaker{'s' if fewest > 1 else ''} only, the interval over speakers will be "
            "rough or absent; loso or kfold:K test everyone"
        )
    typer.echo(
        f"{output}: {protocol}, {len(split.folds)} fold(s), hash {split.hash}; see it: sertool split show {output}"
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="SPLIT", help="The split.")],
    manifest: Annotated[Path | None, typer.Argument(help="The corpus, to count women, men, clips and labels.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Show who is in which part, and with a manifest what each part holds.

    With a manifest, a split that cannot be trained on it (unknown speaker, label absent from training) is refused.

    Examples:

      sertool split show split.json

      sertool split show split.json emodb.csv
    """
    from sertool.corpora.manifest import load_manifest
    from sertool.corpora.splits import check_split, load_split

    split = load_split(path)
    corpus = None if manifest is None else load_manifest(manifest)
    if corpus is not None:
        check_split(split, corpus)
    rows = _rows(split, corpus)
    if json:
        print_json({"protocol": split.protocol, "seed": split.seed, "hash": split.hash, "parts": rows})
    else:
        _print(split, rows, with_clips=corpus is not None)


def _rows(split: Split, manifest: Manifest | None) -> list[dict[str, Any]]:
    from sertool.corpora.splits import PARTS

    return [
        {"fold": number, "part": part, **_described(fold, part, manifest)}
        for number, fold in enumerate(split.folds, start=1)
        for part in PARTS
        if fold.part(part)
    ]


def _described(fold: Fold, part: str, manifest: Manifest | None) -> dict[str, Any]:
    speakers = list(fold.part(part))
    if manifest is None:
        return {"speakers": speakers}
    genders = Counter(manifest.genders[speaker] for speaker in speakers)
    labels = Counter(manifest.clips[row].label for row in manifest.indices(speakers))
    return {
        "speakers": speakers,
        "women": genders["f"],
        "men": genders["m"],
        "clips": labels.total(),
        "labels": {label: labels[label] for label in manifest.labels},
    }


def _print(split: Split, rows: list[dict[str, Any]], with_clips: bool) -> None:
    table = Table(title=f"{split.protocol}, seed {split.seed}, hash {split.hash}")
    for column in ("fold", "part", *(["speakers", "F/M", "clips"] if with_clips else [])):
        table.add_column(column, no_wrap=True)
    table.add_column("clips per label" if with_clips else "speakers")
    for row in rows:
        cells = [str(row["fold"]), row["part"]]
        if with_clips:
            genders = f"{row['women']}/{row['men']}" if row["women"] or row["men"] else "-"
            cells += [str(len(row["speakers"])), genders, str(row["clips"])]
            cells.append("  ".join(f"{label} {count}" for label, count in row["labels"].items()))
        else:
            cells.append("  ".join(row["speakers"]))
        table.add_row(*cells)
    OUTPUT.print(table)
