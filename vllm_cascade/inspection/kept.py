"""Which tokens of one text each layer and KV head kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_cascade.structure.config import CascadeConfig
from vllm_cascade.structure.layout import build_layout

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_TOKENS_OF_A_CHARACTER = 4  # bytes in UTF-8


@dataclass(frozen=True, slots=True)
class Passage:
    """What each head kept of one passage of the text.

    Attributes:
        text: The passage.
        first: Index of its first token.
        last: Index of its last token.
        share: Share, 0 to 1, of all pairs of one of its tokens and a head that are kept.
        whole: Number of heads that kept all of its tokens.
    """

    text: str
    first: int
    last: int
    share: float
    whole: int


@dataclass(frozen=True)
class Kept:
    """One text, and what a cascade still holds of it.

    Attributes:
        model: As for `vllm.LLM`.
        config: The resolved configuration.
        token_ids: All tokens computed: the prompt's, and the generated ones but for the last.
        pieces: The text of each token in `token_ids`.
        num_prompt_tokens: How many of `token_ids` are the prompt's.
        answer: The whole generated text.
        layers: Layer name to [num_kv_heads][num_kept] token indices, ascending.

    Raises:
        ValueError: A head does not hold one token for each place, or not in ascending order.
    """

    model: str
    config: CascadeConfig
    token_ids: list[int]
    pieces: list[str]
    num_prompt_tokens: int
    answer: str
    layers: dict[str, list[list[int]]]

    def __post_init__(self) -> None:
        for name, heads in self.layers.items():
            for head, kept in enumerate(heads):
                ascending = all(a < b for a, b in pairwise([-1, *kept, len(self.token_ids)]))
                if len(kept) != self.num_kept or not ascending:
                    raise ValueError(
                        f"{name}, KV head {head}: its {len(kept)} token indices are not "
                        f"{self.num_kept} in ascending order"
                    )

    @cached_property
    def parts(self) -> dict[str, int]:
        """The parts of the cache, oldest first, with the number of tokens a head holds in each."""
        return build_layout(self.config).parts(len(self.token_ids))

    @property
    def num_kept(self) -> int:
        """Tokens that each head holds."""
        return sum(self.parts.values())

    @property
    def num_heads(self) -> int:
        """Pairs of a layer and one of its KV heads."""
        return sum(len(heads) for heads in self.layers.values())

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """[num_tokens] pairs of a layer and a KV head that hold each token."""
        held = [kept for heads in self.layers.values() for kept in heads]
        return np.bincount(np.concatenate(held), minlength=len(self.token_ids))

    def starts(self, kept: Sequence[int]) -> list[int]:
        """Find the first token of each part of the cache in one head.

        Args:
            kept: [num_kept] token indices that the head holds, ascending.

        Returns:
            A token index for each of `parts`; an empty part has that of the part after it.
        """
        places = np.cumsum([0, *self.parts.values()])[:-1]
        ends = [*kept, len(self.token_ids)]
        return [ends[place] for place in places]

    def spans(self) -> dict[str, tuple[int, int]]:
        """Map each part of the cache to the first and last token that any head holds in it."""
        starts = [self.starts(kept) for heads in self.layers.values() for kept in heads]
        found, place = {}, 0
        for index, (part, size) in enumerate(self.parts.items()):
            place += size
            if size:
                last = max(kept[place - 1] for heads in self.layers.values() for kept in heads)
                found[part] = (min(start[index] for start in starts), last)
        return found

    def find(self, text: str) -> list[Passage]:
        """List all passages that read `text`; a token that holds only a part of it counts too."""
        ends = np.cumsum([len(piece) for piece in self.pieces])
        found = []
        for match in re.finditer(re.escape(text), "".join(self.pieces)):
            first = int(np.searchsorted(ends, match.start(), side="right"))
            last = int(np.searchsorted(ends, match.end(), side="left"))
            wanted = set(range(first, last + 1))
            held = [len(wanted & set(kept)) for heads in self.layers.values() for kept in heads]
            share = sum(held) / len(held) / len(wanted)
            found.append(Passage(text, first, last, share, held.count(len(wanted))))
        return found

    def as_json(self) -> dict[str, Any]:
        """Give all that was kept as a JSON object, for scripts."""
        return {
            "model": self.model,
            "cascade": asdict(self.config),
            "num_prompt_tokens": self.num_prompt_tokens,
            "answer": self.answer,
            "token_ids": self.token_ids,
            "pieces": self.pieces,
            "parts": self.parts,
            "layers": self.layers,
        }

    def as_text(self) -> str:
        """Sum up what was kept in a few lines, for a reader."""
        total, config = len(self.token_ids), self.config
        caches = f"{config.num_sub_caches} sub-cache{'s' * (config.num_sub_caches > 1)}"
        if config.is_elastic:
            caches = f"{sum(part.startswith('level') for part in self.parts)} levels"
        lines = [
            f"{total:,} tokens computed, {self.num_prompt_tokens:,} of them the prompt's; "
            f"answer: {self.answer!r}",
            f"{config.policy}: {config.cache_tokens:,} tokens in {caches}, "
            f"{config.num_sink_tokens} sinks, "
            f"stride {config.stride:,}, reach {config.reach:,} tokens",
            f"each of {self.num_heads} layer and KV head pairs kept {self.num_kept:,} tokens "
            f"({self.num_kept / total:.1%}); all of them kept "
            f"{np.count_nonzero(self.counts == self.num_heads):,}, none of them "
            f"{np.count_nonzero(self.counts == 0):,} ({np.mean(self.counts == 0):.1%})",
        ]
        for part, (first, last) in self.spans().items():
            lines.append(
                f"  {part:<13}{self.parts[part]:>8,} tokens a head, from {first:,} to {last:,}"
            )
        return "\n".join(lines)


def layers_of(ranks: Sequence[Mapping[str, list[list[int]]]]) -> dict[str, list[list[int]]]:
    """Put each layer's heads together from the ranks that share the layer.

    Args:
        ranks: For each rank, in order: layer name to [KV heads of the rank][num_kept] token
            indices.

    Returns:
        Layer name to [num_kv_heads][num_kept] token indices.
    """
    layers: dict[str, list[list[int]]] = {}
    for rank in ranks:
        for name, heads in rank.items():
            layers.setdefault(name, []).extend(heads)
    return layers


def pieces_of(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Decode tokens one by one.

    Args:
        tokenizer: A tokenizer of the transformers library.
        token_ids: Tokens of one text.

    Returns:
        The text of each token. If several tokens make one character, the last of them has it and
        the others have "".
    """
    pieces: list[str] = []
    pending: list[int] = []
    for index, token_id in enumerate(token_ids):
        pending.append(token_id)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        unfinished = text.endswith(REPLACEMENT) and len(pending) < MAX_TOKENS_OF_A_CHARACTER
        if unfinished and index + 1 < len(token_ids):
            pieces.append("")
            continue
        # SentencePiece's tokens begin with a space, which decoding one token alone drops.
        name = tokenizer.convert_ids_to_tokens(pending[0])
        if isinstance(name, str) and name.startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"
        pieces.append(text)
        pending = []
    return pieces
