"""vLLM moves under the plugin: the check says what moved, and which file depends on it."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm_cascade.patches import PATCHES
from vllm_cascade.patches.compat.hooks import MEMBERS, OVERRIDES
from vllm_cascade.patches.compat.needs import Function, imports, needs, plugin_files, report
from vllm_cascade.patches.compat.source import Source

VLLM = Path(importlib.util.find_spec("vllm").origin).parent
MANAGERS = "v1/core/single_type_kv_cache_manager.py"
GUARDED = {
    ("vllm_cascade/commands/plan.py", "planning"),
    ("vllm_cascade/commands/plan.py", "get_kv_cache_config_builder"),
    ("vllm_cascade/attention/gpu_workspace.py", "FA3_AVAILABLE"),
    ("vllm_cascade/attention/gpu_workspace.py", "flash_attn_varlen_func"),
}


def moved(folder: Path, *moves: Sequence[str | None]) -> Path:
    """A vLLM that differs from the installed one in a few files, in which `old` became `new`.

    Args:
        folder: Where to make it; all other files are links.
        moves: Path under `vllm/`; text that the file has; what stands there instead, or None to
            leave the file out.
    """
    texts: dict[Path, str | None] = {}
    for file, old, new in moves:
        text = texts.get(Path(file)) or (VLLM / file).read_text()
        assert old in text
        texts[Path(file)] = None if new is None else text.replace(old, new)
    parts = {part for file in texts for part in file.parents}
    for part in sorted(parts):
        (folder / "vllm" / part).mkdir()
        for path in (part / there.name for there in (VLLM / part).iterdir()):
            if path not in parts and path not in texts:
                os.symlink(VLLM / path, folder / "vllm" / path)
    for path, text in texts.items():
        if text is not None:
            (folder / "vllm" / path).write_text(text)
    return folder


def messages(root: Path) -> list[str]:
    text, in_place = report(root, PATCHES)
    found = [line for line in text.splitlines() if line.startswith("MOVED")]
    assert in_place is not bool(found)
    return found


def test_the_installed_vllm_has_all_that_the_plugin_builds_on() -> None:
    text, in_place = report(VLLM, PATCHES)
    assert in_place, text
    assert all(kind in text for kind in ("replaces", "imports", "looks up", "overrides", "reads"))


# What happened -> file, old and new text, and parts of the line that names it.
MOVES: dict[str, tuple[str, str, str | None, list[str]]] = {
    "a patched function is renamed": (
        "config/model.py",
        "def _get_and_verify_max_len(",
        "def _verify_max_len(",
        [
            "patches/long_max_model_len.py: replaces vllm.config.model._get_and_verify_max_len",
            "gone",
        ],
    ),
    "a patched function has another signature": (
        "model_executor/model_loader/base_loader.py",
        'model_config: ModelConfig, prefix: str = ""',
        "model_config: ModelConfig, device: str",
        [
            "patches/rope_at_logical_place.py",
            "expected (self, vllm_config, model_config, prefix='')",
            "found (self, vllm_config, model_config, device)",
        ],
    ),
    "an overridden method has another parameter": (
        MANAGERS,
        "apply_admission_cap: bool = False",
        "admission_cap: bool = False",
        ["manager.py (CascadeManager): overrides", "get_num_blocks_to_allocate", "now it is"],
    ),
    "an overridden method is gone": (
        MANAGERS,
        "def pop_blocks_for_free",
        "def take_blocks_for_free",
        ["manager.py (CascadeManager): overrides", "pop_blocks_for_free, which is gone"],
    ),
    "a field is gone": (
        "v1/attention/backend.py",
        "seq_lens_cpu_upper_bound",
        "seq_lens_bound",
        ["builder.py: reads", "CommonAttentionMetadata.seq_lens_cpu_upper_bound", "gone"],
    ),
    "what is looked up on an import is gone": (
        "v1/kv_cache_spec_registry.py",
        "def _ensure_registered",
        "def _fill",
        ["plugin.py: looks up", "KVCacheSpecRegistry._ensure_registered, which is gone"],
    ),
    "a hook is called otherwise": (
        "v1/worker/utils.py",
        "def customize_attention_spec(",
        "def customize_attention_spec(layer, ",
        ["expected (backend, spec), found (layer, backend, spec)"],
    ),
    "an entry point has another name": (
        "plugins/__init__.py",
        "vllm.stat_logger_plugins",
        "vllm.loggers",
        ["pyproject.toml: relies on", "found 'vllm.loggers'"],
    ),
    "a module is gone": (
        "v1/attention/selector.py",
        "",
        None,
        ["selection.py: imports vllm.v1.attention.selector.AttentionSelectorConfig", "gone"],
    ),
}


def test_what_moved_is_named(tmp_path: Path) -> None:
    """All moves in one vLLM: each has its own line."""
    found = messages(moved(tmp_path, *(move for *move, _ in MOVES.values())))
    silent = [
        name
        for name, (*_, said) in MOVES.items()
        if not any(all(part in line for part in said) for line in found)
    ]
    assert not silent, found


def test_where_a_base_class_went_is_named(tmp_path: Path) -> None:
    root = moved(tmp_path, (MANAGERS, "class CircularBufferManager", "class RingManager"))
    (root / "vllm" / "rings.py").write_text("class CircularBufferManager: ...")
    module = f"vllm.{MANAGERS[:-3].replace('/', '.')}"
    (line,) = (line for line in messages(root) if "kv_cache/manager.py: imports" in line)
    assert f"imports {module}.CircularBufferManager, which is gone" in line
    assert "defined in vllm.rings" in line


def test_all_that_the_plugin_replaces_in_vllms_classes_is_listed() -> None:
    source, found = Source(VLLM), {}
    for user, path in plugin_files():
        module = ast.parse(path.read_text())
        names = imports(module)
        for node in module.body:
            bases = [ast.unparse(base).partition("[")[0] for base in getattr(node, "bases", ())]
            above = [names[base][0][0] for base in bases if base in names]
            members = []
            for part in node.body if above else ():
                if isinstance(part, Function):
                    members.append(part.name)
                elif isinstance(part, ast.AnnAssign | ast.Assign):
                    target = part.target if isinstance(part, ast.AnnAssign) else part.targets[0]
                    members.append(ast.unparse(target))
            kept = [m for m in members if any(source.find(f"{base}.{m}") for base in above)]
            if kept:
                found[f"{user}:{node.name}"] = tuple(kept)
    assert found == OVERRIDES


def test_every_file_reads_what_is_listed_for_it() -> None:
    files = dict(plugin_files())
    for user, classes in MEMBERS.items():
        found = set()
        for node in ast.walk(ast.parse(files[user].read_text())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword):
                found.add(node.arg)
            elif isinstance(node, ast.Constant):
                found.add(node.value)
        for owner, members in classes.items():
            assert set(members) <= found, f"{user} does not read all of {owner}"


def test_one_name_stands_for_one_thing_of_vllms() -> None:
    for user, path in plugin_files():
        for name, (paths, needed) in imports(ast.parse(path.read_text())).items():
            assert (len(paths) == 1 and needed) or (user, name) in GUARDED


def test_every_patch_is_checked() -> None:
    checked = {need.paths[0] for need in needs(PATCHES, Source(VLLM)) if need.kind == "replaces"}
    assert checked == {patch.target for patch in PATCHES}


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_cascade.patches", "--check", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path, timeout=120)


def test_the_command_tells_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    renamed = ("config/model.py", "def _get_and_verify_max_len(", "def f(")
    root = moved(tmp_path / "moved", renamed)
    failed = check(root)
    assert failed.returncode == 1 and "MOVED patches/long_max_model_len.py" in failed.stdout
    nothing = check(tmp_path)
    assert nothing.returncode == 2 and "no vLLM sources" in nothing.stderr
    done = check(VLLM.parent)
    assert done.returncode == 0 and "MOVED" not in done.stdout
