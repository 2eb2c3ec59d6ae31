"""The plan of a model's memory, and the command that prints it."""

import json
import logging
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_cascade import cli
from vllm_cascade.commands.plan import GIB, make_plan
from vllm_cascade.structure.config import CascadeConfig, ConfigError
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

LAYERS, KV_HEADS, HEAD_SIZE = 3, 4, 32
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
CASCADE = {"cache_tokens": 1024, "num_sub_caches": 4, "stride": 256}
FLAGS = ["--cache-tokens=1024", "--num-sub-caches=4", "--stride=256"]


@pytest.fixture(autouse=True)
def quiet_vllm():
    """As the console script has it: where vLLM is first imported here, it logs to our streams."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def model(tmp_path):
    """A folder with a config.json and nothing else; `model(...)` changes fields."""

    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("options", "dtype", "dtype_bytes", "tail_bytes", "ranks"),
    [
        (CASCADE, "bfloat16", 2, 0, 1),
        (CASCADE | {"trace_tokens": True}, "bfloat16", 2, 4, 4),
        (CASCADE | {"policy": "blend"}, "bfloat16", 2, 4, 1),
        (CASCADE | {"policy": "paper"}, "float32", 4, 4, 2),
        (CASCADE | {"policy": "blend", "trace_tokens": True}, "bfloat16", 2, 8, 4),
        (CASCADE | {"policy": "blend", "score_weight": 0}, "bfloat16", 2, 0, 1),
        ({"policy": "window", "cache_tokens": 512}, "bfloat16", 2, 0, 1),
        (CASCADE, "fp8", 1, 0, 1),
        (CASCADE | {"policy": "blend", "trace_tokens": True}, "fp8_e4m3", 1, 8, 2),
    ],
)
def test_bytes_are_those_of_the_engine(model, options, dtype, dtype_bytes, tail_bytes, ranks):
    plan = make_plan(
        model(),
        options,
        max_model_len=50_000,
        block_size=32,
        dtype="auto" if dtype_bytes == 1 else dtype,
        kv_cache_dtype=dtype if dtype_bytes == 1 else "auto",
        tensor_parallel_size=ranks,
        kv_memory_gib=0.5,
    )
    config = resolve(
        CascadeOptions.parse(options), block_size=32, max_model_len=50_000, position_limit=4096
    )
    assert plan.config == config
    kept = "fp8_e4m3" if dtype_bytes == 1 else dtype
    assert plan.kv_cache_dtype == kept
    assert (f"keys and values in {kept}" in plan.as_text()) == (dtype_bytes == 1)
    assert plan.max_blocks == build_layout(config).max_blocks
    slot_bytes = 2 * HEAD_SIZE * dtype_bytes
    tokens = plan.max_blocks * 32
    assert plan.layer_bytes == tokens * KV_HEADS // ranks * (slot_bytes + tail_bytes)
    assert plan.request_bytes == LAYERS * plan.layer_bytes
    full = -(-50_000 // 32) * 32 * KV_HEADS // ranks * slot_bytes * LAYERS
    assert plan.full_attention_bytes == full
    assert plan.concurrency == GIB // 2 // plan.request_bytes
    assert plan.full_attention_concurrency == GIB // 2 // full


def test_a_request_within_the_budget_takes_what_it_needs(model):
    plan = make_plan(model(), CASCADE | {"policy": "blend"}, max_model_len=300, block_size=16)
    assert plan.max_blocks == 19
    # Nothing ever competes, so there are no scores.
    assert plan.request_bytes == plan.full_attention_bytes
    assert plan.concurrency is None


def test_windows_are_counted_as_vllm_groups_them(model):
    """Five layers with a window fill two groups of three beside one of three; one is padding."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"] * 2
    kinds[3] = kinds[7] = "full_attention"
    kinds[5] = "sliding_attention"
    changes = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 8,
        "layer_types": kinds,
        "sliding_window": 256,
    }
    plan = make_plan(
        model(**changes),
        {"cache_tokens": 512, "num_sub_caches": 4, "stride": 128},
        max_model_len=2048,
        block_size=32,
        kv_memory_gib=0.5,
    )
    assert (plan.num_layers, plan.num_window_layers) == (3, 5)
    # A step may compute the whole prompt before any of it leaves the window; and vLLM adds a block.
    blocks = 2048 // 32 + 1
    assert plan.window_bytes == blocks * 2 * 3 * plan.page_size_bytes
    assert plan.full_attention_window_bytes == blocks * 2 * 3 * 32 * KV_HEADS * HEAD_SIZE * 2 * 2
    assert plan.request_bytes == 3 * plan.layer_bytes + plan.window_bytes
    assert plan.concurrency == GIB // 2 // plan.request_bytes
    assert "5 sliding-window layers" in plan.as_text()


def test_chunks_are_counted_as_vllm_groups_them(model):
    changes = {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "num_hidden_layers": 8,
        "num_local_experts": 4,
        "attention_chunk_size": 512,
    }
    plan = make_plan(
        model(**changes),
        {"cache_tokens": 512, "num_sub_caches": 4, "stride": 128},
        max_model_len=2048,
        block_size=32,
    )
    assert (plan.num_layers, plan.num_window_layers) == (2, 6)
    # A step may compute the whole prompt before any of it leaves its chunk.
    assert plan.window_bytes == 2048 // 32 * 6 * plan.page_size_bytes
    assert plan.request_bytes == 2 * plan.layer_bytes + plan.window_bytes
    assert "6 chunked-attention layers" in plan.as_text()


def test_layers_of_other_kinds_are_not_counted():
    from vllm_cascade.commands.plan import _num_layers

    text = SimpleNamespace(layer_types=["full_attention", "linear_attention"] * 2)
    config = SimpleNamespace(
        hf_text_config=text, attention_chunk_size=None, get_total_num_hidden_layers=lambda: 4
    )
    assert _num_layers(config, None) == 2


def test_the_command_prints_the_plan(model, capsys):
    flags = [*FLAGS, "--max-model-len=50000", "--block-size=16", "--gpu-memory=1.5"]
    assert cli.main(["plan", model(), *flags]) == 0
    text = capsys.readouterr().out
    assert cli.main(["plan", model(), *flags, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["valid"]
    assert plan["config"]["cache_tokens"] == 1024
    assert plan["reach"] == 64 + 256 + 256 * (2 + 4 + 8)  # a quarter each
    assert plan["startup_line"] in text
    for number in ("reach", "max_blocks", "request_bytes", "full_attention_bytes", "concurrency"):
        assert f"{plan[number]:,}" in text, number


@pytest.mark.parametrize(
    ("options", "shown", "included"),
    [
        ({}, ["key_weight=1.0", "value_weight=1.0", "selection_window=128"], ""),
        ({"trace_tokens": True}, ["key_weight=1.0"], ", trace included"),
        (
            {"policy": "blend"},
            ["score_weight=1.0", "value_weight=1.0", "score_power=2.0", "score_decay=0.9999999"],
            ", scores included",
        ),
        ({"policy": "blend", "trace_tokens": True}, [], ", scores and trace included"),
        ({"policy": "paper", "score_weight": 0, "value_weight": 1}, ["score_weight=0.0"], ""),
        ({"policy": "window"}, ["num_sub_caches=1"], ""),
        ({"num_sub_caches": 1}, ["num_sub_caches=1"], ""),
    ],
    ids=str,
)
def test_only_what_has_an_effect_is_shown(model, options, shown, included):
    """All that the policy would refuse to be given is left out."""
    plan = make_plan(model(), options, max_model_len=50_000, block_size=16)
    rows = dict(re.split(r"  +", row, maxsplit=1) for row in plan.as_text().splitlines())
    given = rows["configuration"].split()
    assert set(shown) <= set(given)
    names = {word.partition("=")[0] for word in given}
    assert {"policy", "cache_tokens", "num_sink_tokens", "stride"} <= names
    assert ("num_sub_caches" in names) != plan.config.is_elastic
    for name in names & set(CascadeOptions.__dataclass_fields__):
        CascadeOptions.parse(options | {name: getattr(plan.config, name)})
    for name in set(CascadeOptions.__dataclass_fields__) - names - {"num_sub_caches"}:
        with pytest.raises(ConfigError, match="no effect"):
            CascadeOptions.parse(options | {name: getattr(plan.config, name)})
    assert rows["memory"].endswith(f"in all {LAYERS}{included}")
    # All of it, for who builds a configuration of it.
    assert CascadeConfig(**plan.as_json()["config"]) == plan.config


def test_every_option_has_a_flag(model, capsys):
    flags = {
        "policy": "paper",
        "cache_tokens": 512,
        "structure": "fixed",
        "num_sub_caches": 2,
        "num_sink_tokens": 32,
        "stride": 64,
        "selection_window": 4,
        "score_weight": 2.0,
        "key_weight": 0.5,
        "value_weight": 0.25,
        "score_power": 1.5,
        "newest_share": 0.75,
        "score_reduction": "mean",
        "score_decay": 0.999,
    }
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    given += ["--trace-tokens", "--block-size=16", "--json"]
    assert set(flags) | {"trace_tokens"} == set(CascadeOptions.__dataclass_fields__)
    assert cli.main(["plan", model(), *given]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert {name: config[name] for name in flags} == flags
    assert config["trace_tokens"] is True


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({}, ["--cache-tokens=1000000"], "'cache_tokens' = 1000000: .* Nearest: "),
        ({}, ["--stride=100", "--block-size=16"], "'stride' = 100: .* Nearest: 128"),
        ({}, ["--num-sink-tokens=-1"], "Nearest: 0"),
        (
            {},
            ["--tensor-parallel-size=8", "--policy=blend"],
            "8 with 4 KV heads.*--tensor-parallel-size 4",
        ),
        ({}, ["--tensor-parallel-size=3"], "divisible by tensor parallel size"),
        ({}, ["--dtype=complex"], "complex"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "longrope"}}, [], "longrope|RoPE"),
        ({"num_kv_shared_layers": 2}, [], "num_kv_shared_layers"),
        ({"model_type": "nonsense", "architectures": ["Nonsense"]}, [], "[Nn]onsense"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_told_in_one_message(model, capsys, changes, flags, words):
    assert cli.main(["plan", model(**changes), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("vllm-cascade plan: ")
    assert "Traceback" not in said.err
    assert re.search(words, said.err), said.err


def test_a_refusal_as_json(model, capsys):
    assert cli.main(["plan", model(), "--stride=100", "--json"]) == 2
    refused = json.loads(capsys.readouterr().out)
    assert refused["valid"] is False
    assert "Nearest" in refused["error"]


def test_a_folder_that_is_no_model(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing", "./missing", "a/b/c"):
        assert cli.main(["plan", str(folder)]) == 2
        assert "Give the folder of a Hugging Face model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert "config" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--gpu-memory=0"], ["--block-size=-1"], ["--stride=x"]])
def test_a_bad_command_line(model, capsys, flags):
    with pytest.raises(SystemExit) as exited:
        cli.main(["plan", model(), *flags])
    assert exited.value.code == 2
    assert "usage: vllm-cascade plan" in capsys.readouterr().err
