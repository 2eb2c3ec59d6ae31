"""Causal attention by others, to compare with: callables over [num_tokens, heads, head_size]."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# vLLM's bound on the splits of a row in decode, where CUDA graphs are on.
GRAPH_SPLITS = 32

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class MissingError(RuntimeError):
    """A baseline that is not installed, or does not run on this GPU."""


def flash3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """FlashAttention-3 as vLLM ships it, over one whole prompt."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    starts = _starts(len(query), query.device)
    flash_attn_varlen_func(
        query,
        key,
        value,
        len(query),
        starts,
        len(query),
        cu_seqlens_k=starts,
        softmax_scale=query.shape[-1] ** -0.5,
        causal=True,
        out=out,
        fa_version=3,
    )


def flash2(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """FlashAttention-2 as PyTorch ships it; `out` is not written."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        _sdpa(query, key, value)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
    """PyTorch's attention on a CPU, in the place of the others where there is no GPU."""
    out.copy_(_sdpa(query, key, value)[0].transpose(0, 1))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys as these want them.

    Args:
        x: [..., head_size].
        cos: What [..., head_size / 2] is multiplied with.
        sin: As `cos`.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    parts = (x.transpose(0, 1)[None] for x in (query, key, value))
    return functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)


def xformers_attention() -> Attention:
    """xformers' memory-efficient attention, by the operator that it chooses itself.

    Raises:
        MissingError: It cannot be imported.
    """
    try:
        from xformers import ops
    except ImportError as error:
        raise MissingError(f"xformers is not installed ({error})") from error

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> None:
        tokens, heads, channels = query.shape
        kv_heads = key.shape[1]
        # [1, tokens, KV heads, query heads per KV head, channels]
        grouped = (1, tokens, kv_heads, heads // kv_heads, channels)
        ops.memory_efficient_attention(
            query.view(grouped),
            key[None, :, :, None].expand(grouped),
            value[None, :, :, None].expand(grouped),
            attn_bias=ops.LowerTriangularMask(),
        )

    return attend


def flash3_decodes(
    query: torch.Tensor, num_kv_heads: int, length: int, block_size: int
) -> dict[str, Callable[[], None]]:
    """FlashAttention-3 over pages of `length` keys a row, as vLLM calls it and with its own splits.

    Pages are its favourite: K and V dense, keys already rotated, the schedule made beforehand.

    Args:
        query: [num_rows, num_heads, head_size].
        num_kv_heads: KV heads.
        length: Keys of every row.
        block_size: Tokens of a page.

    Returns:
        Name to one call, which may be captured.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    num_rows, num_heads, head_size = query.shape
    device, width = query.device, -(-length // block_size)
    pool = (num_rows * width, block_size, num_kv_heads, head_size)
    key, value = (torch.empty(pool, dtype=query.dtype, device=device) for _ in range(2))
    for part in (*key.split(4096), *value.split(4096)):
        part.normal_()
    table = torch.randperm(num_rows * width, device=device).to(torch.int32).view(num_rows, width)
    lengths = torch.full((num_rows,), length, dtype=torch.int32, device=device)
    starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    out = torch.empty_like(query)

    def call(splits: int) -> Callable[[], None]:
        schedule = get_scheduler_metadata(
            batch_size=num_rows,
            max_seqlen_q=1,
            max_seqlen_k=length,
            num_heads_q=num_heads,
            num_heads_kv=num_kv_heads,
            headdim=head_size,
            cache_seqlens=lengths,
            qkv_dtype=query.dtype,
            cu_seqlens_q=starts,
            page_size=block_size,
            causal=True,
            num_splits=splits,
        )
        return functools.partial(
            flash_attn_varlen_func,
            query,
            key,
            value,
            1,
            starts,
            length,
            seqused_k=lengths,
            softmax_scale=head_size**-0.5,
            causal=True,
            block_table=table,
            out=out,
            scheduler_metadata=schedule,
            num_splits=splits,
            fa_version=3,
        )

    return {f"at most {GRAPH_SPLITS} splits": call(GRAPH_SPLITS), "own number of splits": call(0)}


def plain_decodes(
    query: torch.Tensor, num_kv_heads: int, length: int, block_size: int
) -> dict[str, Callable[[], None]]:
    """`plain` for single tokens over keys that are not paged."""
    num_rows, _, head_size = query.shape
    key, value = torch.randn(2, num_rows, num_kv_heads, length, head_size, dtype=query.dtype)
    attend = functional.scaled_dot_product_attention
    return {"not paged": functools.partial(attend, query[:, :, None], key, value, enable_gqa=True)}


@functools.lru_cache(maxsize=8)
def _starts(num_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
