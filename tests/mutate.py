"""Break the code in one place at a time and see a named test go red.

    python tests/mutate.py [--tests-passed] [NAME ...]

Works on copies of the package in a temporary folder. Exits 1 if a mutation survives, no longer
applies, or if a named test is red without one; `--tests-passed` says that none is. What all tests
import is imported once: each of them runs in a fork of this process.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mutations import BUILT, MUTATIONS, TRIED, Mutation

ROOT = Path(__file__).parents[1]
WITH_VLLM = ("tests/e2e/", "tests/unit/test_spec.py", BUILT, TRIED)


def copy_package(target: Path) -> None:
    """Lay the package out under `target` as it is installed."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vllm_cascade", target / "vllm_cascade", ignore=ignore)
    for part in ("kernels", "patches"):
        shutil.copytree(ROOT / part, target / "vllm_cascade" / part, ignore=ignore)


def mutate(mutation: Mutation, package: Path) -> None:
    """Write a copy of the package with the mutation to `package`."""
    copy_package(package)
    top = "vllm_cascade/" if mutation.file.startswith(("kernels/", "patches/")) else ""
    file = package / f"{top}{mutation.file}"
    text = file.read_text()
    if text.count(mutation.right) != 1:
        raise SystemExit(f"{mutation.name}: its text is not once in {mutation.file}")
    file.write_text(text.replace(mutation.right, mutation.wrong))


@dataclass(frozen=True, slots=True)
class Job:
    """Tests to be run with one copy of the package.

    Args:
        name: Of the mutation, or the tests' file.
        tests: pytest nodes.
        package: The copy's folder.
    """

    name: str
    tests: Sequence[str]
    package: Path

    @property
    def needs_vllm(self) -> bool:
        """Whether the tests import most of vLLM.

        Kernels must not see it imported: they ask for Triton's interpreter before.
        """
        return self.tests[0].startswith(WITH_VLLM)

    @property
    def log(self) -> Path:
        """What pytest prints."""
        return self.package / "log"

    def start(self) -> int:
        """Run the tests in a fork of this process, whose id is returned."""
        pid = os.fork()
        if pid:
            return pid
        code = 3
        try:
            with self.log.open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ["PYTHONPATH"] = str(self.package)
            os.environ["PYTHONSAFEPATH"] = "1"
            # The working folder holds the package too, and must not come first.
            sys.path[:] = [str(self.package), *(p for p in sys.path if Path(p) != ROOT)]
            for module in [m for m in sys.modules if m.partition(".")[0] == "vllm_cascade"]:
                del sys.modules[module]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *self.tests]))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def run(jobs: list[Job]) -> Iterator[tuple[Job, bool]]:
    """Run jobs, as many at once as there are processors.

    Yields:
        Each when it ends, and whether all its tests passed.
    """
    waiting, running = list(jobs), dict[int, Job]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            job = waiting.pop(0)
            running[job.start()] = job
        pid, status = os.wait()
        job, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        if code not in (0, 1):
            raise SystemExit(f"pytest could not run {job.tests}:\n{job.log.read_text()[-4000:]}")
        yield job, code == 0


def run_all(jobs: list[Job]) -> Iterator[tuple[Job, bool]]:
    """As `run`; those that need vLLM come last, when it has been imported."""
    import torch  # noqa: F401

    yield from run([job for job in jobs if not job.needs_vllm])
    late = [job for job in jobs if job.needs_vllm]
    if late:
        import e2e  # noqa: F401, I001 - what all engines run with comes first
        from vllm import LLM  # noqa: F401
        from vllm.model_executor.models import llama  # noqa: F401
        from vllm.platforms import current_platform
        from vllm.v1.worker import cpu_worker  # noqa: F401

        # Once for all, as in tests/e2e/conftest.py; what has been imported is no garbage.
        current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
        gc.collect()
        gc.freeze()
    yield from run(late)


def jobs_of(chosen: list[Mutation], folder: Path, *, tests_passed: bool) -> Iterator[Job]:
    """The unbroken package with all tests of a file together; then each mutation with its test."""
    if not tests_passed:
        files: dict[str, dict[str, None]] = {}
        for mutation in chosen:
            files.setdefault(mutation.test.partition("::")[0], {})[mutation.test] = None
        for number, (file, tests) in enumerate(files.items()):
            copy_package(folder / f"unbroken-{number}")
            yield Job(file, list(tests), folder / f"unbroken-{number}")
    for number, mutation in enumerate(chosen):
        mutate(mutation, folder / str(number))
        yield Job(mutation.name, [mutation.test], folder / str(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests-passed", action="store_true", help="the tests have just passed")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a mutation")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    chosen = [m for m in MUTATIONS if not given.names or m.name in given.names]
    by_name = {mutation.name: mutation for mutation in chosen}
    red, survivors = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for job, passes in run_all(list(jobs_of(chosen, folder, tests_passed=given.tests_passed))):
            if mutation := by_name.get(job.name):
                survivors += passes
                verdict = "SURVIVES" if passes else "red"
                print(f"{verdict:8}  {job.name}  ({mutation.test.partition('::')[2]})", flush=True)
            elif not passes:
                red.append(job.name)
                print(f"red without any mutation: {job.log.read_text()[-4000:]}", flush=True)
    if red:
        raise SystemExit(f"red without any mutation: {', '.join(red)}")
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations turn their test red")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
