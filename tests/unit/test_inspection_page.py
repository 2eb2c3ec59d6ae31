"""The page of `vllm-cascade inspect`: what it holds, and what a real browser makes of it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from browser import Browser, find_browser
from cascade_text import NUM_TOKENS, kept_text
from vllm_cascade.inspection.page import data_of, page

# What would end the script, or be a tag, a comment, an entity, a place in the template, or a line.
HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<!--<script>",
    "&lt;b&gt;",
    "{{js}}",
    "<img src=x onerror=\"document.title='taken'\">",
    "\u2028\\u003c\"'",
    "",
    "🙂",
    "\n",
]
PIECES = [HOSTILE[i] if i < len(HOSTILE) else f" w{i}" for i in range(NUM_TOKENS)]


def written_data(text: str) -> dict:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_every_bit_and_every_piece() -> None:
    kept = kept_text(pieces=PIECES)
    data = written_data(page(kept))
    assert data == json.loads(json.dumps(data_of(kept)))
    assert data["pieces"] == PIECES
    for layer, heads in zip(data["layers"], kept.layers.values(), strict=True):
        for head, expected in zip(layer["heads"], heads, strict=True):
            packed = np.frombuffer(base64.b64decode(head["bits"]), np.uint8)
            assert np.flatnonzero(np.unpackbits(packed, bitorder="little")).tolist() == expected
    assert sum(part["size"] for part in data["parts"]) == kept.num_kept


def test_the_page_needs_nothing_beside_it_and_escapes_its_text() -> None:
    text = page(kept_text(pieces=PIECES, model="<b>{{css}}</b>", answer="</script>"))
    assert len(re.findall("<script", text)) == 2 == len(re.findall("</script", text))
    assert "{{" not in text.replace("{{js}}", "").replace("{{css}}", "")
    assert not re.search(r"https?:|\b(src|@import)\b(?!=x)", text)
    assert text.count('"use strict"') == 1


needs_browser = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on the path (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def shown(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "kept.html"
    file.write_text(page(kept_text(pieces=PIECES)), encoding="utf-8")
    with Browser(dark=request.param) as browser:
        browser.open(file)
        yield browser
        assert browser.errors == []


def classes(browser: Browser) -> list[str]:
    """Of each token, those that colour it."""
    code = "[...document.querySelectorAll('#text [data-t]')].map(e => e.classList[0])"
    return browser.run(code)


def choose(browser: Browser, name: str, value: object) -> None:
    """Select as a person does: an event comes with it."""
    code = f"(s => {{s.value = '{value}'; s.dispatchEvent(new Event('change'))}})"
    browser.run(f"{code}(document.getElementById('{name}'))")
    browser.settle()


def details(browser: Browser) -> str:
    return browser.run("document.getElementById('token').innerText")


LEVELS = {0: "none", 1: "l3", 2: "l4", 3: "l5", 4: "l6"}  # of 4 heads


@needs_browser
def test_every_token_has_the_colour_of_its_share(shown: Browser) -> None:
    kept = kept_text()
    assert classes(shown) == [LEVELS[count] for count in kept.counts.tolist()]
    heads = [head for layer in kept.layers.values() for head in layer]
    choose(shown, "layer", 1)
    expected = [sum(t in head for head in heads[2:]) for t in range(NUM_TOKENS)]
    assert classes(shown) == [["none", "l4", "l6"][count] for count in expected]
    choose(shown, "head", 0)
    starts = kept.starts(heads[2])
    names = ["sinks", "l4", "l5", "l6"]  # of three sub-caches, oldest first
    for token, name in enumerate(classes(shown)):
        part = max(i for i, start in enumerate(starts) if start <= token)
        assert name == (names[part] if token in heads[2] else "none"), token
    assert "sub-cache 2" in shown.run("document.getElementById('kept-in').innerText")
    for name in ("layer", "head"):
        choose(shown, name, "")


@needs_browser
def test_the_text_is_shown_as_it_is(shown: Browser) -> None:
    read = "[...document.querySelectorAll('#text [data-t]')].map(e => e.textContent)"
    assert shown.run(read) == PIECES
    assert shown.run("document.title") == "What blend kept of 187 tokens"
    assert shown.run("document.querySelectorAll('img, #text script').length") == 0


@needs_browser
def test_a_token_tells_who_kept_it(shown: Browser) -> None:
    kept = kept_text()
    for token in (20, 100, 150):
        shown.point_at(f"[data-t='{token}']")
        heads = [head for layer in kept.layers.values() for head in layer]
        holders = [index for index, head in enumerate(heads) if token in head]
        said = details(shown)
        assert said.startswith(f'token {token} " w{token}"')
        shares = f"kept by {len(holders)} of 4 heads" if holders else "forgotten by all 4 heads"
        assert shares in said
        cells = shown.run(
            "[...document.querySelectorAll('#grid i')].map(e => [e.textContent, e.title])"
        )
        # Layers side by side, a row for each head.
        for index, layer_head in ((0, (0, 0)), (1, (0, 1)), (2, (1, 0)), (3, (1, 1))):
            layer, head = layer_head
            text, title = cells[2 * head + layer]
            assert title.startswith(f"layer {layer}, KV head {head}: ")
            assert title.endswith("not kept") == (index not in holders) == (text == "")


@needs_browser
def test_a_click_pins_a_token_and_keys_move_on(shown: Browser) -> None:
    shown.point_at("[data-t='30']", click=True)
    shown.point_at("[data-t='60']")
    assert details(shown).startswith("token 30 ")
    shown.press("ArrowRight")
    shown.press("ArrowRight")
    shown.press("ArrowLeft")
    assert details(shown).startswith("token 31 ")
    shown.point_at("[data-t='31']", click=True)
    shown.point_at("[data-t='60']")
    assert details(shown).startswith("token 60 ")
    shown.point_at("#strip", click=True)
    assert details(shown).startswith(f"token {NUM_TOKENS // 2} ")
    shown.point_at(f"[data-t='{NUM_TOKENS // 2}']", click=True)


@needs_browser
def test_selected_text_tells_how_much_of_it_was_kept(shown: Browser) -> None:
    (passage,) = kept_text().find(" w40 w41 w42")
    select = "getSelection().setBaseAndExtent(text('{}'), {}, text('{}'), {})"
    shown.run("text = (token) => document.querySelector(`[data-t='${token}']`).firstChild; 0")
    # From the end of one token to the start of another: neither is selected.
    shown.run(select.format(39, 4, 43, 0))
    shown.settle()
    said = shown.run("document.getElementById('selected').innerText")
    assert said == (
        f"selected tokens 40 to 42: kept by {100 * passage.share:.1f}% of the heads; "
        f"{passage.whole} kept all of them"
    )
    shown.run(select.format(39, 3, 43, 1))
    shown.settle()
    assert shown.run("selectedTokens()") == [39, 43]
    shown.run("getSelection().removeAllRanges()")
    shown.settle()
    assert shown.run("document.getElementById('selected').textContent") == ""


@needs_browser
def test_the_map_has_a_row_for_each_layer_and_a_colour_for_each_share(shown: Browser) -> None:
    kept = kept_text()
    pixels = shown.run(
        "(c => [c.width, c.height, ...c.getContext('2d').getImageData(0, 0, c.width, c.height)"
        ".data])(document.getElementById('strip'))"
    )
    width, height, *values = pixels
    assert (width, height) == (NUM_TOKENS, 2)
    colours = np.asarray(values, np.uint8).reshape(height, width, 4)[:, :, :3]
    palette = shown.run("colours()")
    for row, heads in zip(colours, kept.layers.values(), strict=True):
        for token, colour in enumerate(row.tolist()):
            count = sum(token in head for head in heads)
            assert colour == palette[["none", "l4", "l6"][count]], token


@needs_browser
def test_text_can_be_read_on_every_colour(shown: Browser) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    code = """
      ["none", "sinks", "l1", "l2", "l3", "l4", "l5", "l6"].map((name) => {
        const made = element("span", "x", name);
        document.getElementById("text").append(made);
        const style = getComputedStyle(made);
        const page = getComputedStyle(document.body).backgroundColor;
        const clear = style.backgroundColor === "rgba(0, 0, 0, 0)";
        const found = [style.color, clear ? page : style.backgroundColor];
        made.remove();
        return [name, ...found];
      })"""
    for name, text, ground in shown.run(code):
        lights = sorted(map(luminance, (text, ground)))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (name, text, ground)


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" as WCAG defines it."""
    values = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@needs_browser
def test_a_long_text_is_shown_a_window_at_a_time(tmp_path: Path, monkeypatch) -> None:
    """Fifty thousand tokens: only those near the window are elements of their own."""
    data = data_of(kept_text())
    for head in (head for layer in data["layers"] for head in layer["heads"]):
        head["bits"] = base64.b64encode(base64.b64decode(head["bits"]) * 270).decode()
    count = len(base64.b64decode(data["layers"][0]["heads"][0]["bits"])) * 8
    data |= {"pieces": [f" word{i}" for i in range(count)], "num_prompt_tokens": count - 7}
    monkeypatch.setattr("vllm_cascade.inspection.page.data_of", lambda kept: data)
    file = tmp_path / "long.html"
    file.write_text(page(kept_text()), encoding="utf-8")
    with Browser() as browser:
        browser.open(file)
        assert count > 50_000 and 0 < len(classes(browser)) < 5_000
        browser.run(f"goTo({count - 3})")
        browser.settle()
        last = f'token {count - 3:,} " word{count - 3}" of the answer'
        assert details(browser).startswith(last)
        assert 0 < len(classes(browser)) < 5_000
        assert browser.run("""document.querySelector("[data-t='0']") === null""")
        parts = "[...document.querySelectorAll('#text > span:not(.answer)')]"
        assert browser.run(f"{parts}.map(e => e.textContent).join('')") == "".join(data["pieces"])
        browser.run("getSelection().selectAllChildren(document.getElementById('text'))")
        assert browser.run("selectedTokens()") == [0, count - 1]
        assert browser.errors == []
