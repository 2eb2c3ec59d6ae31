"""Prints the README's table of patches, or checks the plugin against the sources of a vLLM."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_cascade.patches import PATCHES, table


def main() -> int:
    """Run the command.

    Returns:
        The exit code: 1 if vLLM has moved under the plugin, 2 if there is no vLLM to check.
    """
    parser = argparse.ArgumentParser(prog="python -m vllm_cascade.patches", description=__doc__)
    parser.add_argument(
        "--check", type=Path, metavar="PATH", help="folder that holds vllm/; nothing is imported"
    )
    path = parser.parse_args().check
    if path is None:
        print(table())
        return 0
    from vllm_cascade.patches.compat.needs import report

    try:
        text, in_place = report(path, PATCHES)
    except FileNotFoundError as error:
        parser.error(str(error))
    print(text)
    return 0 if in_place else 1


if __name__ == "__main__":
    sys.exit(main())
