"""Finds alone: ranks that answer or keep what one does not: of heads, layers or requests."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from e2e.ranks import Played, assert_same_up_to_ties, check_replicas, play
from e2e.servers import serve
from e2e.tiny import prompt_without_ties, save_llama

pytestmark = pytest.mark.model

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
    "max_model_len": 2048,
    "max_num_batched_tokens": 512,
}


def traced(policy: str = "distinct") -> dict[str, Any]:
    """`OPTIONS`, and a cascade that says which tokens it kept."""
    cascade = {**CASCADE, "policy": policy, "trace_tokens": True}
    return {**OPTIONS, "additional_config": {"cascade": cascade}}


# Of lengths and seeds to which the random model does not answer one token again and again.
PROMPTS = [prompt_without_ties(n, seed) for n, seed in ((1500, 1), (40, 40), (700, 2))]
ANSWER = 16
# Tokens of the longest prompt, past the budget and in the middle of a block.
BEGUN = 1001


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(
        tmp_path_factory.mktemp("llama"),
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        # Else a random model repeats the token that it was given.
        tie_word_embeddings=False,
    )


def play_alone(folder: Path, model: str, policy: str) -> Played:
    """What a single rank answers and keeps."""
    options = traced(policy)
    played = play(folder, model, PROMPTS, ANSWER, forked=True, enforce_eager=True, **options)
    assert played.ranks == 1
    assert all(len(set(answer)) > ANSWER // 2 for answer in played.answers)
    held = [num_tokens > kept.shape[2] for num_tokens, kept in played.kept.items()]
    assert held == [True, False, True]
    return played


@pytest.fixture(scope="module")
def one(model: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """A single rank."""
    return play_alone(tmp_path_factory.mktemp("one"), model, "distinct")


TENSOR = {"tensor_parallel_size": 2, "enforce_eager": True, "alone": True}
# The CPU's runner makes what a second stage receives into when it warms up to compile.
PIPELINE = {"pipeline_parallel_size": 2, "compilation_config": {"backend": "eager"}}


def test_two_ranks(model: str, tmp_path: Path) -> None:
    """Each rank keeps its own heads' tokens; of their scores nothing is exchanged."""
    one = play_alone(tmp_path, model, "blend")
    check_two_ranks(tmp_path, model, one, "blend", TENSOR)


def test_two_stages(model: str, one: Played, tmp_path: Path) -> None:
    """Each rank keeps its own layers' tokens."""
    check_two_ranks(tmp_path, model, one, "distinct", PIPELINE)


def test_more_ranks_than_heads(tmp_path: Path) -> None:
    """Both ranks have the only KV head, and keep the same tokens of it."""
    model = save_llama(
        tmp_path / "llama",
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    one = play_alone(tmp_path, model, "distinct")
    two = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        forked=True,
        distributed_executor_backend="mp",
        **TENSOR,
        **traced(),
    )
    assert two.ranks == 2
    for kept in two.kept.values():
        first, second = kept.unbind(1)
        assert torch.equal(first, second)
    first = {num_tokens: kept[:, :1] for num_tokens, kept in two.kept.items()}
    assert_same_up_to_ties(dataclasses.replace(two, kept=first), one)


def check_two_ranks(
    tmp_path: Path, model: str, one: Played, policy: str, options: dict[str, Any]
) -> None:
    """One request goes on from copies of another's pages, with scores where there are any."""
    two = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        begun=BEGUN,
        forked=True,
        distributed_executor_backend="mp",
        **options,
        **traced(policy),
    )
    assert_same_up_to_ties(two, one)
    assert two.cached == [BEGUN, 0, 0]
    assert two.ranks == 2


REPLICAS = [
    # Else there are as many as replicas; tests/gpu has them.
    "--api-server-count=1",
    "--served-model-name=tiny",
    "--skip-tokenizer-init",
    "--enforce-eager",
    f"--additional-config={json.dumps({'cascade': CASCADE})}",
    *(f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()),
]


def test_replicas(model: str, one: Played, tmp_path: Path) -> None:
    """`vllm serve --data-parallel-size 8`."""
    with serve(tmp_path, model, *REPLICAS, "--data-parallel-size=8", forked=True) as server:
        check_replicas(server, 8, PROMPTS, one, ranks=8)


def test_a_node_that_would_not_load_the_plugin_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_cascade.plugin import register_name

    pickled = pickle.dumps(register_name())
    monkeypatch.setenv("VLLM_PLUGINS", "another,cascade")
    assert pickle.loads(pickled).name == "CASCADE"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(RuntimeError, match=r"VLLM_PLUGINS='another' .* Add `cascade`"):
        pickle.loads(pickled)


# vLLM's CPU platform names no resource for Ray to count; otherwise its ranks run there as well.
PLATFORM = """
from vllm.platforms.cpu import CpuPlatform


def name():
    return "cpu_through_ray.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
"""


@pytest.fixture
def ray_nodes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A Ray cluster on this host; the parameter has the ranks that each node has places for."""
    pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    site = tmp_path / "site"
    plugin = site / "cpu_through_ray-0.dist-info"
    plugin.mkdir(parents=True)
    (site / "cpu_through_ray.py").write_text(PLATFORM)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-through-ray\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\ncpu_through_ray = cpu_through_ray:name\n"
    )
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    first, *others = (
        {"num_cpus": ranks, "num_gpus": ranks, "object_store_memory": 100 << 20}
        for ranks in request.param
    )
    cluster = Cluster(initialize_head=True, head_node_args={**first, "include_dashboard": False})
    try:
        for other in others:
            cluster.add_node(**other)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("ray_nodes", [(1, 1)], indirect=True)
@pytest.mark.usefixtures("ray_nodes")
def test_two_ranks_through_ray(model: str, one: Played, tmp_path: Path) -> None:
    two = play(
        tmp_path,
        model,
        PROMPTS,
        ANSWER,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        enforce_eager=True,
        **traced(),
    )
    assert_same_up_to_ties(two, one)
    assert two.ranks == 2


@pytest.mark.parametrize("ray_nodes", [(2,)], indirect=True)
@pytest.mark.usefixtures("ray_nodes")
def test_two_replicas_through_ray(
    model: str, one: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vllm serve --data-parallel-size 2 --data-parallel-backend ray`."""
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    flags = [
        "--data-parallel-size=2",
        "--data-parallel-backend=ray",
        "--data-parallel-size-local=2",
    ]
    with serve(tmp_path, model, *REPLICAS, *flags) as server:
        check_replicas(server, 2, PROMPTS, one, ranks=2)
