"""The entry of ``sertool`` and ``python -m sertool``: light, so that Ctrl-C is one line from the first moment on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; see :func:`sertool.cli.main`."""
    try:
        from sertool.cli import main as run_command  # imports for some tenths of a second

        run_command()
    except KeyboardInterrupt:
        sys.stderr.write("sertool: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
