"""NaN and infinities in one request's layer inputs never reach another request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from layers import HEAD, KV_HEADS, SHARED, GpuEngine, config_of

SMALL = {"cache_tokens": 64, "num_sub_caches": 2, "num_sink_tokens": 16, "stride": 32}
# Each but the short one crosses boundaries in chunks, and one more in its last tokens.
LENGTHS = [149, 151, 30, 119]
BAD = 1
CUT, SINGLE = 45, 9


@dataclass
class Held:
    """All that one request left behind: outputs, and scores and tokens of what it holds."""

    output: torch.Tensor
    score: torch.Tensor | None
    kept: torch.Tensor


def play(policy: str, dtype: torch.dtype, bad: list[float]) -> list[Held]:
    """Chunks of all requests together, then single tokens; boundaries are crossed in both.

    Args:
        policy: The cascade's.
        dtype: Of inputs and pages.
        bad: Values put into request `BAD`, here and there; empty for none.
    """
    generator = torch.Generator().manual_seed(5)

    def draw(heads: int) -> list[torch.Tensor]:
        return [torch.randn(n, heads, HEAD, generator=generator).to(dtype) for n in LENGTHS]

    q, k, v = draw(KV_HEADS * SHARED), draw(KV_HEADS), draw(KV_HEADS)
    for i, value in enumerate(bad):
        for step, tensor in enumerate((q[BAD], k[BAD], v[BAD])):
            tensor[20 * i + 7 * step :: 61, i % tensor.shape[1], :: step + 1] = value
    cascade: dict[str, Any] = {**SMALL, "policy": policy, "selection_window": 32}
    if policy == "window":
        cascade |= {"num_sub_caches": 1, "selection_window": None}
    config = config_of(600, **cascade)
    torch.manual_seed(6)
    engine = GpuEngine(config, len(LENGTHS), dtype)
    done, outputs = [0] * len(LENGTHS), [[] for _ in LENGTHS]
    while any(d < n for d, n in zip(done, LENGTHS, strict=True)):
        spans = []
        for r, length in enumerate(LENGTHS):
            # The last tokens come one at a time.
            chunk = min(CUT, length - SINGLE - done[r])
            if done[r] < length:
                spans.append((r, done[r], done[r] + max(1, chunk)))
        out = engine.step(spans, q, k, v)
        for (r, _, end), part in zip(spans, out.split([e - s for _, s, e in spans]), strict=True):
            outputs[r].append(part)
            done[r] = end
    held = []
    for r, length in enumerate(LENGTHS):
        entries, places = engine.layout.held(length)
        rows = torch.from_numpy(engine.table[r][entries]).long()
        score = None
        if engine.pages.score is not None:
            score = engine.pages.score.cpu()[rows].transpose(0, 1).flatten(1)[:, :places]
        held.append(Held(torch.cat(outputs[r]), score, engine.kept(r, length)))
    return held


@pytest.mark.parametrize("policy", ["distinct", "blend", "window"])
# Triton's interpreter makes finite numbers of bfloat16's NaN and infinities.
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_bad_values_stay_with_their_request(policy: str, dtype: torch.dtype) -> None:
    clean = play(policy, dtype, [])
    bad = play(policy, dtype, [float("nan"), float("inf"), float("-inf")])
    again = play(policy, dtype, [])
    assert not bad[BAD].output.isfinite().all()
    assert clean[0].kept.shape[1] < LENGTHS[0]
    for r in range(len(LENGTHS)):
        assert clean[r].output.isfinite().all()
        for other in (bad, again):
            if other is bad and r == BAD:
                continue
            assert torch.equal(clean[r].output, other[r].output), r
            assert torch.equal(clean[r].kept, other[r].kept), r
            if clean[r].score is not None:
                assert torch.equal(clean[r].score, other[r].score), r
