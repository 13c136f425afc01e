"""A sweep: one TOML file that says which trainings the experiment of the paper's section 3 is made of.

It is a recipe, which all cells share, with what differs between the cells written as lists:

    [data]                     a corpus by name, or a manifest and a split
    corpus = "emodb"

    [corpus]                   how manifest and split are made, where they are not given
    protocol = "kfold:5"

    [teachers.raw]             who embeds the clips
    source = "$SERTOOL_DATA/encoders/whisper-base-encoder"
    at = "layer:3"

    [graphs.raw]               what is joined by which teacher
    teacher = "raw"

    [[cells]]                  networks x (base and settings) x graphs x distances x layers x folds x seeds
    networks = ["resnet9"]
    settings = [[3, 0.01], [6, 0.1], [9, 0.1]]
    seeds = [0, 1, 2]

A cell is one setting with one seed: an ordinary run, or an ordinary folder of folds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from edge_runtime.errors import UsageError, nearest
from sertool.recipe import Data, Neighbours, Network, Recipe, Section, Training, explain, parse_recipe, read_toml

READY = files("sertool.paper").joinpath("sweeps")
"""The sweeps that are shipped and known by name."""

SHARED = ("data", "corpus", "network", "neighbours", "training")
"""Sections whose values ``--set`` may replace."""

OF_THE_CELLS = {
    "data": ("fold",),
    "network": ("name",),
    "neighbours": ("graph", "count", "alpha"),
    "training": ("seed",),
}
"""Keys of a recipe that differ between the cells."""

Part = Literal["validation", "test"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Part of the names of folders."""
Pair = Annotated[tuple[int, float], Field(strict=False)]
"""n and alpha."""


class Corpus(Section):
    """How manifest and split are made, where [data] does not name them, and what is reported."""

    root: str = Field("", description="folder of the corpus; empty: $SERTOOL_DATA/corpora and its name")
    protocol: str = Field("", description="of the split: loso, loco, kfold:K, fractions:A,B,C or paper")
    split_seed: int = Field(0, description="decides which speakers fall together")
    report: tuple[Part, ...] = Field(
        ("test",),
        min_length=1,
        strict=False,
        description="parts scored. test: by cells that train on data.parts; validation: by others that train on train",
    )


class Tuned(Section):
    """A teacher that the sweep tunes first; see: sertool teacher tune --help."""

    encoder: str = Field(description="folder of a speech encoder, or its name on the Hugging Face hub")
    corpus: str = Field(description="name of the corpus it is tuned on; see: sertool corpus list")
    root: str = Field("", description="folder of that corpus; empty: $SERTOOL_DATA/corpora and its name")
    manifest: str = Field("", description="its manifest; empty: made from root")
    split: str = Field("", description="its split; empty: made by protocol")
    protocol: str = Field("paper", description="of the split that is made")
    options: dict[str, Any] = Field(
        default_factory=dict, description="layer, freeze, epochs, batch_size, learning_rate, seed ... of the tuning"
    )


class Teacher(Section):
    """Who embeds the clips: one of source, tuned and embeddings."""

    source: str = Field("", description="encoder folder or hub name, tuned teacher or run, as for: sertool embed")
    tuned: str = Field("", description="name of a [tuned] section")
    embeddings: str = Field("", description="ready-made folder, as made by: sertool embed")
    at: str = Field(
        "",
        pattern=r"^(fc1|fc2|layer:[0-9]+)?$",
        description="what is embedded: fc1, fc2 or layer:K; empty: as embed does",
    )


class Graph(Section):
    """Which clips become neighbours; see: sertool graph --help."""

    teacher: str = Field(description="name of a [teachers] section")
    threshold: float = Field(0.99, ge=-1, le=1, description="smallest cosine of an edge")
    neighbours: int = Field(9, ge=1, description="most neighbours of a clip")
    centre: bool = Field(False, description="subtract the mean embedding first")
    mutual: bool = Field(False, description="keep an edge only if both ends choose each other")
    allow_seen: bool = Field(False, description="take a teacher that heard speakers held out here")


class Cells(Section):
    """A grid of cells: every network in its base form, and with every setting on every graph, for every seed."""

    networks: tuple[str, ...] = Field(("resnet9",), min_length=1, strict=False, description="which networks")
    width: float | None = Field(None, description="factor of the channels; left out: that of [network]")
    base: bool = Field(True, description="whether to train without neighbours, too")
    settings: tuple[Pair, ...] = Field((), strict=False, description="pairs of n and alpha")
    neighbours: tuple[int, ...] = Field((), strict=False, description="every n of these with every alpha")
    alphas: tuple[float, ...] = Field((), strict=False, description="every alpha of these with every n")
    graphs: tuple[str, ...] = Field((), strict=False, description="names of [graphs]; left out: all")
    distances: tuple[str, ...] = Field((), strict=False, description="left out: that of [neighbours]")
    layers: tuple[str, ...] = Field((), strict=False, description="of the student; left out: that of [neighbours]")
    folds: tuple[int, ...] = Field((), strict=False, description="numbers of the folds trained; left out: all")
    seeds: tuple[int, ...] = Field((0,), min_length=1, strict=False, description="a cell for each")

    @property
    def pairs(self) -> list[tuple[int, float]]:
        """Every (n, alpha), each once."""
        return list(dict.fromkeys([*self.settings, *product(self.neighbours, self.alphas)]))


class Sweep(Section):
    """A whole sweep."""

    data: Data = Data()
    corpus: Corpus = Corpus()
    network: Network = Network()
    neighbours: Neighbours = Neighbours()
    training: Training = Training()
    tuned: dict[Name, Tuned] = Field(default_factory=dict)
    teachers: dict[Name, Teacher] = Field(default_factory=dict)
    graphs: dict[Name, Graph] = Field(default_factory=dict)
    cells: tuple[Cells, ...] = Field(min_length=1, strict=False)

    def manifest(self, folder: Path) -> Path:
        """Return the manifest that is given, or the place of the one that is made."""
        given = "manifest" in self.data.model_fields_set
        return expand(self.data.manifest).absolute() if given else folder.absolute() / "manifest.csv"

    def split(self, folder: Path) -> Path:
        """Return the split that is given, or the place of the one that is made."""
        given = "split" in self.data.model_fields_set
        return expand(self.data.split).absolute() if given else folder.absolute() / "split.json"

    def trained_parts(self, part: Part) -> tuple[str, ...]:
        """Return the parts that a network is trained on whose scores on this part are reported."""
        return ("train",) if part == "validation" else self.data.parts

    def graph_folder(self, folder: Path, graph: str, part: Part) -> Path:
        """Return where a graph over the clips that are trained on is kept."""
        apart = self.trained_parts(part) != self.data.parts
        return folder.absolute() / "graphs" / (f"{part}-{graph}" if apart else graph)


@dataclass(frozen=True)
class Setting:
    """What a row of the tables is about: everything but the seed.

    Attributes:
        part: of the split, that is reported.
        network: its name.
        width: factor of its channels.
        graph: name of the graph; empty for the base form.
        count: n, at most so many neighbours; 0 for the base form.
        alpha: weight of the neighbour loss; 0 for the base form.
        distance: of embeddings.
        layer: whose embeddings of the student are compared.
        name: of its folders, without the seed.
    """

    part: Part
    network: str
    width: float
    graph: str
    count: int
    alpha: float
    distance: str
    layer: str
    name: str


@dataclass(frozen=True)
class Cell:
    """One setting with one seed.

    Attributes:
        setting: see there.
        seed: of weights, order and dropout.
        folds: numbers of the folds to train; empty for all.
        recipe: of its runs; each fold replaces data.fold.
        folder: where the folds lie.
    """

    setting: Setting
    seed: int
    folds: tuple[int, ...]
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


def load_sweep(source: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read and validate a sweep.

    Args:
        source: a TOML file, or the name of a sweep in :data:`READY`.
        overrides: ``section.key=value`` texts that replace what the file says.

    Raises:
        UsageError: no such sweep, bad TOML, an unknown key or name (with the nearest valid one), or a value that the
            field does not take.
    """
    path = find_sweep(source)
    content = read_toml(path, overrides, SHARED)
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, Sweep)}") from error
    try:
        _check(sweep)
        plan_cells(sweep, Path())  # a cell may have a value that no recipe takes
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return sweep


def find_sweep(source: str) -> Path:
    """Return the file of a sweep: as named, or the shipped one of this name.

    Raises:
        UsageError: there is neither.
    """
    if Path(source).is_file():
        return Path(source)
    ready = {
        path.name.removesuffix(".toml"): Path(str(path)) for path in READY.iterdir() if path.name.endswith(".toml")
    }
    if source not in ready:
        raise UsageError(f"{source}: no such file, nor a sweep that is shipped; {nearest(source, ready)}")
    return ready[source]


def expand(text: str) -> Path:
    """Return a path with ``~`` and variables such as ``$SERTOOL_DATA`` replaced.

    Raises:
        UsageError: a variable that is not set.
    """
    expanded = os.path.expandvars(text)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        advice = "; name the folder that holds corpora/ and encoders/: --data DIR" if unset[1] == "SERTOOL_DATA" else ""
        raise UsageError(f"{text}: the variable {unset[1]} is not set{advice}")
    return Path(expanded).expanduser()


def _check(sweep: Sweep) -> None:
    """Refuse what the fields alone do not show."""
    for section, keys in OF_THE_CELLS.items():
        for key in keys:
            if key in getattr(sweep, section).model_fields_set:
                raise UsageError(f"{section}.{key} differs between cells; give it in [[cells]]")
    given = sweep.data.model_fields_set
    if "manifest" not in given and not sweep.data.corpus:
        raise UsageError("names no corpus; give data.corpus, see: sertool corpus list, or data.manifest")
    if "split" not in given and not sweep.corpus.protocol:
        raise UsageError("names no split; give corpus.protocol, such as loso or kfold:5, or data.split")
    for name, teacher in sweep.teachers.items():
        if sum(map(bool, (teacher.source, teacher.tuned, teacher.embeddings))) != 1:
            raise UsageError(f"teachers.{name}: give one of source, tuned and embeddings")
        if teacher.tuned and teacher.tuned not in sweep.tuned:
            raise UsageError(
                f"teachers.{name}: no section [tuned.{teacher.tuned}]; {nearest(teacher.tuned, sweep.tuned)}"
            )
    for name, graph in sweep.graphs.items():
        if name == "base":
            raise UsageError("graphs.base: this name is taken by the training without neighbours")
        if graph.teacher not in sweep.teachers:
            raise UsageError(
                f"graphs.{name}.teacher = {graph.teacher!r}: no such section; {nearest(graph.teacher, sweep.teachers)}"
            )
    for number, cells in enumerate(sweep.cells, start=1):
        _check_cells(sweep, cells, f"cells.{number}")


def _check_cells(sweep: Sweep, cells: Cells, where: str) -> None:
    if bool(cells.neighbours) != bool(cells.alphas):
        raise UsageError(f"{where}: give neighbours and alphas together; every n is tried with every alpha")
    if cells.pairs and not sweep.graphs:
        raise UsageError(f"{where}: has settings of n and alpha, but the sweep has no [graphs]")
    if not cells.pairs and not cells.base:
        raise UsageError(f"{where}: trains nothing; give settings, or leave base = false out")
    most = max((count for count, _ in cells.pairs), default=0)
    for name in cells.graphs or sweep.graphs:
        if name not in sweep.graphs:
            raise UsageError(f"{where}.graphs: no section [graphs.{name}]; {nearest(name, sweep.graphs)}")
        if most > sweep.graphs[name].neighbours:
            raise UsageError(
                f"{where}: n = {most}, but graphs.{name} is cut at {sweep.graphs[name].neighbours} neighbours; "
                "raise its neighbours"
            )


def plan_cells(sweep: Sweep, folder: Path) -> list[Cell]:
    """Return the cells of a sweep, one seed after the other: the rows of the first are complete first.

    Args:
        sweep: what to train.
        folder: where everything goes.

    Raises:
        UsageError: a value that a recipe does not take, or two cells of one name that differ.
    """
    cells: dict[str, Cell] = {}
    for number, grid in enumerate(sweep.cells, start=1):
        for cell in _cells_of_grid(sweep, grid, folder, f"cells.{number}"):
            earlier = cells.setdefault(cell.name, cell)
            if earlier.recipe != cell.recipe:
                raise UsageError(f"cells.{number}: {cell.name} is the name of another cell, too; rename a graph")
            folds = sorted({*earlier.folds, *cell.folds}) if earlier.folds and cell.folds else ()
            cells[cell.name] = replace(earlier, folds=tuple(folds))
    return sorted(cells.values(), key=lambda cell: cell.seed)


def _cells_of_grid(sweep: Sweep, grid: Cells, folder: Path, where: str) -> Iterator[Cell]:
    for part, setting, seed in product(sweep.corpus.report, _forms(sweep, grid), grid.seeds):
        name = f"{setting.name}-seed{seed}" if part == "test" else f"{part}-{setting.name}-seed{seed}"
        of_part = replace(setting, part=part, name=name.removesuffix(f"-seed{seed}"))
        recipe = _recipe(sweep, of_part, seed, folder, where)
        yield Cell(of_part, seed, tuple(sorted(grid.folds)), recipe, folder / "cells" / name)


def _forms(sweep: Sweep, grid: Cells) -> Iterator[Setting]:
    """Give the base form of every network, then every network with every graph and setting."""
    width = sweep.network.width if grid.width is None else grid.width
    distance, layer = sweep.neighbours.distance, sweep.neighbours.layer
    for network in grid.networks:
        # What is the same in all cells stands in no name.
        title = network if width == sweep.network.width else f"{network}-width{width:g}"
        if grid.base:
            yield Setting("test", network, width, "", 0, 0.0, distance, layer, f"{title}-base")
        for graph, (count, alpha), other_distance, other_layer in product(
            grid.graphs or sweep.graphs, grid.pairs, grid.distances or [distance], grid.layers or [layer]
        ):
            words = [title, graph, f"n{count}", f"alpha{alpha:g}"]
            words += [other_distance] if other_distance != distance else []
            words += [f"student-{other_layer}"] if other_layer != layer else []
            yield Setting("test", network, width, graph, count, alpha, other_distance, other_layer, "-".join(words))


def _recipe(sweep: Sweep, setting: Setting, seed: int, folder: Path, where: str) -> Recipe:
    content: dict[str, Any] = {
        section: getattr(sweep, section).model_dump() for section in ("data", "network", "neighbours", "training")
    }
    content["data"] |= {
        "manifest": str(sweep.manifest(folder)),
        "split": str(sweep.split(folder)),
        "parts": sweep.trained_parts(setting.part),
    }
    content["network"] |= {"name": setting.network, "width": setting.width}
    content["training"] |= {"seed": seed}
    if setting.graph:
        content["neighbours"] |= {
            "graph": str(sweep.graph_folder(folder, setting.graph, setting.part)),
            "count": setting.count,
            "alpha": setting.alpha,
            "distance": setting.distance,
            "layer": setting.layer,
        }
    else:
        content["neighbours"] = {}  # nothing of it decides a training without neighbours
    return parse_recipe(content, where)
