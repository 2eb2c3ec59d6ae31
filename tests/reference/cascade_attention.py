"""The cascade's attention over the layers of one teacher-forced run.

Keys are stored before RoPE and rotated at the place that they have in their head's cache when they
are attended to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.attention import rotate, scored_attention
from reference.cascade import Cascade, CascadeParameters, Values
from reference.replay import Comparison, Replay, ReplayError


class CascadeRun:
    """Decides or replays, layer by layer, and records.

    Args:
        parameters: The configuration.
        forced: Decisions to replay: boundary k -> int64 [num_layers, num_kv_heads, places].
        rtol: Distance under which a replayed decision may differ; see `replay.explained`.
        num_layers: Layers of the model.
        soft_cap: Soft cap on attention logits, or 0 for none.

    Attributes:
        kept: Boundary k >= 1 -> per layer int64 [num_kv_heads, places], the tokens held after it.
        comparison: The replayed decisions against the reference's own.
    """

    def __init__(
        self,
        parameters: CascadeParameters,
        forced: Mapping[int, Tensor],
        rtol: float,
        num_layers: int,
        soft_cap: float = 0.0,
    ) -> None:
        self.parameters = parameters
        self.forced = forced
        self.rtol = rtol
        self.num_layers = num_layers
        self.soft_cap = soft_cap
        self.kept: dict[int, list[Tensor]] = {}
        self.comparison = Comparison()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
        """Attend over the whole request, from boundary to boundary.

        Args:
            layer: Number of the layer.
            query: [num_kv_heads, group, tokens, head_size], before RoPE.
            key: [num_kv_heads, tokens, head_size], before RoPE.
            value: [num_kv_heads, tokens, head_size].
            rope: The table of every place.

        Returns:
            [num_kv_heads, group, tokens, head_size].

        Raises:
            ReplayError: If `forced` cannot come from the states that it is replayed on.
        """
        parameters = self.parameters
        decay = parameters.score_decay
        num_kv_heads, num_tokens, head_size = key.shape
        late = [k for k in self.forced if parameters.boundary_token(k) > num_tokens]
        if late:
            raise ReplayError(f"boundaries {late} lie beyond the {num_tokens} tokens of the run")
        cascade = Cascade(parameters, num_kv_heads)
        score = torch.zeros(num_kv_heads, num_tokens, dtype=key.dtype)
        outputs = []
        for start, end, k in parameters.segments(num_tokens):
            new = torch.arange(start, end).expand(num_kv_heads, -1)
            held = torch.cat((cascade.kept, new), dim=1)
            at = held[..., None].expand(-1, -1, head_size)
            table = rope[:, : held.shape[1]]
            # A query's weight when its stride ends: the factor decay**-(o+1) it scores with, times
            # the decay**S that the boundary multiplies by. Sinks count back from stride 0.
            age = torch.arange(end - start - 1, -1, -1, dtype=key.dtype)
            output, gain = scored_attention(
                rotate(query[:, :, start:end], table[:, -(end - start) :]),
                rotate(key.gather(1, at), table),
                value.gather(1, at),
                decay**age,
                parameters.score_power,
                parameters.score_reduction,
                soft_cap=self.soft_cap,
            )
            outputs.append(output)
            score = (score * decay ** (end - start)).scatter_add(1, held, gain)
            if end == parameters.boundary_token(k):
                values = Values(parameters, score, key, value, held)
                self._finish(layer, k, cascade, range(start, end), values)
        return torch.cat(outputs, dim=2)

    def _finish(self, layer: int, k: int, cascade: Cascade, tokens: range, values: Values) -> None:
        if k not in self.forced:
            cascade.finish_stride(tokens, values.choose)
        else:
            if len(self.forced[k]) != self.num_layers:
                raise ReplayError(
                    f"boundary {k}: {len(self.forced[k])} layers given, not {self.num_layers}"
                )
            kept = self.forced[k][layer].to(torch.int64)
            replay = Replay(self.comparison, values, kept, k, layer, self.rtol)
            cascade.finish_stride(tokens, replay.choose)
            replay.check(cascade.kept)
        if k > 0:
            self.kept.setdefault(k, []).append(cascade.kept)
