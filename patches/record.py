"""The record of a patch of vLLM, and the checks before the patch changes anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# The vLLM versions that this project is tested with. A patch may narrow the range, never widen it.
VLLM_RANGE = ">=0.32.0,<0.34"

_applied: set[str] = set()


class PatchError(RuntimeError):
    """A patch does not fit the installed vLLM; the patch has changed nothing."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to vLLM, in a place where vLLM has no hook.

    Args:
        name: The module under `patches/` that holds it.
        target: Dotted path of what the patch changes.
        signature: `signature_of` the target that the patch was written for.
        symptom: What goes wrong without the patch.
        removal: When the patch can be deleted.
        install: Makes the change; called at most once in a process.
        vllm: The vLLM versions that the patch was written for.
        later_signature: Signature in newer supported versions, if it differs.
    """

    name: str
    target: str
    signature: str
    symptom: str
    removal: str
    install: Callable[[], object]
    vllm: str = VLLM_RANGE
    later_signature: str | None = None

    @property
    def applied(self) -> bool:
        """Whether the change was made in this process."""
        return self.name in _applied

    def check(self) -> None:
        """Compare vLLM with what the patch was written for, and change nothing.

        Raises:
            PatchError: The version is outside the range, the target is gone, or the target has
                another signature.
        """
        from vllm.version import __version__ as vllm_version

        if not in_range(vllm_version, self.vllm):
            raise PatchError(
                f"vllm-cascade's patch {self.name!r} was written for vLLM {self.vllm}, but vLLM "
                f"{vllm_version} is installed. Install a vLLM of that range, or a vllm-cascade "
                f"made for vLLM {vllm_version}."
            )
        try:
            found = signature_of(resolve(self.target))
        except (ImportError, AttributeError) as error:
            raise PatchError(
                f"vllm-cascade's patch {self.name!r} changes {self.target}, which vLLM "
                f"{vllm_version} does not have ({error}). Install an unmodified vLLM {self.vllm}."
            ) from error
        if found not in (self.signature, self.later_signature):
            raise PatchError(
                f"vllm-cascade's patch {self.name!r} was written for {self.target}"
                f"{self.signature}, but in vLLM {vllm_version} it is {found}. Install an "
                f"unmodified vLLM {self.vllm}; another plugin may have replaced the function."
            )

    def apply(self) -> None:
        """Check and make the change, unless it was made before in this process.

        Raises:
            PatchError: As `check`.
        """
        if not self.applied:
            self.check()
            self.install()
            _applied.add(self.name)

    def row(self) -> str:
        """Write the patch as one row of a Markdown table."""
        cells = (f"`{self.name}`", f"`{self.target}`", self.vllm, self.symptom, self.removal)
        return f"| {' | '.join(cells)} |"


def in_range(version: str, specifier: str) -> bool:
    """Whether a version lies in a range.

    Args:
        version: A version as vLLM reports it. Builds and pre-releases can lie in the range; a text
            that is no version, as "dev", does not.
        specifier: A range as PEP 440 writes it.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except InvalidVersion:  # vLLM's "dev", when it does not know its own version
        return False


def signature_of(function: Callable[..., Any]) -> str:
    """Write the names, kinds and defaults of the parameters of `function`.

    Annotations are left out, because how Python shows them depends on its version and on what was
    imported first.
    """
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def resolve(target: str) -> Any:
    """Import the object at the dotted path `target`.

    Raises:
        ImportError: No module on the path can be imported.
        AttributeError: The module has no such attribute.
    """
    parts = target.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            # A class on the path is no module, so go on. A module whose dependency is missing is an
            # error.
            if error.name is None or not module_name.startswith(error.name):
                raise
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(f"no module on the path {target}")
