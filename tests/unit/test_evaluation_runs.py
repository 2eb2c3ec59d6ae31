"""What an evaluation makes of its options and of answers, with an engine that is a stand-in."""

from __future__ import annotations

import csv
import json
from math import exp, isclose, log

import pytest

from small_prompts import EOS, Tokenizer, prompts_of
from vllm_cascade import cli
from vllm_cascade.commands.errors import CommandError
from vllm_cascade.evaluation import report, runner
from vllm_cascade.evaluation.caches import parse_caches, parse_options, parse_sweep
from vllm_cascade.evaluation.engine import Completion
from vllm_cascade.evaluation.results import Results
from vllm_cascade.evaluation.scoring import parts_right, position_buckets, wilson
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve


@pytest.mark.parametrize(
    ("answer", "expected", "names", "right"),
    [
        (" 12345. Remember", ["12345"], False, (5, 5)),
        ("x12345y", ["12345"], False, (5, 5)),
        ("12945, not 1", ["12345"], False, (4, 5)),
        ("1234", ["12345"], False, (4, 5)),
        ("none", ["12345"], False, (0, 5)),
        ("12,345 oak sleepers", ["12345"], False, (5, 5)),
        ("12,3456", ["12345"], False, (2, 5)),
        ("1, 12,345, 99", ["12345", "99"], False, (7, 7)),
        ("11111 and 22222", ["11111", "22229"], False, (9, 10)),
        ("ABCDE, FGHIJ", ["ABCDE", "KLMNO"], True, (1, 2)),
        ("XABCDE", ["ABCDE"], True, (0, 1)),
    ],
)
def test_parts_right(answer, expected, names, right):
    assert parts_right(answer, expected, names) == right


def test_wilson_interval_holds_the_shares_that_it_should():
    """The interval's ends are the shares from which what was seen is 1.96 deviations away."""
    for right, count in ((0, 5), (3, 5), (5, 5), (17, 20)):
        for end in wilson(right, count):
            if 0 < end < 1:
                distance = abs(right / count - end) / (end * (1 - end) / count) ** 0.5
                assert isclose(distance, 1.959964, rel_tol=1e-5)


@pytest.mark.parametrize("length", [2, 700, 1024, 1025, 5000])
def test_buckets_cover_every_token_but_the_first(length):
    buckets = position_buckets([-float(i) for i in range(1, length)])
    assert [b[1] for b in buckets[:-1]] == [b[0] for b in buckets[1:]]
    assert buckets[0][0] == 1 and buckets[-1][1] == length
    assert all(tokens == end - first for first, end, tokens, _ in buckets)
    assert all(nats == sum(range(first, end)) for first, end, _, nats in buckets)


def test_caches_are_crossed_with_the_sweep():
    sweep = parse_sweep(["selection_window=2,64", "stride=128,256"])
    shared = parse_options("cache_tokens=1024,num_sub_caches=4")
    caches = parse_caches(["full", "window", "blend:score_reduction=mean"], shared, sweep)
    assert [cache.label for cache in caches] == [
        "full",
        "window:stride=128",
        "window:stride=256",
        *(
            f"blend:score_reduction=mean,selection_window={window},stride={stride}"
            for window in (2, 64)
            for stride in (128, 256)
        ),
    ]
    assert caches[0].cascade is None
    assert caches[1].cascade == {"policy": "window", "cache_tokens": 1024, "stride": 128}
    assert caches[-1].cascade == {
        "policy": "blend",
        "cache_tokens": 1024,
        "num_sub_caches": 4,
        "score_reduction": "mean",
        "selection_window": 64,
        "stride": 256,
    }


def test_an_option_leaves_policies_alone_that_it_does_not_change():
    sweep = parse_sweep(["score_power=1,3", "value_weight=0,1"])
    shared = parse_options("score_decay=0.9,key_weight=2,stride=128")
    window, *distinct = parse_caches(["window", "distinct"], shared, sweep)
    assert window.cascade == {"policy": "window", "stride": 128}
    assert [cache.label for cache in distinct] == [f"distinct:value_weight={n}" for n in (0, 1)]
    assert distinct[0].cascade == {
        "policy": "distinct",
        "key_weight": 2,
        "stride": 128,
        "value_weight": 0,
    }
    labels = [cache.label for cache in parse_caches(["blend"], shared, sweep)]
    assert len(labels) == 4 and "blend:score_power=1,value_weight=0" in labels
    with pytest.raises(CommandError, match=r"'distinct:score_power=2': .*score_power"):
        parse_caches(["distinct:score_power=2"], {}, {})


def test_a_caches_own_options_win():
    (cache,) = parse_caches(["blend:stride=256"], parse_options("stride=128"), {})
    assert cache.cascade == {"policy": "blend", "stride": 256}


@pytest.mark.parametrize(
    ("caches", "shared", "sweep", "said"),
    [
        (["ring"], "", [], "no cache 'ring'.*full, distinct, blend, paper, window"),
        (["full:stride=2"], "", [], "full attention has no options"),
        (["blend", "blend"], "", [], "'blend' is given twice"),
        (["blend:stride"], "", [], "'stride' is no name=value"),
        (["blend:stride=1,stride=2"], "", [], "'stride=2' is given twice"),
        (["blend:strides=256"], "", [], "'blend:strides=256': .*strides"),
        (["blend:stride=long"], "", [], "stride.*whole number"),
        (["window:key_weight=1"], "", [], "window.*key_weight"),
        (["blend:stride=2"], "", ["stride=2,4"], "sets stride, which --sweep varies"),
        (["blend"], "policy=paper", [], "policy is a cache's name"),
        (["blend"], "", ["strides=2"], "--sweep 'strides=2'"),
        (["blend"], "", ["stride"], "--sweep 'stride'"),
    ],
)
def test_caches_that_make_no_sense_are_refused(caches, shared, sweep, said):
    with pytest.raises(CommandError, match=said):
        parse_caches(caches, parse_options(shared), parse_sweep(sweep))


def completion(prompt, text="", logprobs=()):
    tokens = Tokenizer().encode(text, add_special_tokens=False)
    return Completion(tuple(tokens), prompt.length, logprobs, 7, 7 * 2**20, 0.1, 0.2)


def run_of(label):
    (cache,) = parse_caches([label], {}, {})
    config = None
    if cache.cascade is not None:
        config = resolve(
            CascadeOptions.parse(cache.cascade),
            block_size=16,
            max_model_len=4000,
            position_limit=4096,
        )
    return runner.Run(cache, {"max_model_len": 4000}, config)


class FakeEngine:
    """Answers every prompt right, or fails after some batches."""

    asked: list[int]
    answers: dict[tuple[int, ...], str]
    batches_left: int

    def __init__(self, model, **options):
        assert model == "MODEL" and options["max_model_len"] == 4000

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, requests, progress):
        cls = type(self)
        if cls.batches_left == 0:
            raise RuntimeError("cut off")
        cls.batches_left -= 1
        cls.asked.append(len(requests))
        done = []
        for request in requests:
            prompt = self.answers[tuple(request.token_ids)]
            logprobs = (-log(7),) * (prompt.length - 1) if request.logprobs else ()
            done.append(completion(prompt, f" {' '.join(prompt.expected)}.", logprobs))
        progress(sum(len(request.token_ids) for request in requests), len(requests))
        return done


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    prompts = [
        *(p for length in (2000, 3000) for p in prompts_of("passkey", length=length)),
        *prompts_of("perplexity", length=3000, count=2),
    ]
    FakeEngine.asked, FakeEngine.batches_left = [], 3
    FakeEngine.answers = {tuple(prompt.token_ids): prompt for prompt in prompts}
    monkeypatch.setattr(runner, "Engine", FakeEngine)
    runs = [run_of("full"), run_of("blend:cache_tokens=1024,num_sub_caches=4,stride=256")]

    def go():
        results = Results(tmp_path, {"seed": 0})
        runner.evaluate("MODEL", runs, prompts, results, Tokenizer())
        return results

    with pytest.raises(RuntimeError, match="cut off"):
        go()
    assert FakeEngine.asked == [5, 7, 5]
    FakeEngine.batches_left = 1
    results = go()
    assert FakeEngine.asked == [5, 7, 5, 7]
    FakeEngine.batches_left = 0
    assert go().rows == results.rows

    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == results.rows
    assert len(rows) == 2 * (10 + 2 * 3)  # a text of 3,000 tokens has three parts
    evicted = {row["tokens_evicted"] for row in rows if row["cache"] == "full"}
    assert evicted == {"0"}
    assert json.loads(rows[-1]["options"])["cache_tokens"] == 1024

    summary = report.summarise(rows)
    assert [entry["exact"] for entry in summary["answers"]] == [5, 5, 5, 5]
    assert all(len(entry["share_by_depth"]) == 5 for entry in summary["answers"])
    assert all(isclose(entry["perplexity"], 7) for entry in summary["perplexity"])
    assert [e["end_position"] for e in summary["perplexity"]] == [1024, 2048, 3000] * 2
    shown = report.tables(summary)
    assert "5 of 5, 1.00 [0.57, 1.00], 1.00" in shown
    assert shown.count("7.000") == len(summary["perplexity"])


def test_wrong_answers_count_as_wrong():
    prompt, other = prompts_of("passkey", count=2)
    digits = prompt.expected[0]
    wrong = digits[:4] + ("1" if digits[4] != "1" else "2")
    rows = []
    for asked, text in ((prompt, wrong), (other, other.expected[0] + " no")):
        rows += runner._rows(run_of("full"), asked, completion(asked, text), Tokenizer())
    (entry,) = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])["answers"]
    assert entry["exact"] == 1 and entry["parts_share"] == 0.9


def test_an_answer_ends_at_a_special_token():
    tokens = [*Tokenizer().encode("12", add_special_tokens=False), EOS, ord("3") + 2]
    assert runner.answer_text(Tokenizer(), tokens) == "12"


def test_perplexity_is_of_all_tokens_together():
    prompts = prompts_of("perplexity", length=800, count=2)
    rows = []
    for prompt, nats in zip(prompts, (1.0, 3.0), strict=True):
        done = completion(prompt, logprobs=(-nats,) * (prompt.length - 1))
        rows += runner._rows(run_of("full"), prompt, done, Tokenizer())
    (entry,) = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])["perplexity"]
    assert isclose(entry["perplexity"], exp(2.0)) and entry["tokens"] == 2 * 799


def test_perplexities_of_two_texts_are_apart():
    rows = []
    for filler, nats in (("book", 1.0), ("code", 3.0)):
        (prompt,) = prompts_of("perplexity", filler=filler, length=800, count=1)
        done = completion(prompt, logprobs=(-nats,) * (prompt.length - 1))
        rows += runner._rows(run_of("full"), prompt, done, Tokenizer())
    summary = report.summarise([{k: str(v) for k, v in row.items()} for row in rows])
    found = [(entry["filler"], entry["perplexity"]) for entry in summary["perplexity"]]
    assert found == [("book", pytest.approx(exp(1))), ("code", pytest.approx(exp(3)))]
    assert "perplexity of 800 tokens of code, by position" in report.tables(summary)


def test_a_folder_of_another_command_is_refused(tmp_path):
    Results(tmp_path, {"seed": 0, "lengths": [1, 2]})
    Results(tmp_path, {"seed": 0, "lengths": [1, 2]})
    with pytest.raises(CommandError, match="seed was 0, is 1"):
        Results(tmp_path, {"seed": 1, "lengths": [1, 2]})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.csv").write_text("")
    with pytest.raises(CommandError, match=r"no command\.json"):
        Results(tmp_path / "other", {})


@pytest.fixture
def resolved(monkeypatch):
    """A model of 4,096 positions in place of vLLM's configuration."""

    def settle(model, options):
        config = None
        # Beyond the model's own limit vLLM has words of its own.
        assert "max_model_len" not in options or "attention_backend" in options
        if "attention_backend" in options:
            config = resolve(
                CascadeOptions.parse(options["additional_config"]["cascade"]),
                block_size=16,
                max_model_len=options["max_model_len"],
                position_limit=4096,
            )
        return 4096, config

    monkeypatch.setattr(runner, "resolve", settle)


def plan(labels, prompts, engine_args=None, allow=False):
    return runner.plan_runs("M", parse_caches(labels, {}, {}), prompts, engine_args or {}, allow)


def test_engines_fit_the_longest_prompt_and_its_answer(resolved):
    prompts = prompts_of("passkey", length=2000) + prompts_of("variables", length=3000)
    blend = "blend:cache_tokens=1024,stride=256"
    full, cascade = plan(["full", blend], prompts, {"dtype": "float32"})
    assert full.options["max_model_len"] == 3000 + prompts[-1].max_tokens
    assert full.options["dtype"] == cascade.options["dtype"] == "float32"
    assert "attention_backend" not in full.options and full.config is None
    assert cascade.options["attention_backend"] == "CASCADE"
    assert cascade.config.cache_tokens == 1024


def test_what_cannot_be_measured_is_refused(resolved):
    long, short = prompts_of("passkey", length=5000), prompts_of("passkey", length=2000)
    with pytest.raises(CommandError, match=r"'full'.*5,008 tokens.*made for 4,096"):
        plan(["full"], long)
    roomy = "blend:cache_tokens=2048,stride=256"
    with pytest.raises(CommandError, match=r"2,000 tokens lose no token.*allow-under-budget"):
        plan([roomy], short + long)
    assert plan([roomy], short + long, allow=True)[0].config.cache_tokens == 2048
    assert plan([roomy], long)
    with pytest.raises(CommandError, match="sets max_model_len"):
        plan([roomy], long, {"max_model_len": 5})


def test_the_command_refuses_with_a_message(tmp_path, capsys):
    def refused(*flags):
        assert cli.main(["eval", str(tmp_path), "--output", str(tmp_path / "o"), *flags]) == 2
        return capsys.readouterr().err

    assert "no task 'poetry': choose from passkey" in refused("--tasks", "poetry")
    assert "no cache 'ring'" in refused("--caches", "ring")
    pytest.importorskip("transformers")
    assert f"cannot read a tokenizer of {tmp_path}" in refused()
    assert not (tmp_path / "o").exists()
