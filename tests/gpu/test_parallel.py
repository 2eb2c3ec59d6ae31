"""Several GPUs of one host: the answers and the kept tokens are those of a single GPU.

Through vLLM's own processes and through Ray, decode in CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.ranks import Played, assert_same_up_to_ties, check_replicas, play
from e2e.servers import serve
from e2e.tiny import prompt_without_ties, save_llama

pytestmark = pytest.mark.gpu

MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
    # Else a random model repeats the token that it was given.
    "tie_word_embeddings": False,
}
CASCADE = {
    "cache_tokens": 256,
    "num_sub_caches": 2,
    "num_sink_tokens": 16,
    "stride": 64,
    "selection_window": 64,
}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "max_model_len": 4096,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
    "gpu_memory_utilization": 0.15,
    # vLLM measures no free memory then, so that other tests may run beside these.
    "kv_cache_memory_bytes": 256 << 20,
}
GRAPHS = {
    "mode": 0,
    "cudagraph_mode": "FULL_DECODE_ONLY",
    "cudagraph_capture_sizes": [1, 2, 4, 8],
}
TRACED = {"cascade": {**CASCADE, "trace_tokens": True}}
# Under the budget, at it, where it fills while the answer grows, and far past it.
PROMPTS = [prompt_without_ties(n, seed=n) for n in (40, 256, 272, 700, 2000)]
# Across two boundaries.
ANSWER = 140
# Tokens of the longest prompt, past the budget and in the middle of a block.
BEGUN = 1001

NO_RAY = "needs Ray: pip install '.[ray]'"

# Tensor ranks, pipeline stages.
GRIDS = [(2, 1), (1, 2), (4, 1), (2, 2), (8, 1), (4, 2)]


def needs(count: int) -> None:
    """Skip where there are fewer GPUs."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, this host has {torch.cuda.device_count()}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    # With eight tensor ranks two ranks hold a copy of each KV head.
    return save_llama(tmp_path_factory.mktemp("llama"), num_key_value_heads=4, **MODEL)


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A single GPU."""
    needs(2)
    folder = tmp_path_factory.mktemp("one")
    played = play(
        folder,
        model,
        PROMPTS,
        ANSWER,
        additional_config=TRACED,
        compilation_config=GRAPHS,
        **OPTIONS,
    )
    assert played.ranks == 1
    assert all(len(set(answer)) > ANSWER // 4 for answer in played.answers)
    # The longest prompt's request has lost tokens, the shortest's none.
    lost = [num_tokens - kept.shape[2] for num_tokens, kept in played.kept.items()]
    assert lost[0] == 0 < lost[-1]
    return played


def test_more_ranks_than_heads(tmp_path: Path) -> None:
    """Both ranks have the only KV head, and keep the same tokens of it."""
    needs(2)
    (tmp_path / "one").mkdir()
    model = save_llama(tmp_path / "llama", num_key_value_heads=1, **MODEL)
    options = {"additional_config": TRACED, "compilation_config": GRAPHS, **OPTIONS}
    alone = play(tmp_path / "one", model, PROMPTS, ANSWER, **options)
    two = play(tmp_path, model, PROMPTS, ANSWER, tensor_parallel_size=2, **options)
    assert two.ranks == 2
    assert_same_up_to_ties(two, with_copies(alone, 2))


def with_copies(one: Played, tensor: int) -> Played:
    """What one GPU kept, with as many copies of each head as `tensor` ranks hold."""
    kept = {
        num_tokens: heads.repeat_interleave(max(1, tensor // heads.shape[1]), 1)
        for num_tokens, heads in one.kept.items()
    }
    return dataclasses.replace(one, kept=kept)


@pytest.mark.parametrize("executor", ["mp", "ray"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"tp{grid[0]}-pp{grid[1]}")
def test_ranks(
    grid: tuple[int, int], executor: str, model: str, one: Played, tmp_path: Path
) -> None:
    tensor, pipeline = grid
    needs(tensor * pipeline)
    if executor == "ray":
        pytest.importorskip("ray", reason=NO_RAY)
    many = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        begun=BEGUN,
        additional_config=TRACED,
        compilation_config=GRAPHS,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        distributed_executor_backend=executor,
        **OPTIONS,
    )
    assert_same_up_to_ties(many, with_copies(one, tensor))
    assert many.cached == [0, 0, 0, 0, BEGUN]
    assert many.ranks == tensor * pipeline
    assert "Graph capturing finished" in many.log


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_one_request_after_the_other(tensor: int, model: str, one: Played, tmp_path: Path) -> None:
    needs(max(2, tensor))
    alone = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        alone=True,
        additional_config=TRACED,
        compilation_config=GRAPHS,
        tensor_parallel_size=tensor,
        **OPTIONS,
    )
    assert_same_up_to_ties(alone, with_copies(one, tensor))


def test_compiled(model: str, one: Played, tmp_path: Path) -> None:
    """torch.compile and piecewise graphs as vLLM has them by default; its fusions round otherwise.

    So tokens may be kept otherwise too, but not many.
    """
    needs(2)
    two = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        additional_config=TRACED,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
        tensor_parallel_size=2,
        **OPTIONS,
    )
    assert_same_up_to_ties(two, one)


# Of the server in the tests below, whose pages nobody reads.
FLAGS = [
    "--served-model-name=tiny",
    "--skip-tokenizer-init",
    f"--compilation-config={json.dumps(GRAPHS)}",
    f"--additional-config={json.dumps({'cascade': CASCADE})}",
    *(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()),
]


@pytest.mark.parametrize("backend", ["mp", "ray"])
@pytest.mark.parametrize(("replicas", "tensor"), [(2, 1), (2, 2), (2, 4), (8, 1)])
def test_replicas(
    replicas: int,
    tensor: int,
    backend: str,
    model: str,
    one: Played,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines behind one address, of one GPU each, or of several."""
    needs(replicas * tensor)
    if backend == "ray":
        pytest.importorskip("ray", reason=NO_RAY)
        monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    flags = [
        f"--data-parallel-size={replicas}",
        f"--data-parallel-backend={backend}",
        f"--tensor-parallel-size={tensor}",
    ]
    with serve(tmp_path, model, *flags, *FLAGS) as server:
        check_replicas(server, replicas, PROMPTS, one, ranks=replicas * tensor)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_server_through_ray(
    tensor: int, model: str, one: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vllm serve --tensor-parallel-size N --distributed-executor-backend ray`."""
    needs(tensor)
    pytest.importorskip("ray", reason=NO_RAY)
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    flags = [f"--tensor-parallel-size={tensor}", "--distributed-executor-backend=ray"]
    with serve(tmp_path, model, *flags, *FLAGS) as server:
        check_replicas(server, 1, PROMPTS, one, ranks=tensor)
