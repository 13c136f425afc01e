"""``sertool recipe``: write and check training recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edge_runtime.errors import UsageError
from sertool.files import write_text
from sertool.recipe import load_recipe, write_recipe
from sertool.recipe import preset as named_preset

app = typer.Typer(no_args_is_help=True, help="Write and check training recipes.")


@app.command()
def new(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.toml"),
    preset: Annotated[
        str,
        typer.Option(
            help="paper: as published; device: what did best as a stream on a board, in a quiet room; field: the same "
            "for noise, other distances and ser-edge calibrate; pretraining: what these may begin with."
        ),
    ] = "paper",
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value.")] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a recipe with a comment on every key.

    Examples:

      sertool recipe new recipe.toml

      sertool recipe new recipe.toml --preset device --set data.manifest=mine.csv
    """
    if path.is_file() and not force:
        raise UsageError(f"{path}: exists already; give another name or --force")
    write_text(path, write_recipe(named_preset(preset, overrides)))
    typer.echo(f"{path}: edit it, then run: sertool train {path} -o runs/first")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The recipe.")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value.")] = [],  # noqa: B006
) -> None:
    """Validate a recipe and print it whole, with every default.

    Example: sertool recipe check recipe.toml --set training.epochs=10
    """
    typer.echo(write_recipe(load_recipe(path, overrides)))
