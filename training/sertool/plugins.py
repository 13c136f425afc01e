"""Networks that other packages bring, found without importing them or torch.

A package offers a network by an entry point of the group ``sertool.networks``; :mod:`sertool.networks` says what it
must be. In the package's pyproject.toml::

    [project.entry-points."sertool.networks"]
    mynet = "mypackage.network:MyNet"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

GROUP = "sertool.networks"

BUILT_IN = ("vgg15", "resnet9", "cnn6", "mobilenet15")
"""The paper's networks; no package replaces them."""


def network_plugins() -> dict[str, EntryPoint]:
    """Return the entry points of installed networks by their names."""
    found = entry_points(group=GROUP)
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name) if entry.name not in BUILT_IN}


def network_names() -> tuple[str, ...]:
    """Return the names that a recipe may give as ``network.name``.

    Example:
        >>> network_names()[:2]
        ('vgg15', 'resnet9')
    """
    return (*BUILT_IN, *network_plugins())
