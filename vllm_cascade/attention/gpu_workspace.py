"""Scratch of a step on a GPU, shared by all layers of one shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from vllm_cascade.kernels.decode import attend as paged_decode
from vllm_cascade.kernels.merge import groups as compaction
from vllm_cascade.kernels.prefill import scores as key_scores
from vllm_cascade.kernels.segments import KEY_PADDING
from vllm_cascade.structure.config import CascadeConfig

# Requests whose partial results are kept between the two launches of decode; further ones take
# turns.
MAX_DECODE_REQUESTS = 64
# Dtypes that FlashAttention-3, as vLLM ships it, takes.
FLASH_DTYPES = (torch.bfloat16, torch.float16)
# The most channels of a head that FlashAttention-3 takes.
FLASH_MAX_HEAD_SIZE = 256
# FlashAttention-3 takes up to 64 sink logits, in bfloat16; a cast would disagree with decode.
FLASH_MAX_SINKS = 64
# Queries of a tile of FlashAttention-3 with 128 channels; with others up to a half more.
TILE_QUERIES = 128
# From this share of the multiprocessors on, more waves than two need not attend at once.
BUSY_SHARE = 0.95
# Most bytes of the keys and values of a round, unless two full caches take more.
MOST_ROUND_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's layers have in common.

    Args:
        num_heads: Query heads on this rank.
        num_kv_heads: KV heads on this rank.
        head_size: Channels of a head.
        dtype: Dtype of activations.
        sinks: Dtype of the sink logits, or None if the model has none.
        pages: Dtype of pages, or None if they have that of activations.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    sinks: torch.dtype | None = None
    pages: torch.dtype | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Workspace:
    """Scratch of a step, shared by all layers and allocated before vLLM measures memory.

    Args:
        query: [max_num_batched_tokens, num_heads, head_size] rotated queries.
        output: [max_num_batched_tokens, num_heads, head_size] packed outputs, used if a round's
            rows of the batch do not follow one another.
        key: [max_keys, num_kv_heads, head_size] rotated keys.
        value: [max_keys, num_kv_heads, head_size].
        lse: [num_heads, max_num_batched_tokens] float32 log-sum-exps; empty if FlashAttention-3,
            which allocates its own, is used.
        shifts: float32 scratch of the score kernels; empty if no scores are kept.
        decode: Scratch of the decode kernels.
        merge: Scratch of the merge kernels.
        counters: [3] int64: pairs of a query and a key scored, groups merged, tokens dropped. Each
            counts per KV head and sums over all layers.
    """

    query: torch.Tensor
    output: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    lse: torch.Tensor
    shifts: torch.Tensor
    decode: paged_decode.Scratch
    merge: compaction.Scratch
    counters: torch.Tensor

    @property
    def max_keys(self) -> int:
        """Rows of keys that there is room for."""
        return len(self.key)


def max_workspace_keys(
    config: CascadeConfig, shape: Shape, max_num_batched_tokens: int, num_processors: int
) -> int:
    """Choose the number of workspace rows for a round's keys.

    Args:
        config: A valid configuration.
        shape: The layers.
        max_num_batched_tokens: Most tokens of a step.
        num_processors: Multiprocessors of the device.

    Returns:
        Rows, padding included: two full caches, or twice the tokens of a step if that is more.
        Where chunks have several waves, one of which leaves multiprocessors idle, and no scores are
        kept: a full cache for each wave of a step, or as many as fit `MOST_ROUND_BYTES` if those
        are more than two.
    """
    places = min(config.max_places, config.max_model_len) + config.block_size + KEY_PADDING
    rows = 2 * max(places, max_num_batched_tokens)
    if config.needs_scores or config.max_model_len <= config.first_boundary:
        return rows
    passes = config.stride * shape.num_heads / (TILE_QUERIES * num_processors)
    if passes / math.ceil(passes) >= BUSY_SHARE:
        return rows
    row_bytes = 2 * shape.num_kv_heads * shape.head_size * shape.dtype.itemsize
    # A chunk begins and ends within a stride.
    waves = max_num_batched_tokens // config.stride + 1
    return max(rows, min(waves, MOST_ROUND_BYTES // (places * row_bytes)) * places)


def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a device; without a GPU to ask, those of an H100 or H200."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# A workspace lives as long as some layer that uses it.
_workspaces: WeakValueDictionary[tuple[Any, ...], Workspace] = WeakValueDictionary()


def shared_workspace(
    config: CascadeConfig,
    shape: Shape,
    max_num_batched_tokens: int,
    max_requests: int,
    device: torch.device,
    per_request: int = 1,
) -> Workspace:
    """Give the scratch of all layers of one shape; the first layer that asks allocates it.

    Args:
        config: A valid configuration.
        shape: The layers.
        max_num_batched_tokens: Most tokens of a step.
        max_requests: Most requests of a step.
        device: Where the layers are.
        per_request: Most tokens of a request that are resolved one by one: a token and its drafts.

    Returns:
        The workspace, the same object for equal arguments.
    """
    key = (config, shape, max_num_batched_tokens, max_requests, device, per_request)
    workspace = _workspaces.get(key)
    if workspace is None:
        workspace = _workspaces[key] = make_workspace(*key)
    return workspace


def make_workspace(
    config: CascadeConfig,
    shape: Shape,
    max_num_batched_tokens: int,
    max_requests: int,
    device: torch.device,
    per_request: int = 1,
) -> Workspace:
    """Allocate the scratch of layers of one shape.

    Args:
        config: A valid configuration.
        shape: The layers.
        max_num_batched_tokens: Most tokens of a step.
        max_requests: Most requests of a step.
        device: Where the layers are.
        per_request: Most tokens of a request that are resolved one by one: a token and its drafts.

    Returns:
        A new workspace.
    """
    max_keys = max_workspace_keys(config, shape, max_num_batched_tokens, multiprocessors(device))
    max_rows = max_requests * per_request
    max_places = min(config.max_places, config.max_model_len) + config.block_size
    queries = (max_num_batched_tokens, shape.num_heads, shape.head_size)
    keys = (max_keys, shape.num_kv_heads, shape.head_size)
    kind: dict[str, Any] = {"dtype": shape.dtype, "device": device}
    has_flash = flash_attention(shape) is not None
    # With scores a round has at most one segment per request, and each segment has a query.
    num_shifts = key_scores.shifts_elements(
        max_num_batched_tokens,
        min(max_rows, max_num_batched_tokens),
        shape.num_heads,
        shape.num_kv_heads,
    )
    return Workspace(
        query=torch.empty(queries, **kind),
        output=torch.empty(queries, **kind),
        key=torch.empty(keys, **kind),
        value=torch.empty(keys, **kind),
        lse=torch.empty(
            shape.num_heads,
            0 if has_flash else max_num_batched_tokens,
            dtype=torch.float32,
            device=device,
        ),
        shifts=torch.empty(
            num_shifts if config.needs_scores else 0, dtype=torch.float32, device=device
        ),
        decode=paged_decode.make_scratch(
            min(max_rows, MAX_DECODE_REQUESTS * per_request),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_size,
            (shape.pages or shape.dtype).itemsize,
            max_places,
            1,
            device,
            scored=config.needs_scores,
            per_request=per_request,
        ),
        merge=compaction.make_scratch(
            max_rows,
            shape.num_kv_heads,
            shape.head_size,
            device,
            max_group=config.group_tokens,
        ),
        counters=torch.zeros(3, dtype=torch.int64, device=device),
    )


def flash_attention(shape: Shape) -> Callable[..., Any] | None:
    """Give vLLM's FlashAttention-3 if it is there and takes layers of `shape`; otherwise None."""
    if shape.dtype not in FLASH_DTYPES or shape.head_size > FLASH_MAX_HEAD_SIZE:
        return None
    if not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    takes_sinks = shape.sinks == torch.bfloat16 and shape.num_heads <= FLASH_MAX_SINKS
    if shape.sinks is not None and not takes_sinks:
        return None
    try:
        from vllm.vllm_flash_attn import FA3_AVAILABLE, flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func if FA3_AVAILABLE else None
