"""``sertool networks``: what the networks cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from edge_runtime.errors import UsageError
from sertool.cli.console import OUTPUT, print_json, print_status


def networks(
    classes: Annotated[int, typer.Option(min=2, help="Number of labels.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.6, max=60, help="Length of the window.")] = 5.984,
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the networks, your own among them, with their parameters and the multiply-adds of one window.

    Example: sertool networks --classes 4 --seconds 3
    """
    from edge_runtime.frontend import FrontEnd
    from sertool.networks import build_network, count_macs, count_parameters
    from sertool.plugins import network_names

    front_end = FrontEnd()
    frames = front_end.frames(round(seconds * front_end.sample_rate))
    costs = {}
    for name in network_names():
        try:
            network = build_network(name, classes)
        except UsageError as error:
            print_status(f"sertool: {error}")  # the others are as good as before
            continue
        costs[name] = (count_parameters(network), count_macs(network, frames, front_end.mel_bands))
    if json:
        print_json({name: {"parameters": p, "macs": m, "frames": frames} for name, (p, m) in costs.items()})
        return
    table = Table("network", "parameters", f"multiply-adds, {seconds:g} s window ({frames} frames)")
    for name, (parameters, macs) in costs.items():
        table.add_row(name, f"{parameters / 1e6:.2f} M", f"{macs / 1e6:,.0f} M")
    OUTPUT.print(table)
