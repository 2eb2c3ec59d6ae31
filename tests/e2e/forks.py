"""Python commands in forks of a process that has imported vLLM, which takes 15 seconds.

What a new process does on its own account is left out: test_processes.py starts some as users do.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from e2e.support import ROOT

PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
]


class Context:
    """A part of the interface of `multiprocessing`'s contexts; its processes have imported vLLM.

    They are forks of a process that has done nothing else: a fork of one that has run an engine
    hangs where it wants the threads that the engine had.
    """

    def __init__(self) -> None:
        self._forks = multiprocessing.get_context("forkserver")
        self._forks.set_forkserver_preload(PRELOADED)
        self.Pipe = self._forks.Pipe

    def Process(self, target: Callable[..., None], args: Sequence[Any]) -> BaseProcess:  # noqa: N802
        return self._forks.Process(target=_prepared, args=(target, *args))


def _prepared(target: Callable[..., None], *args: Any) -> None:
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.model_executor.models import registry
    from vllm.v1.sample import sampler

    # Ranks that wait for a message yield to others in a loop. Seen on two cores with Linux 6.18:
    # now and then that keeps all other processes waiting for a minute.
    shm_broadcast.sched_yield = lambda: time.sleep(1e-4)
    # What has been imported is no garbage, and need not be searched.
    gc.freeze()
    # As in conftest.py.
    registry._run_in_subprocess = lambda ask: ask()
    sampler.batched_count_greater_than = sampler.batched_count_greater_than.__wrapped__
    target(*args)


class Fork:
    """A Python command in a fork, with a part of the interface of `subprocess.Popen`.

    Args:
        command: What follows `python` on a command line: a script or a module, and its arguments.
        log: For what all its processes print.
        environment: Its environment variables.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        # A worker that is bound to processors makes itself as many threads, which the fork of a
        # process with fewer does not get.
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment}
        self._process = Context().Process(target=_in_fork, args=(command, log, environment))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Its exit status; it ends with all that it has started."""
        self._process.join(seconds)
        # Its workers, and itself where it is too slow.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()


def run(command: list[str], log: Path, seconds: float, **environment: str | None) -> int:
    """The exit status of a command, which `seconds` are enough for.

    Args:
        command: As of `Fork`.
        log: For what all its processes print.
        seconds: After which it is killed.
        environment: Variables beside those of this process, or None for one to leave out.
    """
    given = {name: value for name, value in {**os.environ, **environment}.items() if value}
    return Fork(command, log, given).wait(seconds)


def run_benchmark(log: Path, program: str, *arguments: str) -> tuple[int, str]:
    """Run a program of benchmarks/; whatever it starts of its own is a fork as well.

    Args:
        log: For what it prints.
        program: Its name.
        arguments: On its command line.

    Returns:
        Its exit status and all that it has printed.
    """
    code = run([str(ROOT / "benchmarks"), program, *arguments], log, 300)
    return code, log.read_text()


def _in_fork(command: list[str], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    stream = log.open("w")
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    for logger in (logging.getLogger(), logging.getLogger("vllm")):
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stdout)
            else:
                # pytest's: a line would be there more than once.
                logger.removeHandler(handler)
    _fork_all_others()
    _run(command, environment)


def _fork_all_others() -> None:
    """Whatever this process starts that would import vLLM is a fork of it."""
    import setproctitle

    # It finds the title's place by an environment that is still where it was.
    setproctitle.getproctitle()
    # A signal to the fork of a process with asyncio's handlers would count as one to that process.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda _=None: fork
    subprocess.Popen = _Popen


class _Popen(subprocess.Popen):
    """Forks this process where a benchmark is to run."""

    def _execute_child(self, args: Any, *others: Any) -> None:
        if args[:1] != [sys.executable] or Path(args[1]).name != "benchmarks":
            super()._execute_child(args, *others)
            return
        given = dict(
            zip(inspect.getfullargspec(super()._execute_child).args[2:], others, strict=False)
        )
        self.pid = os.fork()
        if not self.pid:
            for target, source in ((1, given["c2pwrite"]), (2, given["errwrite"])):
                if source not in (-1, target):
                    os.dup2(source, target)
            if given["start_new_session"]:
                os.setsid()
            _run(args[1:], given["env"] or dict(os.environ))
        self._child_created = True


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Make this process one that runs a command, and end it."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
