"""The list of what the plugin needs of vLLM, compared with the sources of a vLLM."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_cascade.patches.compat.hooks import EXACTLY, MEMBERS, OVERRIDES
from vllm_cascade.patches.compat.source import Found, Function, Source, imported
from vllm_cascade.patches.record import VLLM_RANGE, Patch, in_range

HERE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Need:
    """One name that a file of the plugin needs of vLLM.

    Args:
        kind: How the file uses the name: "replaces", "imports", "looks up", "overrides", "reads"
            or "relies on".
        user: The file, or the file and the class in it.
        paths: Dotted paths that the name may have; one of them has to be there.
        says: The parameters or the value expected; None for any.
        override: The plugin's function that replaces the name's function, or None.
    """

    kind: str
    user: str
    paths: tuple[str, ...]
    says: str | None = None
    override: Function | None = None

    def moved(self, source: Source) -> str | None:
        """Say what is wrong with the name in `source`; None if it is there as expected."""
        found = next(filter(None, map(source.find, self.paths)), None)
        named = " or ".join(self.paths)
        if found is None:
            there = source.elsewhere(self.paths[0].rpartition(".")[2])
            now = f" (that name is defined in {', '.join(there[:3])})" if there else ""
            return f"{self.user}: {self.kind} {named}, which is gone{now}"
        if self.says is not None and found.says != self.says:
            return f"{self.user}: {self.kind} {named}, expected {self.says}, found {found.says}"
        theirs = found.node
        if self.override is None or not isinstance(theirs, Function):
            return None
        if _accepts(self.override, theirs):
            return None
        mine = Found("", self.override).says
        return f"{self.user}: {self.kind} {named} with {mine}, now it is {found.says}"


def needs(patches: tuple[Patch, ...], source: Source) -> list[Need]:
    """List all that the plugin needs of vLLM.

    Args:
        patches: The plugin's patches.
        source: The sources of a vLLM. They tell which of the signatures supported a patch's target
            should have, and which imported names are modules or classes.

    Returns:
        Each need once.
    """
    found = []
    for patch in patches:
        target, says = source.find(patch.target), patch.signature
        if target is not None and target.says == patch.later_signature:
            says = target.says
        found.append(Need("replaces", f"patches/{patch.name}.py", (patch.target,), says))
    for user, path in plugin_files():
        names = imports(ast.parse(path.read_text()))
        found += [Need("imports", user, paths) for paths, needed in names.values() if needed]
        found += attributes(user, path, names, source)
        found += overrides(user, path, names)
    for user, classes in MEMBERS.items():
        for owner, members in classes.items():
            found += [Need("reads", user, (f"{owner}.{member}",)) for member in members]
    for user, exact in EXACTLY.items():
        found += [Need("relies on", user, (path,), says) for path, says in exact.items()]
    return list(dict.fromkeys(found))


def report(root: Path, patches: tuple[Patch, ...]) -> tuple[str, bool]:
    """Compare all needs with a vLLM: a table of what was checked, and a line for each that moved.

    Args:
        root: The folder `vllm`, or the folder that holds it.
        patches: The plugin's patches.

    Returns:
        The text, and whether everything is in place.

    Raises:
        FileNotFoundError: The folder has no sources of vLLM.
    """
    source = Source(root)
    wanted = needs(patches, source)
    moved = {need: said for need in wanted if (said := need.moved(source))}
    within = "within" if in_range(source.version, VLLM_RANGE) else "outside"
    lines = [
        f"vLLM {source.version} ({within} {VLLM_RANGE}) at {source.root}",
        f"{'the plugin':12}{'checked':>9}{'moved':>7}",
    ]
    for kind in dict.fromkeys(need.kind for need in wanted):
        count = sum(need.kind == kind for need in wanted)
        lines.append(f"{kind:12}{count:9}{sum(need.kind == kind for need in moved):7}")
    lines += [f"MOVED {said}" for said in moved.values()]
    return "\n".join(lines), not moved


def plugin_files() -> Iterator[tuple[str, Path]]:
    """List the plugin's modules that may use vLLM: how a message names a module, and its file."""
    import vllm_cascade

    for name, folder in (("vllm_cascade", Path(vllm_cascade.__file__).parent), ("patches", HERE)):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).parts
            if name == "patches" or inside[0] not in ("kernels", "patches"):
                yield "/".join((name, *inside)), path


Names = dict[str, tuple[tuple[str, ...], bool]]


def imports(module: ast.Module) -> Names:
    """List what `module` imports from vLLM, in its functions too.

    Returns:
        Name in the module -> the dotted paths that it may come from, and whether one of the paths
        has to be there. None has to if the name is imported only in the body of a ``try`` that
        catches ImportError.
    """
    guarded = set[ast.AST]()
    for node in ast.walk(module):
        if isinstance(node, ast.Try) and any(
            handler.type is not None and "Import" in ast.unparse(handler.type)
            for handler in node.handlers
        ):
            guarded.update(inner for part in node.body for inner in ast.walk(part))
    found: Names = {}
    for node in ast.walk(module):
        if not isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "level", 0):
            continue
        for alias, path in imported(node, ""):
            if path.partition(".")[0] == "vllm":
                paths, needed = found.get(alias, ((), False))
                needed = needed or node not in guarded
                found[alias] = (tuple(dict.fromkeys((*paths, path))), needed)
    return found


def attributes(user: str, path: Path, names: Names, source: Source) -> Iterator[Need]:
    """List what a module looks up on the modules and classes that it imports from vLLM.

    Args:
        user: How a message names the module.
        path: The module's file.
        names: The module's `imports`.
        source: The sources of a vLLM.

    Returns:
        The needs; one that occurs several times in the module comes several times.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id not in names or node.attr.startswith("__"):
            continue
        paths, _ = names[node.value.id]
        owners = [found.node for found in map(source.find, paths) if found]
        if any(isinstance(owner, ast.Module | ast.ClassDef) for owner in owners):
            yield Need("looks up", user, tuple(f"{owner}.{node.attr}" for owner in paths))


def overrides(user: str, path: Path, names: Names) -> Iterator[Need]:
    """List the members of vLLM's classes that a module's classes replace, as in `OVERRIDES`.

    Args:
        user: How a message names the module.
        path: The module's file.
        names: The module's `imports`.

    Returns:
        The needs, with the plugin's function for each member that is a function.
    """
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        mine = {part.name: part for part in node.body if isinstance(part, Function)}
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        above = [names[ast.unparse(base)][0][0] for base in bases if ast.unparse(base) in names]
        for member in OVERRIDES.get(f"{user}:{node.name}", ()):
            paths = tuple(f"{base}.{member}" for base in above)
            yield Need("overrides", f"{user} ({node.name})", paths, override=mine.get(member))


def _accepts(override: Function, base: Function) -> bool:
    """Whether `override` takes every call that `base` takes, by position or by name."""
    mine, theirs = override.args, base.args
    own = [argument.arg for argument in (*mine.posonlyargs, *mine.args)]
    given = [argument.arg for argument in (*theirs.posonlyargs, *theirs.args)]
    if mine.vararg and mine.kwarg:
        return given[: len(own)] == own
    required = own[: len(own) - len(mine.defaults)]
    only = {argument.arg for argument in mine.kwonlyargs} | set(own)
    return (
        own[: len(given)] == given
        and len(required) <= len(given)
        and (bool(mine.kwarg) or all(argument.arg in only for argument in theirs.kwonlyargs))
    )
