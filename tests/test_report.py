"""The report: it opens without a network, draws its charts, fits a phone and escapes what it shows."""

from __future__ import annotations

import html
import json
import re
import runpy
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tsugiki.page import embed_json
from tsugiki.recipes.report import data_verdict, reason_ja, write_report

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))
write_run, stage_files = synthetic["write_run"], synthetic["stage_files"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Outline(HTMLParser):
    """Collects tags, ids and unbalanced elements."""

    def __init__(self):
        super().__init__()
        self.open, self.problems, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[k] for k in ("src", "href") if k in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


def outline(text: str) -> Outline:
    parsed = Outline()
    parsed.feed(text)
    return parsed


def dump_dom(page: Path, fragment: str = "") -> str:
    """The page's document after its script has run, as headless Chromium serialises it."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1280,900", "--virtual-time-budget=3000", "--dump-dom", page.resolve().as_uri() + fragment,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def in_frames(pages: dict[str, tuple[str, int]], path: Path) -> dict[str, str]:
    """Name to document, of (page, width in pixels) pairs shown side by side in frames of one window.

    Headless windows have a least width that is wider than a phone, frames have not; and one browser start serves all.
    """
    frames = "".join(
        f'<iframe id="{name}" style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}"></iframe>'
        for name, (text, width) in pages.items()
    )
    copy = """<script>addEventListener("load", function () { setTimeout(function () {
      document.querySelectorAll("iframe").forEach(function (frame) {
        var pre = document.createElement("pre");
        pre.id = "copy-" + frame.id; pre.textContent = frame.contentDocument.documentElement.outerHTML;
        document.body.appendChild(pre);
      }); }, 1000); });</script>"""
    path.write_text(f"<!doctype html><body>{frames}{copy}", encoding="utf-8")
    dom = dump_dom(path)
    found = re.findall(r'<pre id="copy-([^"]*)">(.*?)</pre>', dom, re.S)
    return {name: html.unescape(text) for name, text in found}


def dataset(dom: str) -> dict[str, str]:
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', re.search(r"<html[^>]*>", dom).group(0)))


def marks(dom: str, series: str) -> int:
    return dom.count(f'data-series="{series}"')


def test_the_page_is_whole_and_needs_no_network(tmp_path):
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    page = outline(text)
    assert page.problems == [] and page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link == "summary.json" or link.startswith("#") for link in page.links)
    namespace = "http://www.w3.org/2000/svg"  # a name, never fetched
    assert not re.search(r"https?://|@import|url\(", text.replace(namespace, ""))
    assert str(tmp_path) not in text


def test_the_page_links_to_the_page_of_compute_where_there_is_one(tmp_path):
    run = write_run(tmp_path)
    assert "scaling.html" not in write_report(run).read_text(encoding="utf-8")
    (tmp_path / "scaling").mkdir()
    (tmp_path / "scaling" / "scaling.html").write_text("", encoding="utf-8")
    links = outline(write_report(run).read_text(encoding="utf-8")).links
    assert [(run / link).resolve() for link in links if link.endswith("scaling.html")] == [(tmp_path / "scaling" / "scaling.html").resolve()]


def test_the_page_says_what_to_ship_and_whether_more_data_helps(tmp_path):
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    top = text[text.index("<main>") : text.index('id="curve"')]
    for expected in ("Q4_K_M", "4.12 MB", "70.4%", "2,000", "頭打ち", "No gain seen", "levels/model-Q4_K_M.gguf"):
        assert expected in top


def test_the_reason_does_not_repeat_the_headline(tmp_path):
    text = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    assert '<p class="because"><span class="ja" lang="ja">合格した中で最小のファイルです。' in text
    assert ">The smallest file that passes.<" in text


def test_a_level_stands_beside_the_adapted_model_only_when_both_answered_the_same_items(tmp_path):
    stages = stage_files()
    legend = '<path d="M0 2h26v8H0z"'
    fewer = write_report(write_run(tmp_path / "fewer", stages)).read_text(encoding="utf-8")
    stages["check"]["samples"] = 360
    same = write_report(write_run(tmp_path / "same", stages)).read_text(encoding="utf-8")
    assert (fewer.count(legend), same.count(legend)) == (2, 3)


def test_hostile_text_stays_text(tmp_path):
    stages = stage_files()
    evil = "</script><script>document.title='stolen'</script><img src=x onerror=alert(1)>"
    stages["data"]["title"] = {"ja": evil, "en": evil}
    stages["data"]["kinds"] = {evil: 3}
    stages["data"]["dropped_by"] = {evil: 1}
    stages["gguf"]["differences"][0]["text"] = evil
    stages["check"]["recommended"]["why"] = {"ja": evil, "en": evil}
    stages["evaluate"]["examples"][0]["prompt"] = evil
    stages["evaluate"]["rows"][0]["task"] = f"setsubi/{evil}"
    stages["sweep"]["points"][0]["nll_by_kind"] = {evil: 1.0}
    text = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    assert "stolen" in text
    assert evil not in text and "<img" not in text
    assert text.count("<script") == 3 and outline(text).problems == []


def test_embedded_json_cannot_end_its_element_and_reads_back():
    value = {"日本語": "</script><!-- & \u2028\u2029", "n": [1, None, 0.5]}
    text = str(embed_json(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value
    with pytest.raises(ValueError):
        embed_json({"nll": float("nan")})


@pytest.mark.parametrize("count", range(7))
def test_a_partial_run_shows_what_there_is(tmp_path, count):
    stages = dict(list(stage_files().items())[:count])
    text = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    page = outline(text)
    assert page.problems == [] and page.open == []
    assert ("A partial run" in text) == (count < 6)
    for stage, section in (("data", "data"), ("sweep", "curve"), ("gguf", "parity"), ("check", "levels"), ("evaluate", "scores")):
        assert (section in page.ids) == (stage in stages)


def test_a_level_that_cannot_be_judged_is_neither_pass_nor_degraded(tmp_path):
    stages = stage_files()
    stages["check"]["levels"][4]["verdict"] = "inconclusive"
    text = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    assert text.count('class="verdict inconclusive"') == 3  # the headline, the legend, the table
    assert "not proven yet" in text and ">Ship " not in text


def test_a_check_that_recommends_nothing_says_so(tmp_path):
    stages = stage_files()
    stages["check"]["recommended"] = None
    assert "No level can be recommended" in write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")


def test_only_the_required_fields_are_enough(tmp_path):
    stages = stage_files()
    for point in stages["sweep"]["points"]:
        for key in ("train_nll", "nll_by_kind", "bpc", "nll_ci"):
            del point[key]
    for key in ("base", "p_best_by_n", "settings"):
        del stages["sweep"][key]
    for row in stages["check"]["levels"]:
        row.update(score=None, score_ci=None, delta_score=None, peak_rss=None, gen_tok_s=None)
    stages["check"]["settings"] = {}
    stages["gguf"] = {k: stages["gguf"][k] for k in ("path", "bytes", "sha256", "parity")}
    assert outline(write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")).problems == []


@pytest.mark.parametrize(
    ("counts", "best", "one_se", "overfits_at", "kind"),
    [
        ([250], 250, 250, None, "unknown"),
        ([250, 500, 1000], 1000, 1000, None, "more"),
        ([250, 500, 1000], 1000, 500, None, "flat"),
        ([250, 500, 1000], 500, 250, None, "enough"),
        ([250, 500, 1000], 500, 500, 1000, "overfit"),
    ],
)
def test_the_curve_is_put_into_words(counts, best, one_se, overfits_at, kind):
    sweep = {
        "points": [{"n": n, "nll": 1.0} for n in counts],
        "optimum": {"n": best, "one_se_n": one_se, "overfits_at": overfits_at},
    }
    assert data_verdict(sweep)["kind"] == kind


def test_the_steps_and_the_heat_map_are_shown_where_they_were_measured(tmp_path):
    text = write_report(write_run(tmp_path / "with")).read_text(encoding="utf-8")
    assert outline(text).problems == []
    assert "Adapter, not merged" in text and "3.0e-07" in text
    assert "<title>blk.1.ffn_down: 4.000e-04</title>" in text and "Where quantization hurts" in text
    stages = stage_files()
    stages["check"]["attribution"] = {"left_out": "the model in transformers needs 18.0 GB of memory, 12.0 GB are free"}
    del stages["check"]["sensitivity"]
    without = write_report(write_run(tmp_path / "without", stages)).read_text(encoding="utf-8")
    assert "Adapter, not merged" not in without and "Where quantization hurts" not in without


def test_the_caches_cost_is_shown_where_key_biases_stand_out(tmp_path):
    stages = stage_files()
    rows = [{"keys": k, "values": v, "kld_mean": kl} for k, v, kl in (("f16", "f16", 0.0), ("q8_0", "f16", 0.31), ("f16", "q4_0", 0.002))]
    stages["check"] |= {"profile": {"outlying": [0, 27]}, "cache": {"file": "model-Q4_K_M.gguf", "rows": rows}}
    text = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    assert outline(text).problems == []
    assert "(layer " in text and "0, 27" in text and "3.1e-01" in text and "2.0e-03" in text


def test_a_forecast_of_no_gain_is_said_although_the_largest_count_is_best(tmp_path):
    ahead = {"a": 3.0, "b": 1.5, "c": 0.8, "at": 2000, "nll": 0.99, "nll_ci": [0.98, 1.0], "gain": 0.005, "gain_ci": [0.0, 0.01],
             "backcast": {"n": 1000, "predicted": 1.0, "measured": 0.995}, "answer": "no"}
    sweep = {"points": [{"n": n, "nll": 1.0} for n in (250, 500, 1000)], "optimum": {"n": 1000, "one_se_n": 1000}}
    assert data_verdict(sweep | {"forecast": ahead})["kind"] == "flat"
    assert "40%" in data_verdict(sweep | {"forecast": ahead | {"answer": "yes", "gain": 0.4}})["long_en"]
    assert data_verdict(sweep | {"forecast": ahead | {"answer": "unclear"}})["kind"] == "open"
    stages = stage_files()
    stages["sweep"]["forecast"] = ahead
    page = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    assert outline(page).problems == []
    assert "NLL = 0.800 + 3 · n^−1.50, expects 0.990 at 2,000 samples" in page and "Not worth collecting" in page


def test_reasons_for_dropping_are_said_in_japanese():
    assert reason_ja("train: near-duplicate of a test item") == "学習：テストにほぼ同じものがある"
    assert reason_ja("test: exact duplicate of a train item") == "テスト：学習と同じ質問"
    assert reason_ja("train: exact duplicate") == "学習：同じ質問の重複"
    assert reason_ja("valid: longer than 96 tokens") == "検証：96トークンより長い"
    assert reason_ja("something new") == "something new"


def test_the_first_examples_are_of_different_kinds(tmp_path):
    stages = stage_files()
    examples = stages["evaluate"]["examples"]
    stages["evaluate"]["examples"] = sorted(examples * 3, key=lambda e: e["kind"])
    text = write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8")
    shown = text[text.index('id="examples"') :]
    first = sorted(shown.index(e["prompt"]) for e in examples)
    assert shown.index("class=\"example\"", first[-1]) > first[-1]
    assert shown[: first[-1]].count('class="example"') == 3


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, str]:
    """Documents of a full run on a desktop and on two phones, and of runs that stopped early."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    root = tmp_path_factory.mktemp("opened")
    full = write_report(write_run(root / "full")).read_text(encoding="utf-8")
    wide = stage_files()
    wide["evaluate"]["examples"][0]["answers"]["base"] = "x" * 400
    wide["data"]["title"]["ja"] = "とても長い名前の分野" * 8
    phone = write_report(write_run(root / "wide", wide)).read_text(encoding="utf-8")
    pages = {
        "desktop": (full, 1280),
        "phone390": (phone, 390),
        "phone360": (phone.replace('data-lang="ja"', 'data-lang="en"', 1), 360),
    }
    for count in (0, 2, 4):
        stages = dict(list(stage_files().items())[:count])
        pages[f"partial{count}"] = (write_report(write_run(root / str(count), stages)).read_text(encoding="utf-8"), 800)
    return in_frames(pages, root / "frames.html")


def test_every_chart_is_drawn_in_chromium(opened):
    dom, stages = opened["desktop"], stage_files()
    found = dataset(dom)
    assert found["errors"] == "0", found.get("error")
    assert (found["ready"], found["lang"], found["charts"], found["overflow"]) == ("1", "ja", "5", "0")
    assert marks(dom, "test") == marks(dom, "train") == len(stages["sweep"]["points"])
    levels = len(stages["check"]["levels"])
    assert marks(dom, "delta_nll") == levels
    assert marks(dom, "score") == levels + 4 * 2  # and bars: all items and three kinds, before and after
    assert marks(dom, "gain") == 5  # three adapted steps, two of the recommended level; other levels are in the table
    assert 'class="optimum"' in dom
    assert "NaN" not in dom[dom.index('id="curve"') : dom.index('id="examples"')]


@pytest.mark.parametrize("name", ["phone390", "phone360"])
def test_nothing_is_wider_than_a_phone(opened, name):
    found = dataset(opened[name])
    assert found["errors"] == "0", found.get("error")
    assert (found["charts"], found["overflow"]) == ("5", "0")
    assert marks(opened[name], "test") == len(stage_files()["sweep"]["points"])


@pytest.mark.parametrize(("count", "charts"), [(0, "0"), (2, "1"), (4, "1")])
def test_a_partial_run_opens_without_an_error(opened, count, charts):
    found = dataset(opened[f"partial{count}"])
    assert found["errors"] == "0", found.get("error")
    assert found["charts"] == charts


@browser
def test_a_mark_shows_its_exact_values_on_keyboard_focus(tmp_path):
    page = write_report(write_run(tmp_path))
    text = page.read_text(encoding="utf-8")
    script = '<script>document.querySelector("[data-series=test]").focus();</script></body>'
    page.write_text(text.replace("</body>", script), encoding="utf-8")
    dom = dump_dom(page, "#en,dark")
    found = dataset(dom)
    assert (found["errors"], found["lang"], found["theme"]) == ("0", "en", "dark")
    tip = re.search(r'<div id="tip".*?</div>', dom, re.S).group(0)
    assert "visibility: visible" in tip
    for expected in ("250 samples", "1.6200", "1.570–1.675", "0.6100"):
        assert expected in tip


def section(text: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?</section>', text, re.S).group(0)


def test_what_was_gained_forgotten_and_taken_is_said_with_its_interval(tmp_path):
    text = html.unescape(section(write_report(write_run(tmp_path)).read_text(encoding="utf-8"), "gains"))
    gained, forgotten, taken = re.findall(r"<dd>(.*?)</dd>", text, re.S)[:3]
    assert "設備保全" in gained and "+67.0" in gained and "+62.0 … +72.0" in gained
    assert "NIILC" in forgotten and "−9.0" in forgotten and "MGSM" not in forgotten
    assert "示せたものはありません" in taken  # Q3_K_M lost, but Q4_K_M is the recommended level
    assert re.search(r"MGSM.*どのモデルも0点です", text, re.S)
    assert "測らなかったもの" in text and "tsugiki_jaqket" in text


def test_a_run_without_benchmarks_says_that_forgetting_was_not_measured(tmp_path):
    stages = stage_files()
    stages["evaluate"]["changes"] = stages["evaluate"]["changes"][:1]
    stages["evaluate"]["rows"] = [r for r in stages["evaluate"]["rows"] if "family" not in r]
    text = section(write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8"), "gains")
    assert "測っていません" in text and "not measured: there is no task outside the domain" in text


def test_where_every_model_fails_nothing_is_said_about_forgetting(tmp_path):
    stages = stage_files()
    for change in stages["evaluate"]["changes"][1:]:
        change.update(before=0.0, after=0.0, difference=0.0, ci=[-0.07, 0.07], change="open")
    text = section(write_report(write_run(tmp_path, stages)).read_text(encoding="utf-8"), "gains")
    assert "unknown: outside the domain every model scores 0" in text


def test_benchmarks_are_not_taken_for_items_of_the_domains_test(tmp_path):
    """A benchmark scored by the domain's own metric changes neither the bars nor the score before adaptation."""
    stages = stage_files()
    without = dict(stages, evaluate={**stages["evaluate"], "rows": [r for r in stages["evaluate"]["rows"] if "family" not in r]})
    pages = [write_report(write_run(tmp_path / str(i), s)).read_text(encoding="utf-8") for i, s in enumerate((stages, without))]
    assert section(pages[0], "scores").split("<details>")[0] == section(pages[1], "scores").split("<details>")[0]
    facts = [re.search(r'<dl class="facts">.*?</dl>', page, re.S).group(0) for page in pages]
    assert facts[0] == facts[1]
