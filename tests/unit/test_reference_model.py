"""The oracle of a whole model: against a naive implementation and transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from reference.attention import scored_attention
from reference.llama import Llama, LlamaConfig
from reference.naive import naive_run
from small_model import NUM_TOKENS, TINY, assert_same, parameters

CASES = {
    "paper": parameters(),
    "paper mean": parameters(score_reduction="mean"),
    "distinct": parameters(
        selection_window=8, score_weight=0.0, key_weight=1.0, value_weight=1.0, newest_share=0.5
    ),
    "blend": parameters(selection_window=8, score_power=2.0, key_weight=1.0, value_weight=1.0),
    "blend mean": parameters(score_reduction="mean", score_power=2.0, selection_window=8),
    "key alone, half the weight": parameters(selection_window=16, key_weight=0.5),
    "value alone": parameters(selection_window=16, score_weight=0.0, value_weight=2.0),
    "groups that wait": parameters(cache_tokens=38, selection_window=8, num_sink_tokens=12),
    "no sinks": parameters(num_sink_tokens=0, selection_window=4, key_weight=2.0),
    "window": parameters(num_sub_caches=1, cache_tokens=32),
    "five sub-caches": parameters(num_sub_caches=5, cache_tokens=40, stride=8),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_naive_implementation(name, model, tensors, tokens):
    logprobs, kept = naive_run(TINY, tensors, tokens, CASES[name])
    run = model.run(tokens, CASES[name])
    assert {k: t.tolist() for k, t in run.kept.items()} == kept
    assert_same(run.logprobs, torch.tensor(logprobs, dtype=torch.float64))


def test_cases_tell_heads_layers_and_rules_apart(model, tokens):
    runs = {name: model.run(tokens, case).kept for name, case in CASES.items()}
    last = runs["blend"][max(runs["blend"])]
    assert len({tuple(row.tolist()) for row in last.flatten(0, 1)}) == 4
    paper, mean = runs["paper"], runs["paper mean"]
    assert any(not torch.equal(paper[k], mean[k]) for k in paper)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 20, 52, 67, NUM_TOKENS])
def test_under_budget_is_full_attention(num_tokens, model, tokens):
    """Up to the budget, and through the stride that passes it."""
    some = tokens[:num_tokens]
    roomy = parameters() if num_tokens < 68 else parameters(cache_tokens=192)
    run, full = model.run(some, roomy), model.run(some)
    assert_same(run.logprobs, full.logprobs)
    assert_same(run.top_logprobs, full.top_logprobs)
    assert torch.equal(run.top_tokens, full.top_tokens)
    for k, kept in run.kept.items():
        end = roomy.boundary_token(k)
        assert end > 52 or torch.equal(kept, torch.arange(end).expand(2, 2, -1))


def test_beyond_budget_is_not_full_attention(model, tokens):
    full = model.run(tokens)
    assert (model.run(tokens, parameters()).logprobs - full.logprobs).abs().max() > 1e-3


def test_loads_a_saved_folder(model, tensors, tokens, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    loaded = Llama.from_folder(tmp_path)
    assert_same(loaded.run(tokens).logprobs, model.run(tokens).logprobs)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        Llama.from_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, "RoPE"),
        ({"attention_bias": True}, "bias"),
        ({"hidden_act": "gelu"}, "SiLU"),
    ],
)
def test_refuses_another_architecture(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.parse(TINY | change)


def test_refuses_an_unknown_reduction():
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(ValueError, match="score_reduction"):
        scored_attention(x, x[:, 0], x[:, 0], torch.ones(1), 1.0, "sum")


@pytest.mark.parametrize("tied", [True, False])
def test_full_attention_equals_transformers(tied, tokens, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    def norm(self, x):  # theirs rounds to float32 whatever the model's dtype
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    rope = {"rope_type": "default", "rope_theta": TINY["rope_theta"]}
    config = transformers.LlamaConfig(
        **TINY | {"tie_word_embeddings": tied}, rope_parameters=rope, attn_implementation="sdpa"
    )
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    state = {name: 3 * w if "proj" in name else w for name, w in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = Llama(config.to_dict(), state).run(tokens, top=TINY["vocab_size"])
    with torch.no_grad():
        logprobs = theirs(torch.tensor([tokens])).logits[0].log_softmax(-1)
    every = torch.empty_like(logprobs).scatter(1, ours.top_tokens, ours.top_logprobs)
    torch.testing.assert_close(every, logprobs, rtol=0, atol=1e-8)
    following = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(ours.logprobs, following, rtol=0, atol=1e-8)
