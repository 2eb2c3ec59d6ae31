"""Parts of a program that run in processes of their own, so that each starts on a free device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from records import BENCHMARKS


def command(program: str, *arguments: str) -> list[str]:
    """What runs a program through the front door."""
    return [sys.executable, str(BENCHMARKS), program, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, in which vLLM's workers find the modules here.

    Args:
        more: Variables to set besides.
    """
    path = filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **more}


def engine_environment() -> dict[str, str]:
    """`environment` of a process in which an engine and its worker run."""
    found = environment(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_STREAM="ext://sys.stderr",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    # It would overrule a tiny engine's own size.
    found.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return found


def run(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    timeout: float,
    *,
    is_quiet: bool = False,
) -> int | None:
    """Run a command, and end whatever it left running.

    Args:
        command: What runs.
        environment: All its variables.
        log: File for its errors.
        timeout: Seconds that it may take.
        is_quiet: Whether what it prints goes to the log too.

    Returns:
        Its exit status; None if it took too long and was killed.
    """
    with log.open("w") as file:
        child = subprocess.Popen(
            command,
            stdout=file if is_quiet else None,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
        try:
            return child.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(child)


def is_well(name: str, code: int | None, log: Path, timeout: float) -> bool:
    """Whether a process ended well; if not, print how it ended, and the end of its log."""
    if code:
        ending: object = code
    elif code is None:
        ending = f"no end within {timeout:.0f} s"
    else:
        return True
    print(f"{name}: ended with {ending}\n  " + "\n  ".join(log.read_text().splitlines()[-30:]))
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()
