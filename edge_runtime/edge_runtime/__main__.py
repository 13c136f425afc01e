"""``python -m edge_runtime`` is ``ser-edge``."""

from edge_runtime.cli import main

main()
