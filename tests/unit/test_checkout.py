"""A checkout that stands on the path ahead of what is installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_checkout_finds_its_own_kernels_and_patches(tmp_path):
    """`python -m` puts the working directory first, wherever the package is installed."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "from importlib.util import find_spec as find;"
        "print(*(find(f'vllm_cascade.{m}').origin for m in ('kernels.segments', 'patches.record')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == [
        str(ROOT / "kernels" / "segments.py"),
        str(ROOT / "patches" / "record.py"),
    ], run.stderr
