"""``sertool pretrain``: a network trained on other corpora, for the training on one's own to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.errors import UsageError
from sertool.cli.corpus import parse_renames, summary
from sertool.cli.train import train_run, with_absolute_paths
from sertool.recipe import load_recipe, preset


def pretrain(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="Corpora other than one's own.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/source"),
    recipe: Annotated[
        Path | None,
        typer.Option(help="The recipe.", show_default="sertool recipe new --preset pretraining"),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="Rename a label; may be repeated.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Leave a label out; may be repeated.")] = None,
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. network.width=0.5."),
    ] = [],  # noqa: B006
) -> None:
    """Train on all speakers of other corpora, whose labels are joined; the same command goes on where it stopped.

    A training on one's own corpus that begins with the result needs less data. Corpora are told apart: each is
    normalised by constants of its own. The licences of all of them hold for every model that follows.

    Examples:

      sertool pretrain ravdess.csv nemo.csv ased.csv --rename calm=neutral -o runs/source

      sertool train recipe.toml --from runs/source --fold all
    """
    from sertool.corpora.adapters import relabelled
    from sertool.corpora.join import joined
    from sertool.corpora.manifest import Manifest, load_manifest
    from sertool.corpora.splits import RELEASE, make_split

    manifest, split = output / "manifest.csv", output / "split.json"
    names = ", ".join(path.stem for path in manifests)
    given = [f"data.manifest='{manifest}'", f"data.split='{split}'", f"data.corpus='{names}'", *overrides]
    chosen = with_absolute_paths(load_recipe(recipe, given) if recipe else preset("pretraining", given))
    clips = relabelled(joined([load_manifest(path) for path in manifests]), parse_renames(rename or []), drop or [])
    sources = Manifest(tuple(clips), manifest)
    if manifest.is_file() and load_manifest(manifest).clips != sources.clips:
        raise UsageError(f"{output}: holds a run on other clips; give another folder with -o, or delete that one")
    output.mkdir(parents=True, exist_ok=True)
    sources.save(manifest)
    make_split(sources, RELEASE, seed=0).save(split)
    typer.echo(f"{manifest}: {summary(sources)}")
    train_run(chosen, output)
    typer.echo(f"{output}: trained; now train on your own corpus: sertool train RECIPE --from {output} --fold all")
