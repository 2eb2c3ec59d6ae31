"""vLLM plugin that serves models through a cascading KV cache of fixed size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    # Imported from a checkout, where `kernels` and `patches` lie beside this folder.
    __path__.append(str(_here.parent))


def _restore() -> Any:
    """The enum member CASCADE, for an unpickler in a process that may not have loaded the plugin.

    The name and place of this function are part of every pickled configuration.

    Raises:
        RuntimeError: vLLM will not load the plugin in this process.
    """
    from vllm_cascade.plugin import check_selected, register_name

    check_selected()
    return register_name()
