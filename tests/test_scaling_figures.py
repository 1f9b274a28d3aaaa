"""The figures, tables and the page: whole, readable without a network, and of the same numbers as ``scaling.json``."""

import copy
import csv
import json
import re
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import pyarrow.parquet
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from typer.testing import CliRunner

from tsugiki.artifacts import read_json
from tsugiki.evaluate.scaling import figures
from tsugiki.evaluate.scaling.figures import FORMATS, draw_all, japanese_font, tables
from tsugiki.evaluate.scaling.page import note_ja, render
from tsugiki.recipes.cli import app

needs_font = pytest.mark.skipif(japanese_font() is None, reason="no Japanese font is installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``tsugiki evaluate scaling`` writes from the shipped tables alone."""
    folder = tmp_path_factory.mktemp("scaling")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        patch.setenv("TSUGIKI_DATA", str(folder))
        patch.chdir(folder)
        run = CliRunner().invoke(app, ["evaluate", "scaling"], catch_exceptions=False)
    return folder / "runs" / "scaling", run, [str(w.message) for w in heard]


@pytest.fixture(scope="module")
def result(made):
    return read_json(made[0] / "scaling.json")


def test_the_command_writes_page_figures_and_tables_and_says_what_was_analysed(made):
    out, run, _ = made
    assert run.exit_code == 0
    assert "mean(NIILC, JMMLU part, JAQKET) ~ ja" in run.output
    assert (out / "scaling.html").exists()
    names = {"correlations", "loadings", "components", "laws", "languages"}
    assert {p.stem for p in (out / "figures").iterdir()} == names
    assert {p.suffix[1:] for p in (out / "figures").iterdir()} == set(FORMATS)


@needs_font
def test_no_glyph_is_missing(made):
    assert not [text for text in made[2] if "Glyph" in text]


def test_pictures_are_large_enough_and_not_empty(made):
    for path in (made[0] / "figures").glob("*.png"):
        picture = imread(path)
        assert min(picture.shape[:2]) > 350, path.name
        assert picture[..., :3].std() > 0.05, path.name


def test_vector_figures_are_well_formed_and_hold_no_date(made):
    for path in (made[0] / "figures").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert ET.fromstring(text).tag.endswith("svg") and "<dc:date>" not in text
    for path in (made[0] / "figures").glob("*.pdf"):
        data = path.read_bytes()
        assert data.startswith(b"%PDF-") and b"/CreationDate" not in data
        assert b"/Subtype /Type3" not in data  # text stays text: Type 3 fonts are refused by journals


def test_without_a_japanese_font_the_labels_are_english_and_a_warning_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "japanese_font", lambda: None)
    seen = []
    monkeypatch.setattr(figures, "FIGURES", {"one": lambda r, words: seen.append(words("日本語", "English")) or Figure()})
    said = draw_all(result, tmp_path, language="ja", formats=("svg",))
    assert seen == ["English"] and len(said) == 1 and "Noto Sans CJK JP" in said[0]


def test_a_font_that_is_not_installed_is_not_chosen():
    assert japanese_font(("No Such Font 42",)) is None


def test_every_table_is_the_same_as_csv_and_parquet(made, result):
    for name, rows in tables(result).items():
        if not rows:
            assert not (made[0] / "tables" / f"{name}.csv").exists()
            continue
        parquet = pyarrow.parquet.read_table(made[0] / "tables" / f"{name}.parquet").to_pylist()
        with (made[0] / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            flat = list(csv.DictReader(file))
        assert len(parquet) == len(flat) == len(rows), name
        for a, b in zip(parquet, flat, strict=True):
            assert {k: "" if v is None else str(v) for k, v in a.items()} == b, name


def test_the_tables_hold_every_point_of_every_law(result):
    points = [(row["law"], row["model"], row["y"]) for row in tables(result)["law_points"]]
    assert points == [(law["key"], p["model"], p["y"]) for law in result["laws"] for p in law["points"]]


def test_shares_of_table_three_sum_to_a_hundred(result):
    for row in result["languages"]:
        assert sum(row["shares"].values()) == pytest.approx(100, abs=0.11), row["model"]


def test_the_page_asks_nothing_of_a_network(made):
    page = (made[0] / "scaling.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert set(links) == {"scaling.json", "tables/", "figures/"}
    assert "@import" not in page and "url(" not in page and "fetch(" not in page
    assert 'name="viewport"' in page and "max-width: 860px" in page


def test_the_page_is_in_both_languages(made):
    page = (made[0] / "scaling.html").read_text(encoding="utf-8")
    body = page[page.index("<main>") : page.index("</main>")]
    assert body.count('class="ja" lang="ja"') == body.count('class="en" lang="en"') > 40
    assert not re.search(r'lang="en">[^<]*[\u3041-\u30ff]', body)


def test_the_page_carries_the_numbers_of_the_analysis(made, result):
    page = (made[0] / "scaling.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)[1])
    assert data["laws"] == [law for law in result["laws"] if "points" in law]
    assert [m["name"] for m in data["models"]] == [m["name"] for m in result["models"]]


def test_a_table_that_settles_nothing_is_not_given_a_headline_of_points(made):
    page = (made[0] / "scaling.html").read_text(encoding="utf-8")
    assert "This table alone does not settle a law." in page


def test_names_from_files_cannot_end_a_script_or_become_markup(result):
    evil = copy.deepcopy(result)
    evil["models"][0]["name"] = '</script><img src=x onerror="alert(1)">'
    evil["notes"] = ["<b>note</b>"]
    page = render(evil)
    assert "<img" not in page and "<b>note</b>" not in page and page.count("</script>") == 3


def test_a_lead_with_its_interval_above_zero_makes_the_headline(result):
    sure = copy.deepcopy(result)
    law = next(law for law in sure["laws"] if law["axis"] == "ja")
    law["slope"] |= {"value": 10.25, "low": 6.4, "high": 12.9}
    page = render(sure)
    assert "<em>10.2点</em>" in page or "<em>10.3点</em>" in page
    assert "6.4" in page and "12.9" in page


def test_notes_of_laws_are_told_in_japanese():
    assert note_ja("only 5 points: read it as a sketch, not a law (at least 8 are wanted)") == "点が5個しかなく、目安にとどまります"
    assert note_ja("Llama 2 gives 44% of the points") == "点の44%がLlama 2です"
    assert note_ja("something new") == "something new"


def test_every_note_a_law_has_is_known_in_japanese(result):
    for law in result["laws"]:
        for note in law["notes"]:
            assert note_ja(note) != note


def test_the_template_is_shipped():
    assert (Path(figures.__file__).parent / "page.html").exists()
