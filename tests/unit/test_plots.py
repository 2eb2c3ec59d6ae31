"""Committed plots and README's generated tables are those of the committed rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plots  # noqa: E402
import tables  # noqa: E402

SOURCES = [path for path in sorted(plots.RESULTS.glob("*.csv")) if path.stem in plots.PLOTS]
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


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_plot_is_of_the_rows(source: Path) -> None:
    target = source.with_suffix(".svg")
    assert target.exists(), "run python benchmarks/plots.py"
    plot = target.read_text(encoding="utf-8")
    assert plots.digests(source) in plot, "run python benchmarks/plots.py"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_plot_is_what_the_script_draws(source: Path, tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    committed = source.with_suffix(".svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("drawn with another version of Matplotlib")
    plots.draw(source, tmp_path / "again.svg")
    again = (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert PLACE.sub("", again) == PLACE.sub("", committed)
    # Processors round the last digit otherwise.
    pairs = zip(PLACE.findall(again), PLACE.findall(committed), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) < 1e-4


def test_every_plot_has_rows() -> None:
    there = {plot.stem for plot in plots.RESULTS.glob("*.svg")} & set(plots.PLOTS)
    assert there == {source.stem for source in SOURCES}


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
    passkey, multikey, perplexity = drawn("quality", quality_rows())
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


def test_readme_has_the_tables_of_the_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run make readme"


def test_quality_tables(tmp_path: Path) -> None:
    text = written(tmp_path, "quality", quality_rows())
    shown = tables.rewritten(text, tmp_path)
    assert "| `full` | 3 3 | 3 3 | 3.00 | 1,026.00 |" in shown
    assert "`blend:stride=512`" in shown and "other" not in shown
    knobs = tables.rewritten(text.replace("quality", "quality_knobs"), tmp_path)
    assert "right of 8 at 4,096 tokens" in knobs
    assert "| `paper other` | 4 | 4 | 4 | 1,027.00 |" in knobs and "`full`" not in knobs


def written(folder: Path, name: str, rows: list[dict[str, str]]) -> str:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
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
    rows = [
        common
        | {"gpus": gpus, "tensor": tensor, "replicas": replicas, "executor": executor}
        | {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        for gpus, tensor, replicas, executor, prefill, decode in spreads
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
    ]


def test_a_section_without_rows_stays(tmp_path: Path) -> None:
    text = "<!-- gpu_context -->\nold\n<!-- /gpu_context -->\n"
    assert tables.rewritten(text, tmp_path) == text
