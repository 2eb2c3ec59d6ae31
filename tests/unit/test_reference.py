"""The oracle itself: against the paper's algorithm, a naive implementation and transformers."""

from __future__ import annotations

import ast
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from reference.attention import rope_table, rotate, scored_attention
from reference.cascade import Cascade, CascadeParameters
from reference.cascade_attention import CascadeRun
from reference.llama import Llama, LlamaConfig, random_tensors
from reference.naive import naive_run
from reference.paper import token_by_token
from reference.replay import ReplayError, explained, rank_bounds
from reference.selection import distinctiveness, rank, select

NAN, INF = math.nan, math.inf


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float64 sums, which may depend on where a tensor lies."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_imports_nothing_that_it_judges():
    folder = Path(__file__).parents[1] / "reference"
    allowed = {"__future__", "collections", "dataclasses", "functools", "json", "pathlib"}
    allowed |= {"numpy", "reference", "safetensors", "torch", "typing"}
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, file.name


# Ranks and selection


def ranks_by_definition(values: list[float]) -> list[int]:
    def key(i: int) -> tuple[bool, float, int]:
        return (not math.isnan(values[i]), 0.0 if math.isnan(values[i]) else values[i], i)

    order = sorted(range(len(values)), key=key)
    return [order.index(i) for i in range(len(values))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], [2, 0, 1, 3]),
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2, 3]),
        ([0.0, -0.0], [0, 1]),
        ([NAN, NAN, NAN, NAN], [0, 1, 2, 3]),
        ([0.0, NAN, -INF, INF], [2, 0, 1, 3]),
        ([INF, 5.0, INF, NAN], [2, 1, 3, 0]),
        ([-INF, NAN], [1, 0]),
    ],
)
def test_rank_at_the_edges(values, expected):
    assert rank(torch.tensor(values)).tolist() == expected


@given(st.lists(st.sampled_from([NAN, -INF, INF, 0.0, 1.0, 1.5]), min_size=1, max_size=9))
def test_rank_is_the_definition(values):
    assert rank(torch.tensor(values)).tolist() == ranks_by_definition(values)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_windows_keep_the_newer_half(value, dtype):
    window = torch.full((2, 3, 8), value, dtype=dtype)
    newer_half = [False] * 4 + [True] * 4
    for key_weight in (0.0, 1.0):
        kept = select(window, window, key_weight)
        assert (kept == torch.tensor(newer_half)).all()


def test_select_keeps_half_whatever_the_values():
    special = [NAN, INF, -INF, 0.0]
    windows = torch.tensor(list(itertools.product(special, repeat=4)))
    for key_weight in (0.0, 0.5, 1.0):
        assert (select(windows, windows.flip(0), key_weight).sum(-1) == 2).all()


def test_select_by_score_prefers_high_then_new():
    score = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, NAN], [NAN, INF]])
    assert select(score).tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]


def test_select_adds_weighted_ranks():
    score = torch.tensor([4.0, 3.0, 2.0, 1.0])  # ranks 3 2 1 0
    distinct = torch.tensor([-4.0, -3.0, -1.0, -2.0])  # ranks 0 1 3 2
    assert select(score, distinct, 0.5).tolist() == [True, False, True, False]  # 3 2.5 2.5 1
    assert select(score, distinct, 1.0).tolist() == [False, True, True, False]  # 3 3 4 2
    assert select(score, distinct, 10.0).tolist() == [False, False, True, True]
    assert select(score, distinct, 0.0).tolist() == [True, True, False, False]


def test_select_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="even"):
        select(torch.zeros(3))
    with pytest.raises(ValueError, match="key_weight"):
        select(torch.zeros(4), None, 1.0)


def test_distinctiveness_is_minus_the_cosine_to_the_mean_unit_key():
    keys = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    # Unit keys (1,0) (0,1) (0,1) (0,0): the mean points along (1, 2).
    expected = torch.tensor([-1.0, -2.0, -2.0, 0.0], dtype=torch.float64) / 5**0.5
    torch.testing.assert_close(distinctiveness(keys), expected)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert distinctiveness(opposite).tolist() == [0.0, 0.0]


# Structure


def parameters(**changes: object) -> CascadeParameters:
    small = CascadeParameters(
        block_size=4,
        num_sink_tokens=4,
        cache_tokens=48,
        num_sub_caches=3,
        stride=16,
        selection_window=2,
        score_decay=0.98,
    )
    return replace(small, **changes)


def random_scores(total: int, stride: int, seed: int) -> Tensor:
    """Running scores after each stride: [strides, total], float64."""
    draw = torch.rand(
        total // stride, total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    running = [draw[0]]
    for row in draw[1:]:
        running.append(0.99 * running[-1] + row)
    return torch.stack(running)


@pytest.mark.parametrize(
    ("total", "stride", "size", "sub_caches", "block"),
    [
        (4096, 128, 128, 4, 16),
        (8192, 256, 256, 4, 16),
        (16384, 256, 512, 4, 32),
        (4096, 32, 64, 2, 16),
        (4096, 128, 128, 3, 32),
        (8192, 128, 128, 1, 16),
        (16384, 512, 512, 6, 16),
        (8192, 256, 128, 4, 16),
    ],
)
@pytest.mark.parametrize("sinks", [0, 64])
def test_aligned_pairs_keep_the_papers_tokens(total, stride, size, sub_caches, block, sinks):
    tables = torch.stack([random_scores(total, stride, seed) for seed in (1, 2)], dim=1)
    settings = CascadeParameters(block, sinks, size * sub_caches, sub_caches, stride, 2)
    cascade = Cascade(settings, num_kv_heads=2)
    kept = []
    for start, end, k in settings.segments(sinks + total):
        table = torch.nn.functional.pad(tables[max(k - 1, 0)], (sinks, 0))

        def choose(sub_cache: int, windows: Tensor, table: Tensor = table) -> Tensor:
            return select(table.gather(1, windows.flatten(1)).view(windows.shape))

        cascade.finish_stride(range(start, end), choose)
        assert cascade.kept[:, :sinks].tolist() == [list(range(sinks))] * 2
        if k > 0:
            kept.append(cascade.kept[:, sinks:] - sinks)
            assert cascade.kept.shape[1] + stride <= settings.max_tokens_held
    for head in range(2):
        expected = token_by_token(total, stride, size, sub_caches, tables[:, head].tolist())
        assert [step[head].tolist() for step in kept] == expected
        assert expected[-1][0] >= total - size * (2**sub_caches - 1)
    assert sub_caches == 1 or kept[-1][0].tolist() != kept[-1][1].tolist()


def test_real_attention_keeps_the_papers_tokens():
    """The same, with scores from attention over the kept keys at their places."""
    total, size, settings = (
        512,
        32,
        parameters(block_size=8, num_sink_tokens=0, cache_tokens=96, stride=32),
    )
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(2, total, 16, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    rope = rope_table(settings.max_tokens_held, 16, 100.0, torch.float64)
    run = CascadeRun(settings, {}, rtol=0.0, num_layers=1)
    run.attend(0, query[:, None], key, value, rope)
    for head in range(2):

        def attention_scores(k, tokens, old, head=head):
            new = dict.fromkeys(tokens, 0.0)
            first = tokens.index(32 * k)
            for place in range(first, len(tokens)):
                seen = tokens[: place + 1]
                q = rotate(query[head, tokens[place]][None], rope[:, place : place + 1])
                p = (rotate(key[head, seen], rope[:, : place + 1]) @ q[0] / 4).softmax(0).tolist()
                for t, mass in zip(seen, p, strict=True):
                    new[t] += settings.score_decay ** (first + 31 - place) * mass
            return {t: old.get(t, 0.0) * settings.score_decay**32 + new[t] for t in tokens}

        expected = token_by_token(total, 32, size, 3, attention_scores)
        assert [run.kept[k][0][head].tolist() for k in sorted(run.kept)] == expected


@st.composite
def valid_parameters(draw: st.DrawFn) -> CascadeParameters:
    block = draw(st.sampled_from([1, 2, 4, 8]))
    window = draw(st.sampled_from([2, 4, 8, 16, 32]))
    sub_caches = draw(st.integers(1, 5))
    group = max(window, 2 * block)
    stride = group * draw(st.integers(1, 3))
    least = -(-stride // (2 * block))  # stride <= 2 * w
    blocks = draw(st.integers(least, least + 30))
    spare = draw(st.integers(0, block * sub_caches - 1))
    return CascadeParameters(
        block_size=block,
        num_sink_tokens=block * draw(st.integers(0, 3)),
        cache_tokens=blocks * block * sub_caches + spare,
        num_sub_caches=sub_caches,
        stride=stride,
        selection_window=window,
    )


def test_copies_its_parameters_from_any_configuration():
    fields = {name: getattr(parameters(), name) for name in CascadeParameters.__slots__}
    assert CascadeParameters.like(SimpleNamespace(**fields, policy="paper")) == parameters()


@settings(max_examples=100, deadline=None)
@given(valid_parameters(), st.integers(0, 2**31))
def test_memory_stays_under_the_bound(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    cascade = Cascade(settings, num_kv_heads=2)
    filled = settings.num_sink_tokens + settings.num_sub_caches * settings.sub_cache_tokens

    def choose(sub_cache: int, windows: Tensor) -> Tensor:
        return select(torch.rand(windows.shape, generator=generator))

    for start, end, _ in settings.segments(filled * 3 + 20 * settings.stride):
        held = cascade.kept.shape[1] + end - start
        assert held <= settings.max_tokens_held
        cascade.finish_stride(range(start, end), choose)
        kept = cascade.kept
        assert kept.shape[1] == end if end <= filled else kept.shape[1] >= filled
        assert kept.shape[1] % settings.block_size == 0
        assert (kept.diff(dim=1) > 0).all()
        sinks = torch.arange(min(end, settings.num_sink_tokens))
        assert (kept[:, : len(sinks)] == sinks).all()
        newest = torch.arange(max(0, end - settings.sub_cache_tokens), end)
        assert (kept[:, -len(newest) :] == newest).all()


def test_a_window_wider_than_two_blocks_moves_whole_windows():
    settings = parameters(num_sink_tokens=0, selection_window=16, cache_tokens=32, num_sub_caches=2)
    cascade = Cascade(settings, num_kv_heads=1)

    def keep_older_half(sub_cache: int, windows: Tensor) -> Tensor:
        return (torch.arange(16) < 8).expand(windows.shape)

    for start, end, _ in settings.segments(64):
        cascade.finish_stride(range(start, end), keep_older_half)
    # 48 tokens: 16 go to sub-cache 1, one group of 16 leaves the 32 others; 64: again, and of 32
    # tokens in sub-cache 1 the oldest 16 are dropped.
    assert cascade.kept.tolist() == [[*range(16, 24), *range(32, 40), *range(48, 64)]]


# A whole model

TINY = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
}
NUM_TOKENS = 187

CASES = {
    "paper": parameters(),
    "paper mean": parameters(score_reduction="mean"),
    "blend": parameters(selection_window=8, score_power=2.0, key_weight=1.0),
    "blend mean": parameters(score_reduction="mean", score_power=2.0, selection_window=8),
    "blend, half the weight": parameters(selection_window=16, key_weight=0.5),
    "groups that wait": parameters(cache_tokens=38, selection_window=8, num_sink_tokens=12),
    "no sinks": parameters(num_sink_tokens=0, selection_window=4, key_weight=2.0),
    "window": parameters(num_sub_caches=1, cache_tokens=32),
    "five sub-caches": parameters(num_sub_caches=5, cache_tokens=40, stride=8),
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(TINY, seed=0)


@pytest.fixture(scope="module")
def model(tensors) -> Llama:
    return Llama(TINY, tensors)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, TINY["vocab_size"], (NUM_TOKENS,), generator=generator).tolist()


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


# Replay

RULES = {
    "scores": parameters(selection_window=8),
    "ranks": parameters(selection_window=8, score_power=2.0, key_weight=1.0),
}
FIRST_MERGE = 4  # 64 tokens past the sinks, of a budget of 48: sub-cache 0 is tokens 36 .. 67
FIRST_WINDOW = range(36, 44)


@pytest.fixture(scope="module", params=RULES)
def replayed(request, model, tokens):
    """A rule, and what the reference keeps by it."""
    return RULES[request.param], model.run(tokens, RULES[request.param])


def windows_by_structure(settings: CascadeParameters) -> int:
    count = 0

    def choose(sub_cache: int, windows: Tensor) -> Tensor:
        nonlocal count
        count += windows.shape[0] * windows.shape[1]
        return select(torch.zeros(windows.shape))

    cascade = Cascade(settings, num_kv_heads=2)
    for start, end, k in settings.segments(NUM_TOKENS):
        if end == settings.boundary_token(k):
            cascade.finish_stride(range(start, end), choose)
    return 2 * count


def test_replaying_its_own_decisions_finds_no_difference(replayed, model, tokens):
    settings, run = replayed
    again = model.run(tokens, settings, forced=run.kept)
    assert again.comparison.windows == windows_by_structure(settings) > 0
    assert run.comparison.windows == 0
    assert not again.comparison.differing
    assert_same(again.logprobs, run.logprobs)
    assert all(torch.equal(again.kept[k], run.kept[k]) for k in run.kept)


def swaps(kept: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Every way to exchange one survivor of the first window of layer 1, head 0."""
    row = kept[1, 0].tolist()
    inside = [t for t in row if t in FIRST_WINDOW]
    for gone, back in itertools.product(inside, set(FIRST_WINDOW) - set(inside)):
        changed = kept.clone()
        changed[1, 0] = torch.tensor(sorted({*row, back} - {gone}))
        yield gone, back, changed


def test_a_worse_token_kept_is_reported_and_not_explained(replayed, model, tokens):
    settings, run = replayed
    count = 0
    for gone, back, changed in swaps(run.kept[FIRST_MERGE]):
        forced = {k: t for k, t in run.kept.items() if k < FIRST_MERGE} | {FIRST_MERGE: changed}
        comparison = model.run(tokens[:68], settings, forced).comparison
        (window,) = comparison.differing
        assert (window.boundary, window.layer, window.kv_head) == (FIRST_MERGE, 1, 0)
        assert window.sub_cache == 0
        assert window.tokens == list(FIRST_WINDOW)
        assert set(window.own) - set(window.replayed) == {gone}
        assert set(window.replayed) - set(window.own) == {back}
        assert not window.explained
        assert comparison.unexplained == [window]
        loose = model.run(tokens[:68], settings, forced, rtol=3.0).comparison
        assert len(loose.differing) == 1
        assert not loose.unexplained
        count += 1
    assert count == 16


def test_later_decisions_follow_the_replayed_state(replayed, model, tokens):
    """Each window is compared in the replayed state, so one swap is one difference."""
    settings, run = replayed
    _, _, changed = next(swaps(run.kept[FIRST_MERGE]))
    led = model.run(tokens, settings, forced={FIRST_MERGE: changed})
    assert torch.equal(led.kept[FIRST_MERGE], changed)
    assert (led.logprobs - run.logprobs).abs().max() > 1e-3
    followed = model.run(tokens, settings, forced=led.kept)
    assert len(followed.comparison.differing) == 1
    assert_same(followed.logprobs, led.logprobs)


def test_float32_differs_from_float64_only_where_explained(replayed, tensors, model, tokens):
    settings, _ = replayed
    single = Llama(TINY, tensors, torch.float32).run(tokens, settings)
    run = model.run(tokens, settings, forced=single.kept)
    assert not run.comparison.unexplained
    torch.testing.assert_close(single.logprobs.double(), run.logprobs, rtol=0, atol=1e-4)


def _misplace(kept: Tensor) -> Tensor:
    return torch.cat((kept[..., :20], kept[..., [21, 20]], kept[..., 22:]), dim=-1)


def _undropped(kept: Tensor) -> Tensor:
    return torch.cat((kept[..., :1], kept), dim=-1)


def _unbalanced(kept: Tensor) -> Tensor:
    row = kept[0, 0].tolist()
    gone = max(t for t in row if t in FIRST_WINDOW)
    back = min(set(range(44, 52)) - set(row))
    changed = kept.clone()
    changed[0, 0] = torch.tensor(sorted({*row, back} - {gone}))
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_misplace, "place 20"),
        (_undropped, "by the structure"),
        (_unbalanced, "not half"),
        (lambda kept: kept + 1000, "outside"),
        (lambda kept: kept[:1], "layers"),
    ],
)
def test_impossible_decisions_are_errors(change, message, replayed, model, tokens):
    settings, run = replayed
    with pytest.raises(ReplayError, match=message):
        model.run(tokens[:68], settings, forced={FIRST_MERGE: change(run.kept[FIRST_MERGE])})


def test_decisions_beyond_the_run_are_errors(replayed, model, tokens):
    settings, run = replayed
    with pytest.raises(ReplayError, match="beyond the 67 tokens"):
        model.run(tokens[:67], settings, forced={FIRST_MERGE: run.kept[FIRST_MERGE]})


def judge(score, distinct, key_weight, replayed, rtol=1e-4):
    score = torch.tensor(score, dtype=torch.float64)
    distinct = None if distinct is None else torch.tensor(distinct, dtype=torch.float64)
    choice = torch.zeros(len(score), dtype=torch.bool)
    choice[replayed] = True
    return explained(choice, select(score, distinct, key_weight), score, distinct, key_weight, rtol)


@pytest.mark.parametrize(
    ("score", "replayed", "expected"),
    [
        ([1.0, 1.00005], [0], True),
        ([1.0, 1.0], [0], True),
        ([1.0, 1.001], [0], False),
        ([1.0, 2.0, 1.00005, 3.0], [0, 1], False),  # 0 for 3
        ([2.0, 1.0, 2.00005, 2.00008], [0, 3], True),  # 0 for 2
        ([2.0, 1.0, 2.00005, 2.00008], [0, 2], True),  # 0 for 3
        ([1.0, 1.00008, 1.00016, 0.0], [0, 1], False),  # 0 for 2, though each is near 1
        ([1.0, 1.2, 1.20005, 3.0], [0, 1], False),  # 1 for 2 alone would do
        ([NAN, 0.0], [0], False),
        ([1.0, INF], [0], False),
    ],
)
def test_a_difference_in_scores_is_explained_by_near_ties_only(score, replayed, expected):
    assert judge(score, None, 0.0, replayed) is expected


@pytest.mark.parametrize(
    ("score", "distinct", "replayed", "expected"),
    [
        # Sums of ranks 0+1, 1+0: equal, so the newer stays; keeping the older is an error,
        ([1.0, 2.0], [2.0, 1.0], [0], False),
        # unless a near-tie could have given it a higher sum.
        ([1.0, 1.00001], [2.0, 1.0], [0], True),
        ([2.0, 1.0], [-1.00001, -1.0], [0], True),
        ([2.0, 1.0], [-1.0, -1.00001], [1], True),
        ([1.0, 2.0], [-1.00001, -1.0], [0], False),  # at best as high, and older
        ([1.0, 2.0], [-2.0, -1.0], [0], False),
        # Ranks 2 1 3 0 and 3 2 1 0: sums 5 3 4 0. Token 1 for 2 needs a lead over token 2.
        ([3.0, 2.0, 4.0, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], False),
        ([3.0, 2.0, 3.0001, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], False),
        ([3.0, 2.9999, 3.0001, 1.0], [4.0, 3.0, 2.0, 1.0], [0, 1], True),
    ],
)
def test_a_difference_in_rank_sums_is_explained_by_near_ties_only(
    score, distinct, replayed, expected
):
    assert judge(score, distinct, 1.0, replayed) is expected


def test_rank_bounds_hold_for_every_order_of_close_values():
    generator = torch.Generator().manual_seed(9)
    for _ in range(50):
        x = 1 + torch.rand(8, generator=generator, dtype=torch.float64) * 1e-3
        low, high = rank_bounds(x, 1e-4)
        assert ((low <= rank(x)) & (rank(x) <= high)).all()
        noise = (torch.rand(64, 8, generator=generator, dtype=torch.float64) - 0.5) * 0.99e-4
        shaken = rank(x + noise)
        assert ((low <= shaken) & (shaken <= high)).all()
    for bound in rank_bounds(torch.tensor([NAN, INF, 1.0, -INF, NAN, INF]), 1e-4):
        assert bound.tolist() == [0, 4, 3, 2, 1, 5]
