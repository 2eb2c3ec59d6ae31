"""Committed plots and generated tables are those of the committed rows."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quality import gather
from report import plots, tables
from vllm_cascade.evaluation.results import COLUMNS
from vllm_cascade.structure.options import CascadeOptions
from vllm_cascade.structure.resolve import resolve

ROOT = Path(__file__).parents[2]
DRAWN = [name for name in plots.PLOTS if plots.rows_of(name)]
LENGTHS = (4096, 65536, 1 << 20)
PLACE = re.compile(r"-?\d+\.\d+")


def context_rows() -> list[dict[str, str]]:
    """What FLASH_ATTN has no room for has a row without times."""
    found = []
    for backend in ("CASCADE", "FLASH_ATTN"):
        for length in LENGTHS:
            is_timed = backend == "CASCADE" or length < 1 << 20
            row: dict[str, Any] = {"backend": backend, "context": length}
            row |= {"gpu": "GPU", "vllm": "0", "torch": "2", "commit": "abc"}
            row |= {
                "ttft_s": length / 1000 + len(backend) if is_timed else "",
                "tpot_ms": 5 + len(backend) / 100 if is_timed else "",
                "kv_mib_per_request": length / 8,
                "requests_fit": 40 if is_timed else 0,
                "requests_at_once": 40 if is_timed else "",
                "tokens_per_s": 40e3 / len(backend) if is_timed else "",
            }
            found.append({name: str(value) for name, value in row.items()})
    return found


def protocol_rows() -> list[dict[str, str]]:
    found = []
    for tokens in LENGTHS:
        sides = [("FlashAttention-2", "", ""), ("FlashAttention-3", "", "")]
        sides += [("CASCADE", "paper", 4096), ("CASCADE", "paper", 256), ("CASCADE", "blend", 4096)]
        for number, (side, policy, stride) in enumerate(sides):
            row: dict[str, Any] = {"tokens": tokens, "side": side, "policy": policy}
            row |= {"gpu": "GPU", "vllm": "0", "torch": "2", "commit": "abc"}
            row |= {"stride": stride, "cache_tokens": 16384 if policy else ""}
            row["ms_p50"] = tokens / 1000 * (10 - number)
            row["fa2_over_ours"] = 10 / (10 - number) if policy else ""
            found.append({name: str(value) for name, value in row.items()})
    return found


def quality_rows() -> list[dict[str, str]]:
    found = []
    names = ("exact", "prompts", "perplexity", "first_position", "end_position")
    for number, cache in enumerate(("full", "paper", "blend:stride=256", "blend:stride=512")):
        row: dict[str, Any] = {"study": "lengths", "cache": cache, "filler": "", "task": ""}
        row |= {"num_sub_caches": 4, "gpu": "G", "vllm": "V", "torch": "T", "commit": "C"}
        row |= dict.fromkeys(names, "")
        for task in ("passkey", "multikey"):
            for length in (4096, 8192):
                answer = {"task": task, "length": length, "exact": 3 - number, "prompts": 4}
                found.append({**row, **answer})
        for first, end in ((1, 1024), (1024, 2048)):
            part = {"task": "perplexity", "length": 2048, "first_position": first}
            found.append({**row, **part, "end_position": end, "perplexity": 2 + number + first})
    # Rows of the other study are in no panel.
    found += [{**row, "study": "knobs", "cache": f"{row['cache']} other"} for row in found]
    return [{name: str(value) for name, value in row.items()} for row in found]


def task_rows() -> list[dict[str, str]]:
    """Two tasks in two lengths, of a budget of 2,048 tokens; `distinct` did one length only."""
    found = []
    for number, cache in enumerate(("full", "blend", "distinct")):
        row: dict[str, Any] = {"study": "tasks", "cache": cache, "model": "M", "num_sub_caches": 4}
        row |= {"gpu": "G", "vllm": "V", "torch": "T", "commit": "C"}
        row |= {"cache_tokens": "" if cache == "full" else 2048}
        row |= dict.fromkeys(("exact", "prompts", "perplexity", "end_position"), "")
        for task, filler in (("sentence", "book"), ("constant", "code")):
            for length in (8192, 32000)[: 1 if cache == "distinct" else 2]:
                answer = {"task": task, "filler": filler, "length": length, "prompts": 60}
                found.append({**row, **answer, "exact": 60 - 15 * number - length // 8192})
        for filler in ("book", "code"):
            for end in (32000, 16384):
                part = {"task": "perplexity", "filler": filler, "length": 32000}
                part |= {"end_position": end, "perplexity": end / 1000 + number + len(cache)}
                found.append({**row, **part})
    return [{name: str(value) for name, value in row.items()} for row in found]


@pytest.mark.parametrize("name", DRAWN)
def test_plot_is_of_the_rows(name: str) -> None:
    target = plots.DRAWN / f"{name}.svg"
    assert target.exists(), "run python benchmarks report.plots"
    plot = target.read_text(encoding="utf-8")
    assert plots.digests(plots.file_of(name)) in plot, "run python benchmarks report.plots"


@pytest.mark.parametrize("name", DRAWN)
def test_plot_is_what_the_script_draws(name: str, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    committed = (plots.DRAWN / f"{name}.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("drawn with another version of Matplotlib")
    plots.draw(name, tmp_path / "again.svg")
    again = (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert PLACE.sub("", again) == PLACE.sub("", committed)
    # Processors round the last digit otherwise.
    pairs = zip(PLACE.findall(again), PLACE.findall(committed), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) < 1e-4


def test_every_plot_has_rows() -> None:
    there = {plot.stem for plot in plots.DRAWN.glob("*.svg")} & set(plots.PLOTS)
    assert there == set(DRAWN)


def test_a_plot_has_the_rows_of_its_study(tmp_path: Path) -> None:
    rows = quality_rows()
    written(tmp_path, "quality", rows)
    lengths = [row for row in rows if row["study"] == "lengths"]
    assert plots.rows_of("quality", tmp_path) == lengths and len(lengths) < len(rows)
    assert plots.rows_of("quality_tasks", tmp_path) == plots.rows_of("gpu_context", tmp_path) == []


def drawn(name: str, rows: list[dict[str, str]]) -> list[Any]:
    """The panels of a plot."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("svg")
    from matplotlib import pyplot

    figure = pyplot.figure(layout="constrained")
    plots.PLOTS[name](rows, figure)
    figure.canvas.draw()
    pyplot.close(figure)
    return figure.axes


def lines(axes: Any) -> dict[str, list[list[float]]]:
    """Label to points."""
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    for bars in axes.containers:
        found[bars.get_label()] = bars.lines[0].get_xydata().tolist()
    return {label: points for label, points in found.items() if not label.startswith("_")}


def test_context_panels_show_the_rows() -> None:
    rows = context_rows()
    panels = drawn("gpu_context", rows)
    columns = ("ttft_s", "tpot_ms", "requests_fit", "tokens_per_s")
    for axes, column in zip(panels, columns, strict=True):
        for backend in ("CASCADE", "FLASH_ATTN"):
            mine = [row for row in rows if row["backend"] == backend and row[column]]
            expected = [[float(r["context"]), float(r[column])] for r in mine if r[column] != "0"]
            assert lines(axes)[backend] == expected, (column, backend)
    assert [text.get_text() for text in panels[2].texts] == ["none"]


def test_protocol_panels_show_the_rows() -> None:
    rows = protocol_rows()
    left, right = drawn("gpu_paper_protocol", rows)
    shown = lines(left)
    assert shown["FlashAttention-2"] == [[n, n / 100] for n in LENGTHS]
    assert shown["CASCADE paper, stride 256"] == [[n, pytest.approx(n * 7e-3)] for n in LENGTHS]
    assert len(shown) == 5
    ratios = lines(right)
    assert ratios["CASCADE paper"] == [[256.0, 10 / 7], [4096.0, 10 / 8]]
    assert ratios["CASCADE blend"] == [[4096.0, 10 / 6]]
    assert ["6.8" in text.get_text() for text in right.texts] == [True]
    # The paper says nothing of other lengths.
    _, right = drawn("gpu_paper_protocol", [r for r in rows if int(r["tokens"]) < 1 << 20])
    assert not right.texts


def test_quality_panels_show_the_rows() -> None:
    rows = [row for row in quality_rows() if row["study"] == "lengths"]
    # Perplexity of code has no panel beside that of books.
    rows += [{**row, "filler": "code", "perplexity": "9"} for row in rows if row["perplexity"]]
    passkey, multikey, perplexity = drawn("quality", rows)
    assert "passkey" in passkey.get_title() and "multikey" in multikey.get_title()
    shares = lines(passkey)
    assert shares["full"] == [[4096.0, 0.75], [8192.0, 0.75]]
    assert shares["blend:stride=512"] == [[4096.0, 0.0], [8192.0, 0.0]]
    assert lines(perplexity)["paper"] == [
        [1024.0, pytest.approx(4.0)],
        [2048.0, pytest.approx(1027.0)],
    ]
    colours = {line.get_color() for line in perplexity.lines}
    assert len(colours) == 4, "two caches have one colour"
    assert perplexity.get_yscale() == "log" and passkey.get_yscale() == "linear"


def test_task_panels_show_the_rows() -> None:
    sentence, constant = drawn("quality_tasks", task_rows())
    assert sentence.get_title() == "sentence, book" and constant.get_title() == "constant, code"
    shares = lines(sentence)
    assert set(shares) == {"full", "blend", "distinct"}
    # Beside each other, in the order of the rows.
    (four, one), (sixteen, fewer) = shares["blend"]
    assert four == pytest.approx(4) and one == pytest.approx(44 / 60)
    assert sixteen == pytest.approx(32000 / 2048) and fewer == pytest.approx(42 / 60)
    assert shares["full"][0][0] < 4 < shares["distinct"][0][0] < 4.5
    assert [tick.get_text() for tick in sentence.get_xticklabels()] == ["4x", "16x"]
    (bars,) = (bars for bars in sentence.containers if bars.get_label() == "blend")
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(0.610, abs=1e-3), pytest.approx(0.829, abs=1e-3))
    assert len({line.get_color() for line in sentence.lines}) == 3


def test_task_plot_is_drawn_from_its_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, "quality", task_rows())
    plots.draw("quality_tasks", tmp_path / "new.svg", tmp_path)
    plot = (tmp_path / "new.svg").read_text(encoding="utf-8")
    assert plots.digests(tmp_path / "quality.csv") in plot and "constant, code" in plot


def test_results_have_the_tables_of_the_rows() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run make readme"
    assert all(f"<!-- {name} -->" in text for name in tables.TABLES)


def test_quality_tables(tmp_path: Path) -> None:
    text = written(tmp_path, "quality", quality_rows())
    shown = tables.rewritten(text, tmp_path)
    assert "| `full` | 3 3 | 3 3 | 3.00 | 1,026.00 |" in shown
    assert "`blend:stride=512`" in shown and "other" not in shown
    knobs = tables.rewritten(text.replace("quality", "quality_knobs"), tmp_path)
    assert "right of 8 at 4,096 tokens" in knobs
    assert "| `paper other` | 4 | 4 | 4 | 1,027.00 |" in knobs and "`full`" not in knobs


def test_task_tables(tmp_path: Path) -> None:
    text = written(tmp_path, "quality", [*quality_rows(), *task_rows()])
    heading, _, *shown = cells(tables.rewritten(text.replace("quality", "quality_tasks"), tmp_path))
    assert heading == [
        "right of 60 at 8,192, 32,000 tokens",
        "sentence, book",
        "constant, code",
        "perplexity, book, tokens up to 32,000",
        "perplexity, code, tokens up to 32,000",
    ]
    assert shown == [
        ["`full`", "59 57", "59 57", "36.00", "36.00"],
        ["`blend`", "44 42", "44 42", "38.00", "38.00"],
        ["`distinct`", "29 -", "29 -", "42.00", "42.00"],
    ]
    text = tables.rewritten(text.replace("quality", "quality_intervals"), tmp_path)
    heading, _, *shown = cells(text)
    assert heading[0].startswith("95% interval of the share in percent, of 60 at 8,192")
    assert shown[1] == ["`blend`", "61-83 57-80", "61-83 57-80"]
    assert shown[2][1] == "36-61 -"
    assert "commit C." in text and "perplexity" not in text
    # Rows of a time when perplexity was of books only.
    old = [{**r, "filler": r["filler"].replace("book", "")} for r in task_rows()]
    assert tables.quality_tasks(old)[0].endswith(
        "perplexity, book, tokens up to 32,000 | perplexity, code, tokens up to 32,000 |"
    )
    # Other tables and their studies know nothing of code.
    more = [{**r, "filler": "code", "perplexity": "99"} for r in quality_rows() if r["perplexity"]]
    for table in (tables.quality, tables.quality_knobs):
        assert table([*quality_rows(), *more]) == table(quality_rows())


def options_of(**given: Any) -> dict[str, Any]:
    """A resolved configuration, as results have it."""
    parsed = CascadeOptions.parse({"cache_tokens": 2048, "stride": 512, **given})
    model = {"block_size": 16, "max_model_len": 32_100, "position_limit": 32_768}
    return asdict(resolve(parsed, **model))


def test_a_cache_is_named_by_what_is_not_usual() -> None:
    assert gather.name_of("full", {}, 512) == "full"
    assert gather.name_of("distinct", options_of(policy="distinct"), 512) == "distinct"
    assert gather.name_of("window", options_of(policy="window"), 128) == "window:stride=512"
    given = {"policy": "blend", "value_weight": 0, "score_weight": 2, "score_reduction": "mean"}
    name = "blend:score_weight=2,value_weight=0,score_reduction=mean"
    assert gather.name_of("blend:...", options_of(**given), 512) == name
    label, options = "blend:num_sub_caches=4", options_of(policy="blend", num_sub_caches=4)
    assert gather.name_of(label, options, 512) == label
    # Written when the option was not there.
    del options["value_weight"], options["score_weight"]
    assert gather.name_of(label, options, 512) == label


def test_results_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = tmp_path / "folder", tmp_path / "quality.csv"
    folder.mkdir()
    (folder / "summary.json").write_text('{"versions": {"torch": "T", "vllm": "V"}}')
    options = json.dumps(options_of(policy="distinct"))
    common = {"cache": "distinct", "length": 8192, "options": options, "kv_bytes": 2**20}
    common |= {"tokens_evicted": 1, "kv_blocks": 1, "index": 0}
    # They are scored anew.
    right = {"task": "sentence", "filler": "book", "exact": 0, "parts": 5, "parts_right": 2}
    right |= {"expected": "12345", "answer": "12,345 lanterns"}
    text = {"task": "perplexity", "first_position": 1, "end_position": 3, "nats": 0}
    rows = [
        {**common, **right},
        {**common, **right, "index": 30, "answer": "None."},
        {**common, **text},
        {**common, **text, "filler": "code"},
    ]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    first = {"study": "knobs", "commit": "C", "gpu": "G", "torch": "T", "vllm": "V", "model": "M"}
    cell = next(iter(gather.cells(gather.read([folder], gather.STUDIES["tasks"]))))
    kept = {**first, **cell, "cache": "other"}
    other = {**kept, "study": "tasks", "cache": "distinct", "task": "constant"}
    old = {**other, "task": "sentence"}
    lines = (",".join(map(str, row.values())) for row in (kept, old, other))
    output.write_text("\n".join([",".join(kept), *lines, ""]))
    monkeypatch.setattr(gather, "OUTPUT", output)
    command = ["gather.py", "--gpu=H100", "--commit=abc", "--tasks", str(folder)]
    command += ["--lengths", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    assert gather.main() == 0
    with output.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["study"], row["cache"]) for row in found] == [
        ("knobs", "other"),
        *[("tasks", "distinct")] * 4,
        *[("lengths", "distinct:stride=512")] * 3,
    ]
    answers, constant, book, code = found[1:5]
    assert (constant["task"], constant["commit"]) == ("constant", "C")
    assert (answers["prompts"], answers["exact"], answers["filler"]) == ("2", "1", "book")
    assert answers["model"] == "Qwen2.5-Coder-1.5B-Instruct" and answers["commit"] == "abc"
    assert (book["filler"], book["perplexity"]) == ("book", "1.0000")
    assert code["filler"] == "code"
    # The study of lengths counts twenty prompts.
    assert (found[5]["prompts"], found[5]["exact"]) == ("1", "1")


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n"
    return tables.rewritten(text, folder)


def cells(text: str) -> list[list[str]]:
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line[:1] == "|"]


def test_context_table(tmp_path: Path) -> None:
    text = written(tmp_path, "gpu_context", context_rows())
    assert text.startswith("before\n<!-- gpu_context -->\n| context") and "old" not in text
    assert text.endswith("\n<!-- /gpu_context -->\nafter\n")
    _, _, short, _, long = cells(text)
    assert short == [
        "4,096",
        "14.10 / 11.10",
        "5.10 / 5.07",
        "0.50 / 0.50",
        "40 / 40",
        "4,000 (40) / 5,714 (40)",
    ]
    assert long[1] == "- / 1,055.58" and long[4] == "0 / 40" and long[5] == "- / 5,714 (40)"
    assert "GPU, vLLM 0, PyTorch 2, commit abc." in text
    assert tables.rewritten(text, tmp_path) == text


def test_protocol_table(tmp_path: Path) -> None:
    text = written(tmp_path, "gpu_paper_protocol", protocol_rows())
    heading, _, short, *_ = cells(text)
    assert heading[3:5] == ["`paper`, stride 4,096", "`paper`, stride 256"]
    assert short == ["4,096", "41", "36.9", "32.8", "28.7", "24.6", "1.25x"]


def test_scaling_table(tmp_path: Path) -> None:
    common = {"prompt_tokens": 65536, "decode_requests": 64, "ttft_s": 2.0, "pipeline": 1}
    common |= {"gpu": "GPU", "vllm": 0, "torch": 2, "commit": "abc"}
    spreads = [(1, 1, 1, "", 100.0, 50.0), (4, 2, 1, "ray", 190.0, 75.0), (2, 1, 2, "", 50, 50)]
    spreads += [(1, 1, 1, "", 200, 25), (2, 2, 1, "", 100, 50)]
    # Of a model that one GPU does not hold.
    spreads += [(4, 4, 1, "", 100, 50), (8, 8, 1, "", 150, 90)]
    rows = [
        common
        | {"gpus": gpus, "tensor": tensor, "replicas": replicas, "executor": executor}
        | {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        | {"shape": "70b" if number > 4 else "", "backend": "CASCADE"}
        for number, (gpus, tensor, replicas, executor, prefill, decode) in enumerate(spreads)
    ]
    text = written(tmp_path, "gpu_scaling", [{k: str(v) for k, v in r.items()} for r in rows])
    heading, _, *lines = cells(text)
    assert heading[2] == "first token of 65,536, s"
    assert lines == [
        ["one GPU", "1", "2.00", "100 (1.00x)", "50 (1.00x)"],
        ["tensor parallel 2, through Ray", "4", "2.00", "190 (1.90x)", "75 (1.50x)"],
        ["2 replicas", "2", "2.00", "50 (0.50x)", "50 (1.00x)"],
        ["one GPU", "1", "2.00", "200 (1.00x)", "25 (1.00x)"],
        ["tensor parallel 2", "2", "2.00", "100 (0.50x)", "50 (2.00x)"],
        ["tensor parallel 4, 70b", "4", "2.00", "100 (1.00x)", "50 (1.00x)"],
        ["tensor parallel 8, 70b", "8", "2.00", "150 (1.50x)", "90 (1.80x)"],
    ]


def test_scaling_table_with_a_longer_prompt(tmp_path: Path) -> None:
    rows = [
        {"gpus": 1, "replicas": 1, "decode_requests": 32, "long_ttft_s": 19.336},
        {"gpus": 2, "replicas": 2, "decode_requests": 64, "long_ttft_s": ""},
    ]
    common = {"prompt_tokens": 65536, "ttft_s": 2.0, "pipeline": 1, "tensor": 1, "executor": ""}
    common |= {"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 3.0, "long_tokens": 500000}
    common |= {"gpu": "GPU", "vllm": 0, "torch": 2, "commit": "abc", "shape": "8b"}
    common |= {"backend": "CASCADE"}
    rows = [{k: str(v) for k, v in (common | row).items()} for row in rows]
    heading, _, *lines = cells(written(tmp_path, "gpu_scaling", rows))
    assert heading[3:] == [
        "of 500,000, s",
        "prefill, tokens/s",
        "decode of 32 requests of each replica, tokens/s",
    ]
    assert [line[3] for line in lines] == ["19.34", "-"]


def test_a_section_without_rows_stays(tmp_path: Path) -> None:
    text = "<!-- gpu_context -->\nold\n<!-- /gpu_context -->\n"
    assert tables.rewritten(text, tmp_path) == text
