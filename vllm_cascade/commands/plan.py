"""What serving a model with CASCADE would take, worked out without loading the model's weights.

The numbers come from the objects that an engine builds: vLLM's configuration, checked as for a
server, and a layer's KV cache spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_cascade.commands.errors import CommandError
from vllm_cascade.commands.offline import engine_config, said
from vllm_cascade.structure.accounting import startup_line
from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.options import NO_EFFECT, SCORE_KNOBS, CascadeOptions
from vllm_cascade.support.names import BACKEND_NAME
from vllm_cascade.support.unsupported import is_fp8

GIB = 1 << 30
# What configurations call layers that keep a state.
WITH_STATES = ("mamba", "linear_attention", "conv", "hybrid")


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of a request in a valid configuration; all bytes are those of one rank.

    Args:
        model: The model as the user named it.
        config: The resolved configuration.
        dtype: Dtype of the model.
        kv_cache_dtype: Dtype of the KV cache: that of the model, or "fp8_e4m3".
        position_limit: Positions that CASCADE may give to the model's keys.
        tensor_parallel_size: Ranks that share each layer's KV heads.
        num_layers: Number of CASCADE layers.
        block_size: Tokens in a block of vLLM's: a multiple of the configuration's where the model
            has layers with states.
        max_blocks: The most such blocks a request holds in a layer; R where the two are one.
        page_size_bytes: Bytes of a block in a layer; scores and token indices count.
        layer_bytes: Bytes that the longest request holds in a CASCADE layer.
        full_attention_layer_bytes: Bytes that it would hold there with full attention.
        num_window_layers: Number of layers with a sliding window or with chunks, which vLLM's own
            backend serves.
        window_layers: What these are called: "sliding-window" or "chunked-attention".
        window_bytes: Bytes that the longest request holds in all of them, and the padding where
            vLLM groups unequal numbers of layers.
        full_attention_window_bytes: The same number where vLLM's full attention serves the
            CASCADE layers.
        num_state_layers: Number of layers that keep a state, which vLLM serves.
        state_bytes: Bytes that a request holds in all of them, and padding as for windows.
        kv_memory_bytes: Memory for KV on each GPU; None if the user named none.
    """

    model: str
    config: CascadeConfig
    dtype: str
    kv_cache_dtype: str
    position_limit: int
    tensor_parallel_size: int
    num_layers: int
    block_size: int
    max_blocks: int
    page_size_bytes: int
    layer_bytes: int
    full_attention_layer_bytes: int
    num_window_layers: int
    window_layers: str
    window_bytes: int
    full_attention_window_bytes: int
    num_state_layers: int
    state_bytes: int
    kv_memory_bytes: int | None

    @property
    def request_bytes(self) -> int:
        """Bytes of the longest request in all layers."""
        return self.layer_bytes * self.num_layers + self.window_bytes + self.state_bytes

    @property
    def full_attention_bytes(self) -> int:
        """Bytes of the longest request in all layers, with full attention."""
        own = self.full_attention_layer_bytes * self.num_layers
        return own + self.full_attention_window_bytes + self.state_bytes

    @property
    def concurrency(self) -> int | None:
        """How many longest requests the memory for KV holds at once; None if it is not known."""
        return None if self.kv_memory_bytes is None else self.kv_memory_bytes // self.request_bytes

    @property
    def full_attention_concurrency(self) -> int | None:
        """How many longest requests the memory for KV would hold with full attention."""
        if self.kv_memory_bytes is None:
            return None
        return self.kv_memory_bytes // self.full_attention_bytes

    @property
    def startup_line(self) -> str:
        """The line that the engine logs as it starts."""
        return startup_line(self.config, self.max_blocks, self.page_size_bytes, self.num_layers)

    @property
    def _included(self) -> str:
        """What a page holds beside keys and values, in words."""
        kept = ["scores"] * self.config.needs_scores + ["trace"] * self.config.trace_tokens
        return f", {' and '.join(kept)} included" if kept else ""

    def as_json(self) -> dict[str, Any]:
        """All numbers, by name."""
        names = (
            "request_bytes",
            "full_attention_bytes",
            "concurrency",
            "full_attention_concurrency",
            "startup_line",
        )
        derived = {name: getattr(self, name) for name in names}
        return {"valid": True, **asdict(self), "reach": self.config.reach, **derived}

    def as_text(self) -> str:
        """All numbers, for a reader."""
        config, ranks = self.config, self.tensor_parallel_size
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        windows = ""
        if self.num_window_layers:
            windows = (
                f" and {self.num_window_layers} {self.window_layers} layers, "
                f"{self.window_bytes:,} bytes of it theirs"
            )
        if self.num_state_layers:
            windows = (
                f" and {self.num_state_layers} layers with states, {self.state_bytes:,} bytes of "
                "it theirs"
            )
        limit = f"a budget may take {self.position_limit:,} positions"
        kept = ""
        if self.kv_cache_dtype != self.dtype:
            kept = f", keys and values in {self.kv_cache_dtype}"
        settled = " ".join(f"{name}={value}" for name, value in effective(config).items())
        rows = [
            ("valid", f"yes, for {self.model} in {self.dtype}{kept}; {limit}"),
            ("configuration", settled),
            ("log line", self.startup_line),
            ("reach", f"{config.reach:,} tokens, of requests of up to {config.max_model_len:,}"),
            (
                "a request holds",
                f"at most {'R = ' * (self.block_size == config.block_size)}{self.max_blocks:,} "
                f"blocks of {self.block_size} tokens in a layer",
            ),
            (
                "memory",
                f"{self.layer_bytes:,} bytes in a layer{each}, {_size(self.request_bytes)} in all "
                f"{self.num_layers}{windows}{self._included}",
            ),
            ("full attention", f"{_size(self.full_attention_bytes)} at the same max_model_len"),
        ]
        if self.kv_memory_bytes is not None:
            rows.append(
                (
                    "concurrency",
                    f"{self.concurrency:,} requests of {config.max_model_len:,} tokens in "
                    f"{self.kv_memory_bytes / GIB:g} GiB for KV{each}; full attention: "
                    f"{self.full_attention_concurrency:,}",
                )
            )
        return "\n".join(f"{name:<16} {value}" for name, value in rows)


def effective(config: CascadeConfig) -> dict[str, Any]:
    """List the options of `config` by name, without those that have no effect in it."""
    without = set(NO_EFFECT[config.policy])
    if config.num_sub_caches == 1:
        without |= set(NO_EFFECT["window"]) - {"structure"}
    elif not config.score_weight:
        without |= set(SCORE_KNOBS)
    # A user wants to see the number of sub-caches, whoever chose it.
    without.discard("num_sub_caches")
    if config.is_elastic:
        without.add("num_sub_caches")
    return {name: value for name, value in asdict(config).items() if name not in without}


def make_plan(
    model: str,
    cascade: Mapping[str, Any],
    *,
    max_model_len: int | None = None,
    block_size: int | None = None,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
    kv_memory_gib: float | None = None,
) -> Plan:
    """Settle a configuration as a server would, and count what a request takes.

    Args:
        model: Folder with the model's config.json, or a name in the cache of Hugging Face.
        cascade: The cascade's options, as in ``additional_config``.
        max_model_len: Most tokens a request may have; None for the model's own limit.
        block_size: Tokens in a KV block; None for vLLM's choice on this device.
        dtype: As vLLM's ``--dtype``.
        kv_cache_dtype: As vLLM's ``--kv-cache-dtype``.
        tensor_parallel_size: Ranks that share each layer's KV heads; this machine may have fewer.
        kv_memory_gib: Memory for KV on each GPU, in GiB; None leaves the concurrency out.

    Returns:
        The plan.

    Raises:
        CommandError: No server would start; the message gives the reason, and the nearest valid
            value if there is one.
    """
    _check_folder(model)
    try:
        CascadeOptions.parse(cascade)
        vllm_config = _vllm_config(
            model, cascade, max_model_len, block_size, dtype, kv_cache_dtype, tensor_parallel_size
        )
    except OSError as error:
        raise CommandError(f"cannot read the configuration of {model}: {error}") from error
    except Exception as error:  # a config.json may be wrong in any way
        raise CommandError(said(error)) from error
    return _count(model, vllm_config, kv_memory_gib)


def _check_folder(model: str) -> None:
    path = Path(model).expanduser()
    is_name = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(f"{model} has no config.json. Give the folder of a Hugging Face model")
    if not path.is_dir() and not is_name:
        raise CommandError(f"{model} is no folder. Give the folder of a Hugging Face model")


def _vllm_config(
    model: str,
    cascade: Mapping[str, Any],
    max_model_len: int | None,
    block_size: int | None,
    dtype: str,
    kv_cache_dtype: str,
    tensor_parallel_size: int,
) -> Any:
    """vLLM's configuration, checked for CASCADE; no engine starts."""
    from vllm_cascade.support.validate import validate

    vllm_config = engine_config(
        model=model,
        max_model_len=max_model_len,
        block_size=block_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        attention_backend=BACKEND_NAME,
        enable_prefix_caching=False,  # changes no bytes; on, it would log a line about hits
        additional_config={"cascade": dict(cascade)},
    )
    # Set afterwards: `EngineArgs` would ask whether this machine has so many devices.
    vllm_config.parallel_config.tensor_parallel_size = tensor_parallel_size
    vllm_config.model_config.verify_with_parallel_config(vllm_config.parallel_config)
    validate(vllm_config)
    return vllm_config


def _count(model: str, vllm_config: Any, kv_memory_gib: float | None) -> Plan:
    import torch
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheSpec,
        MambaSpec,
        SlidingWindowSpec,
        get_kv_quant_mode,
    )

    from vllm_cascade.kv_cache.spec import CascadeSpec
    from vllm_cascade.support.hybrid import CHUNKED, NAMES, kinds_of, other_kind
    from vllm_cascade.support.resolved import position_limit, resolve_options
    from vllm_cascade.support.states import has_states

    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    model_dtype = str(model_config.dtype).removeprefix("torch.")
    config, with_states = resolve_options(vllm_config), has_states(model_config)
    if with_states:
        _settle_block_size(vllm_config, config)
    shape = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": model_config.get_num_kv_heads(parallel),
        "head_size": model_config.get_head_size(),
        "dtype": kv_cache_dtype_str_to_dtype(cache_dtype, model_config),
        "kv_quant_mode": get_kv_quant_mode(cache_dtype),
    }
    full = FullAttentionSpec(**shape)
    spec = CascadeSpec.of(full, config, tail_in_heads=with_states)
    num_layers, num_windows, num_states = _num_layers(model_config, parallel), 0, 0
    others: list[KVCacheSpec] = []
    other = other_kind(model_config)
    if with_states:
        num_layers, num_states = _num_with_states(model_config, parallel)
        # vLLM pads a state to the size of a page.
        state = {"shapes": ((spec.page_size_bytes,),), "dtypes": (torch.uint8,)}
        others = [MambaSpec(block_size=config.max_model_len, **state)] * num_states
    elif other is not None:
        window: KVCacheSpec
        if other == CHUNKED:
            chunk = model_config.attention_chunk_size
            window = ChunkedLocalAttentionSpec(**shape, attention_chunk_size=chunk)
        else:
            window = SlidingWindowSpec(**shape, sliding_window=model_config.get_sliding_window())
        num_windows = kinds_of(model_config).count(other)
        others = [window] * num_windows
    beside = _beside(vllm_config, [spec] * num_layers, others)
    full_beside = _beside(vllm_config, [full] * num_layers, others)
    return Plan(
        model=model,
        config=config,
        dtype=model_dtype,
        kv_cache_dtype="fp8_e4m3" if is_fp8(cache_dtype) else model_dtype,
        position_limit=position_limit(model_config),
        tensor_parallel_size=parallel.tensor_parallel_size,
        num_layers=num_layers,
        block_size=spec.block_size,
        max_blocks=spec.max_blocks,
        page_size_bytes=spec.page_size_bytes,
        layer_bytes=spec.max_memory_usage_bytes(vllm_config),
        full_attention_layer_bytes=full.max_memory_usage_bytes(vllm_config),
        num_window_layers=num_windows,
        window_layers=NAMES.get(other or "", ""),
        window_bytes=beside if num_windows else 0,
        full_attention_window_bytes=full_beside if num_windows else 0,
        num_state_layers=num_states,
        state_bytes=beside if num_states else 0,
        kv_memory_bytes=None if kv_memory_gib is None else int(kv_memory_gib * GIB),
    )


def _settle_block_size(vllm_config: Any, config: CascadeConfig) -> None:
    """Make vLLM's blocks as large as a state, as it does once the model is built."""
    from vllm.platforms import current_platform

    from vllm_cascade.attention.backend import CascadeBackend
    from vllm_cascade.kv_cache.spec import CascadeSpec

    class Backend(CascadeBackend):
        @classmethod
        def customize_spec(cls, spec: Any) -> Any:
            return CascadeSpec.of(spec, config, tail_in_heads=True)

    current_platform._align_hybrid_block_size(vllm_config, Backend)


def _beside(vllm_config: Any, own: list[Any], others: list[Any]) -> int:
    """Bytes that the longest request holds beside its own pages in the full-attention layers.

    Args:
        vllm_config: vLLM's complete configuration.
        own: KV cache spec of each full-attention layer.
        others: KV cache spec of each other layer.
    """
    if not others:
        return 0
    builder: tuple[Any, ...]
    try:  # vLLM 0.33
        from vllm.v1.core import kv_cache_planning as planning
        from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder

        builder = (get_kv_cache_config_builder(vllm_config),)
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planning

        builder = ()
    # An engine settles the layout when it knows all backends; no bytes here depend on it.
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    specs = {f"layers.{i}": spec for i, spec in enumerate([*own, *others])}
    groups = planning.get_kv_cache_groups(vllm_config, specs)
    total = planning._max_memory_usage_bytes_from_groups(*builder, vllm_config, groups)
    return int(total - sum(spec.max_memory_usage_bytes(vllm_config) for spec in own))


def _num_layers(model_config: Any, parallel_config: Any) -> int:
    """Number of full-attention layers, which are those that CASCADE serves."""
    from vllm_cascade.support.hybrid import FULL, kinds_of

    kinds = kinds_of(model_config)
    if kinds and len(kinds) == model_config.get_total_num_hidden_layers():
        return kinds.count(FULL)
    return int(model_config.get_num_layers(parallel_config))


def _num_with_states(model_config: Any, parallel_config: Any) -> tuple[int, int]:
    """Numbers of full-attention layers, and of layers that keep a state."""
    text = model_config.hf_text_config
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None)
    # Both in each layer, as in Falcon-H1.
    kinds = kinds or ["hybrid"] * model_config.get_num_layers(parallel_config)
    num_full = sum(kind in ("attention", "full_attention", "hybrid") for kind in kinds)
    return num_full, sum(kind in WITH_STATES for kind in kinds)


def _size(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({num_bytes / GIB:.3g} GiB)"
