"""What CASCADE says when it is asked for something it does not do."""

from __future__ import annotations

ELSEWHERE = "Serve it without --attention-backend CASCADE"


class UnsupportedError(ValueError):
    """Something asked for that CASCADE cannot do; says what, why not and what to do instead."""

    def __init__(self, asked: str, why: str, instead: str = ELSEWHERE) -> None:
        super().__init__(f"CASCADE cannot serve {asked}: {why}. {instead}.")


def alibi() -> UnsupportedError:
    """The model biases attention by distance."""
    return UnsupportedError(
        "ALiBi", "its bias grows with distance in the text, which the cache does not keep"
    )


def sliding_window(window: int) -> UnsupportedError:
    """No layer attends in full, or a layer with a window was given to CASCADE."""
    return UnsupportedError(
        f"sliding-window layers alone (window {window} tokens)",
        "their memory is bounded already; it serves the full-attention layers of a model and "
        "leaves the others to vLLM",
    )


def soft_cap(cap: float) -> UnsupportedError:
    """The model caps attention logits at `cap`."""
    return UnsupportedError(f"logit soft-capping ({cap:g})", "it attends by a plain softmax")


def attention_scale(name: str) -> UnsupportedError:
    """The model's option `name` scales attention by position."""
    return UnsupportedError(
        f"a model with {name}",
        "it scales attention by the place in the text, without bound, while positions in the "
        "cache stay within the budget",
    )


def shared_kv(asked: str, instead: str = ELSEWHERE) -> UnsupportedError:
    """A layer reads the KV cache of another."""
    return UnsupportedError(
        asked, "each layer keeps the tokens of its own choice, so none can use another's", instead
    )


def kv_dtype(dtype: str) -> UnsupportedError:
    """The KV cache has another dtype than the model."""
    return UnsupportedError(
        f"KV cache dtype {dtype!r}",
        "keys are compared and rotated from the cache in the model's own dtype",
        "Use --kv-cache-dtype auto",
    )
