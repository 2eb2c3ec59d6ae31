"""Finds alone: a drafter's layers that keep other tokens than the text alone would have kept.

A drafter that is the model itself is always right. One with random weights is seldom right, but
what it proposes depends on the text alone, not on how the drafter has come to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from e2e.support import cascade_manager_of, core_of, engine, impls_of, poisoned
from e2e.test_speculative import (
    ANSWER,
    MODEL,
    NUM_DRAFTS,
    OPTIONS,
    PROMPTS,
    Counts,
    logprobs_of,
    preempt_at,
    run,
    tokens_of,
)
from e2e.tiny import CASCADE, ELASTIC, LLAMA, random_prompt, save_gpt_oss, save_llama
from reference.llama import random_tensors

pytestmark = pytest.mark.model
# Some at a boundary, some just before one, some behind it.
FEW = PROMPTS[::5]
# What a head takes over from its model.
SHAPE = {"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"}


def save_eagle(folder: Path, **changes: Any) -> str:
    """A random EAGLE head of one layer; embedding and head are the model's."""
    config = {**LLAMA, **MODEL, "num_hidden_layers": 1, **changes}
    tensors = random_tensors(config, seed=1)
    hidden = config["hidden_size"]
    kept = {
        name.removeprefix("model."): tensor.float().contiguous()
        for name, tensor in tensors.items()
        if name.startswith("model.layers") and "input_layernorm" not in name
    }
    draw = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(2))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(kept | {"fc.weight": draw * hidden**-0.5}, folder / "model.safetensors")
    return str(folder)


class Proposals:
    """What an engine's drafter has proposed behind each text."""

    def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        scheduler = core_of(llm).scheduler
        original = scheduler.update_draft_token_ids
        self.by_text: dict[tuple[int, ...], list[int]] = {}

        def update_draft_token_ids(drafts: Any) -> None:
            original(drafts)
            for name in drafts.req_ids:
                request = scheduler.requests.get(name)
                if request is not None and request.spec_token_ids:
                    text = tuple(request.all_token_ids)
                    self.by_text[text] = list(request.spec_token_ids)

        monkeypatch.setattr(scheduler, "update_draft_token_ids", update_draft_token_ids)


def speculative(method: str, model: str) -> dict[str, Any]:
    return {"method": method, "model": model, "num_speculative_tokens": NUM_DRAFTS}


def save_configs(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A model and its drafter for dummy weights: an EAGLE-3 head, or an MTP layer of the model."""
    shape = {**LLAMA, **MODEL, **changes}
    if method == "mtp":
        shape |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
        # Its heads have the hidden size between them.
        hidden = shape["head_dim"] * shape["num_attention_heads"]
        shape |= {"num_nextn_predict_layers": 1, "hidden_size": hidden}
        drafter: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
    else:
        head = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 2048}
        (folder / "drafter").mkdir()
        config = json.dumps({**shape, **head, "num_hidden_layers": 1})
        (folder / "drafter" / "config.json").write_text(config)
        drafter = speculative("eagle3", str(folder / "drafter"))
    (folder / "config.json").write_text(json.dumps(shape))
    return drafter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"), **MODEL)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("drafters")
    # Fewer layers, and pages of half the size.
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    draft_model = save_llama(folder / "small", seed=5, **MODEL, **small)
    return {
        "draft_model": speculative("draft_model", draft_model),
        "eagle": speculative("eagle", save_eagle(folder / "eagle")),
    }


@pytest.mark.parametrize("cascade", [CASCADE, ELASTIC], ids=["fixed", "elastic"])
@pytest.mark.parametrize("preempt", [False, True], ids=["in order", "preempted"])
def test_the_model_itself_is_always_right(
    model: str, monkeypatch: pytest.MonkeyPatch, cascade: dict[str, Any], preempt: bool
) -> None:
    """Past every boundary it has kept what the model has kept, and proposes what the model says."""
    with engine(cascade, model, **OPTIONS) as llm:
        expected = run(llm, PROMPTS)
    with engine(
        cascade, model, speculative_config=speculative("draft_model", model), **OPTIONS
    ) as llm:
        assert len(impls_of(llm)) == 2 * LLAMA["num_hidden_layers"]
        counts = Counts(llm, monkeypatch)
        preempt_at(llm, (10, 30) if preempt else (), monkeypatch)
        with poisoned(llm):
            found = run(llm, PROMPTS)
        manager = cascade_manager_of(llm)
        assert not manager.req_to_blocks and not manager._progress
    assert counts.accepted == counts.drafts > len(PROMPTS) * ANSWER * 0.7
    for ours, theirs in zip(found, expected, strict=True):
        assert tokens_of(ours) == tokens_of(theirs)
        torch.testing.assert_close(logprobs_of(ours), logprobs_of(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "batches"), [("draft_model", (2000, 512, 48)), ("eagle", (20000,))]
)
def test_proposals_depend_on_the_text_alone(
    model: str,
    drafters: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    batches: tuple[int, ...],
) -> None:
    """Token by token, as a prompt in one piece, and in small pieces.

    What EAGLE keeps of a token depends on the next one, which it does not get at the end of a piece
    or of a block that another request goes on from: with vLLM's own attention neither.
    """
    options: dict[str, Any] = {
        **OPTIONS,
        "speculative_config": drafters[method],
        "async_scheduling": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": batches[0],
    }
    with engine(ELASTIC, model, **options) as llm:
        proposals = Proposals(llm, monkeypatch)
        answers = [[*p, *tokens_of(each)] for p, each in zip(FEW, run(llm, FEW), strict=True)]
        by_token = proposals.by_text
        # Texts behind which something has been proposed already.
        prompts = [tokens[:-number] for tokens in answers for number in (1, 2, 17, 40)]
        for batch in batches:
            core_of(llm).scheduler.max_num_scheduled_tokens = batch
            proposals.by_text = {}
            run(llm, prompts, max_tokens=8)
            both = by_token.keys() & proposals.by_text.keys()
            assert len(both) > len(FEW) * 8
            assert all(by_token[text] == proposals.by_text[text] for text in both)


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_as_with_vllms_own_attention_within_the_budget(
    tmp_path: Path,
    drafters: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    shape = {**MODEL, "head_dim": 32}
    model = save_llama(tmp_path / "model", **shape)
    drafter = {
        "draft_model": lambda: save_llama(tmp_path / "drafter", seed=5, **shape),
        "eagle": lambda: save_eagle(tmp_path / "drafter", head_dim=32),
    }[method]()
    options = OPTIONS | {"block_size": 32, "async_scheduling": False}
    prompts = [random_prompt(70 + n, seed=n) for n in range(12)]
    found = []
    for cascade in (None, CASCADE | {"num_sink_tokens": 32}):
        with (
            monkeypatch.context() as patch,
            engine(
                cascade, model, speculative_config=speculative(method, drafter), **options
            ) as llm,
        ):
            proposals = Proposals(llm, patch)
            run(llm, prompts, max_tokens=20)
            found.append(proposals.by_text)
    assert found[0] == found[1] and len(found[0]) > 5 * len(prompts)


def test_beside_layers_with_a_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's layer is CASCADE's, as are the model's that attend in full, for texts as long."""
    model = save_gpt_oss(tmp_path / "model", **MODEL)
    text = json.loads((tmp_path / "model" / "config.json").read_text())
    shape = {name: text[name] for name in LLAMA.keys() & text.keys() & SHAPE}
    shape["max_position_embeddings"] = OPTIONS["max_model_len"] // 2
    drafter = speculative("eagle", save_eagle(tmp_path / "drafter", **shape))
    options = {**OPTIONS, "block_size": 32, "max_num_batched_tokens": 20000}
    options |= {"async_scheduling": False, "enable_prefix_caching": False}
    cascade = ELASTIC | {"num_sink_tokens": 32}
    with engine(cascade, model, **options) as llm:
        expected = [tokens_of(each) for each in run(llm, FEW)]
        num_full = sum(type(impl).__name__ == "CascadeImpl" for impl in impls_of(llm))
    with engine(cascade, model, speculative_config=drafter, **options) as llm:
        impls = [type(impl).__name__ for impl in impls_of(llm)]
        assert impls.count("CascadeImpl") == num_full + 1 < len(impls)
        drafting = core_of(llm).vllm_config.speculative_config
        assert drafting.draft_model_config.max_model_len == OPTIONS["max_model_len"]
        proposals = Proposals(llm, monkeypatch)
        assert [tokens_of(each) for each in run(llm, FEW)] == expected
        by_token, proposals.by_text = proposals.by_text, {}
        run(llm, [[*p, *a[:-9]] for p, a in zip(FEW, expected, strict=True)], max_tokens=8)
    both = by_token.keys() & proposals.by_text.keys()
    assert len(both) > len(FEW)
    assert all(by_token[text] == proposals.by_text[text] for text in both)


@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_other_drafters_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """With vLLM's dummy weights: heads that take several layers' states, and layers of a model."""
    drafter = save_configs(tmp_path, method, head_dim=32)
    options = {**OPTIONS, "load_format": "dummy", "max_num_batched_tokens": 20000}
    options |= {"async_scheduling": False, "enable_prefix_caching": False}
    with engine(ELASTIC, str(tmp_path), speculative_config=drafter, **options) as llm:
        assert len(impls_of(llm)) == LLAMA["num_hidden_layers"] + 1
        proposals = Proposals(llm, monkeypatch)
        answers = [[*p, *tokens_of(each)] for p, each in zip(FEW, run(llm, FEW), strict=True)]
        by_token, proposals.by_text = proposals.by_text, {}
        run(llm, [tokens[:-9] for tokens in answers], max_tokens=8)
    both = by_token.keys() & proposals.by_text.keys()
    assert len(both) > len(FEW)
    assert all(by_token[text] == proposals.by_text[text] for text in both)
