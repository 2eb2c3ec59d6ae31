"""What CASCADE says when a user asks for something that it cannot do."""

from __future__ import annotations

import math

# What --kv-cache-dtype calls FP8 with four bits of exponent and three of mantissa.
FP8_DTYPES = ("fp8", "fp8_e4m3")
GPU_HEAD_SIZES = (64, 80, 96, 128, 256, 512)
# Major compute capabilities of GPUs with 227 KiB of shared memory a block, which the largest takes.
WIDE_HEAD_CAPABILITIES = (9, 10)
ELSEWHERE = "Serve it without --attention-backend CASCADE"


class UnsupportedError(ValueError):
    """CASCADE cannot do what the user asked for.

    Args:
        asked: What was asked for, as the object of "cannot serve".
        why: Why not.
        instead: What the user can do instead, as a sentence without its full stop.
    """

    def __init__(self, asked: str, why: str, instead: str = ELSEWHERE) -> None:
        super().__init__(f"CASCADE cannot serve {asked}: {why}. {instead}.")


def alibi() -> UnsupportedError:
    """The error for a model that biases attention by distance."""
    return UnsupportedError(
        "ALiBi", "its bias grows with distance in the text, which the cache does not keep"
    )


def sliding_window(window: int) -> UnsupportedError:
    """The error where all layers, or one that CASCADE gets, have a window of `window` tokens."""
    return UnsupportedError(
        f"sliding-window layers alone (window {window} tokens)",
        "their memory is bounded already; it serves the full-attention layers of a model and "
        "leaves the others to vLLM",
    )


def check_soft_cap(cap: float | None) -> None:
    """Refuse a soft cap on attention logits that bounds nothing.

    Args:
        cap: The cap; None and 0 stand for none.

    Raises:
        UnsupportedError: The cap is negative or not finite.
    """
    if cap and not 0 < cap < math.inf:
        raise UnsupportedError(
            f"logit soft-capping ({cap:g})", "a cap is a positive number", "Correct config.json"
        )


def attention_scale(name: str) -> UnsupportedError:
    """The error for a model whose option `name` scales attention by position."""
    return UnsupportedError(
        f"a model with {name}",
        "it scales attention by the place in the text, without bound, while positions in the "
        "cache stay within the budget",
    )


def shared_kv(asked: str, instead: str = ELSEWHERE) -> UnsupportedError:
    """The error for a layer that reads another layer's KV cache.

    Args:
        asked: What shares the cache, as the object of "cannot serve".
        instead: What the user can do instead.

    Returns:
        The error, for the caller to raise.
    """
    return UnsupportedError(
        asked, "each layer keeps the tokens of its own choice, so none can use another's", instead
    )


def check_gpu_head_size(head_size: int, capability: tuple[int, int] | None) -> None:
    """Refuse a `head_size` that the GPU's kernels do not take, or not on this GPU.

    Args:
        head_size: Channels of a layer's keys.
        capability: Compute capability, None if unknown.

    Raises:
        UnsupportedError: The message names the head size.
    """
    if head_size not in GPU_HEAD_SIZES:
        raise UnsupportedError(
            f"head size {head_size} on a GPU",
            f"its kernels are tested with head sizes {', '.join(map(str, GPU_HEAD_SIZES))}",
        )
    if head_size > 256 and (capability is None or capability[0] not in WIDE_HEAD_CAPABILITIES):
        version = "unknown" if capability is None else ".".join(map(str, capability))
        raise UnsupportedError(
            f"head size {head_size} on a GPU of compute capability {version}",
            "its tiles take as much shared memory as GPUs of compute capability "
            f"{' and '.join(f'{major}.x' for major in WIDE_HEAD_CAPABILITIES)} have, and no others",
        )


def check_copies(ranks: int, num_kv_heads: int, policy: str) -> None:
    """Refuse ranks with copies of one KV head, by a policy with attention scores.

    Args:
        ranks: Ranks that share each layer's KV heads.
        num_kv_heads: KV heads of a layer, on all ranks together.
        policy: The cascade's policy.

    Raises:
        UnsupportedError: There are more ranks than KV heads.
    """
    if ranks > num_kv_heads:
        raise UnsupportedError(
            f"tensor_parallel_size {ranks} with {num_kv_heads} KV heads and policy {policy!r}",
            "ranks would hold copies of a head, each scored by its own rank's queries, and what is "
            "kept would depend on the number of ranks",
            f"Use --tensor-parallel-size {num_kv_heads} or less, or a policy without attention "
            "scores",
        )


def kv_dtype(dtype: str) -> UnsupportedError:
    """The error for a KV cache of another `dtype`, as --kv-cache-dtype has it, than is known."""
    return UnsupportedError(
        f"KV cache dtype {dtype!r}",
        "keys are compared and rotated from the cache, and it reads the model's own dtype and FP8 "
        "(e4m3) there",
        "Use --kv-cache-dtype auto or fp8",
    )


def is_fp8(kv_cache_dtype: str) -> bool:
    """Whether a --kv-cache-dtype is the FP8 that CASCADE has."""
    return kv_cache_dtype in FP8_DTYPES
