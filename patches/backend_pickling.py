"""Pickles the backend name CASCADE so that a process without the plugin can read it."""

from __future__ import annotations

from vllm_cascade.patches.record import Patch
from vllm_cascade.support.names import BACKEND_NAME


def install() -> None:
    """Make the enum member CASCADE reduce to a call that registers it.

    Raises:
        KeyError: CASCADE is not registered with vLLM yet.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    import vllm_cascade

    member = AttentionBackendEnum[BACKEND_NAME]
    # Set on the member, not on the class, so that built-in backends are pickled as vLLM does.
    member.__reduce_ex__ = lambda protocol: (vllm_cascade._restore, ())


PATCH = Patch(
    name="backend_pickling",
    target="vllm.v1.attention.backends.registry.AttentionBackendEnum.__reduce_ex__",
    signature="(self, proto)",
    symptom=(
        "A registered backend is pickled by value; a spawned engine or Ray worker unpickles the "
        "configuration before it loads plugins and dies: not a valid AttentionBackendEnum"
    ),
    removal="vLLM pickles registered backends by name, or loads plugins first",
    install=install,
)
