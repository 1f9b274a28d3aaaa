"""The user's models as points: their budgets, where they stand on a law, and a sentence where they cannot stand."""

import copy
import csv
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tsugiki.bases import load_bases
from tsugiki.errors import UserError
from tsugiki.evaluate.scaling.analysis import QUESTIONS, _efficiency, analyse, own_equivalence
from tsugiki.evaluate.scaling.budgets import budget, explain
from tsugiki.evaluate.scaling.figures import draw_all, tables
from tsugiki.evaluate.scaling.laws import fit_law, predict
from tsugiki.evaluate.scaling.page import render
from tsugiki.evaluate.scaling.points import (
    Point,
    Score,
    language_by_script,
    moved,
    place,
    read_languages,
    read_points,
    tokens_by_language,
)
from tsugiki.evaluate.scaling.references import own, printed_reference, published
from tsugiki.evaluate.scaling.tables import ModelFacts, find_model, load_models, load_scores
from tsugiki.recipes.cli import app
from tsugiki.recipes.recipe import BASES
from tsugiki.results import Result, replace_results
from tsugiki.samples import EncodedSample, write_encoded

SHARED = Path(os.environ.get("TSUGIKI_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
needs_scores = pytest.mark.skipif(not (SHARED / "scores" / "scores_35.csv").exists(), reason="the public score matrix is not here")
BUNDLED = load_bases(BASES)


def a_run(runs: Path, base: str, *, scores: dict[str, list[tuple[str, str, float]]] | None = None, train_tokens: int = 8200,
          task: str = "") -> Path:
    """A finished run: 100 samples kept of 200, one level; ``scores``: model → (task, metric, value)."""
    folder = runs / "shop" / base
    rows = [EncodedSample(f"s{i}", "棚はどこ？" if i % 4 else "Where?", "右" if i % 4 else "Right", "d", "", [1] * 30, [2] * 11) for i in range(200)]
    write_encoded(folder / "data" / "train.jsonl", rows)
    fits = [{"n": n, "seed": 0, "epochs": 2, "nll": nll, "nll_ci": None, "bpc": None, "train_tokens": t, "seconds": 1.0}
            for n, nll, t in ((50, 2.0, 4100), (100, 1.0, train_tokens))]  # fmt: skip
    summary = {
        "domain": "shop", "base": base, "sweep": {"points": fits, "optimum": {"n": 100, "nll": 1.0}},
        "levels": [{"level": "F16", "bytes": 100}, {"level": "Q4_K_M", "bytes": 30}],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = [
        Result(f"shop/{base}/{model}", base, law_task, metric, value, stderr=0.02, n=198, settings={"task": task})
        for model, listed in (scores or {}).items()
        for law_task, metric, value in listed
    ]
    replace_results(runs / "results.sqlite", f"shop/{base}", "evaluate", found)
    return folder


def a_law(name="NIILC", slope=10.0, middle=21.0):
    rng = np.random.default_rng(0)
    x = np.linspace(middle - 2, middle + 2, 30)
    return fit_law(50 + slope * (x - middle) + rng.normal(0, 3, 30), x, [f"f{i % 10}" for i in range(30)], name=name, axis="ja", draws=200)


def test_a_run_gives_its_base_its_adapted_model_and_each_quantized_file(tmp_path):
    a_run(tmp_path, "tiny-llama")
    points, table, notes = read_points(tmp_path, load_models(), BUNDLED)
    assert [(p.name, p.kind) for p in points] == [
        ("shop/tiny-llama base", "base"), ("shop/tiny-llama adapted", "adapted"), ("shop/tiny-llama Q4_K_M", "quantized"),
    ]  # fmt: skip
    assert notes == [] and points[2].facts.size_bytes == 30
    base, adapted, level = (budget(p.facts, table, "total") for p in points)
    assert adapted.tokens == pytest.approx(base.tokens + 8200)  # the kept fit's tokens, all its epochs
    assert level.value == adapted.value


def test_an_adapters_tokens_move_its_base_along_the_languages_of_its_samples(tmp_path):
    a_run(tmp_path, "tiny-llama")
    (base, adapted, _), table, _ = read_points(tmp_path, load_models(), BUNDLED)
    before, after = budget(base.facts, table, "ja"), budget(adapted.facts, table, "ja")
    assert after.tokens - before.tokens == pytest.approx(0.75 * 8200)  # three of four samples are Japanese, equally long
    assert moved(adapted, table)["ja"] == pytest.approx(math.log10(after.tokens / before.tokens))
    assert any("75.0% ja, 25.0% en" in note for note in adapted.notes)


@pytest.mark.parametrize("text, language", [
    ("ポンプを止める", "ja"), ("設備保全", "ja"), ("Stop the pump", "en"), ("P-101 を止める", "ja"), ("123 ℃", "und"), ("", "und"), ("甲 ABC", "und"),
])  # fmt: skip
def test_scripts_tell_the_language_or_leave_it_open(text, language):
    assert language_by_script(text) == language


def test_text_in_latin_letters_is_not_english_by_that_alone(tmp_path):
    said = ["ポンプを止める。", "Please stop the pump and wait for the engineer.", "Der alte Mann ging langsam nach Hause.", "123"]
    write_encoded(tmp_path / "train.jsonl", [EncodedSample(f"s{i}", text, "", "d", "", [1] * 10, []) for i, text in enumerate(said)])
    tokens, how = tokens_by_language(tmp_path / "train.jsonl", 4, 400)
    assert tokens == {"ja": 100, "en": 100, "de": 100, "und": 100} and "Latin text by fastText" in how


def test_without_training_rows_the_tokens_are_of_undetermined_language(tmp_path):
    tokens, said = tokens_by_language(tmp_path / "train.jsonl", 10, 500)
    assert tokens == {"und": 500.0} and "undetermined" in said


def test_a_hub_base_has_the_budget_of_the_published_table(tmp_path):
    a_run(tmp_path, "llama-3-swallow-8b")
    (base, adapted, _), table, _ = read_points(tmp_path, load_models(), BUNDLED)
    assert base.facts.name == "Llama 3 Swallow 8B"
    assert budget(base.facts, table, "ja").tokens == 115e9  # Saito et al., Table 1
    assert 0 < moved(adapted, table)["ja"] < 1e-6


def test_a_base_of_unknown_tokens_is_said_to_be_so(tmp_path):
    a_run(tmp_path, "elyza-jp-8b")  # its continued tokens were not found
    (base, *_), table, _ = read_points(tmp_path, load_models(), BUNDLED)
    placed = place(base, a_law(), ["niilc"], table)
    assert placed.log_budget is None and placed.value is None
    assert "not known" in placed.sentence and any("--models" in note for note in base.notes)


def test_a_base_without_printed_tokens_is_placed_by_a_papers_convention_and_the_sentence_says_which(tmp_path):
    """15,000 B of Llama 3.1 and 210 B continued: 225 B Japanese by Saito et al.; Qwen2.5 has a share in Table 3 alone, 0.8 %."""
    for name, tokens, said in (("swallow-8b", 225e9, "Saito et al.'s A.3"), ("qwen2.5-7b", 144e9, "Takase & Honda's Table 3")):
        a_run(tmp_path / name, name, scores={"base": [("niilc", "char_f1", 0.5)]})
        (base, adapted, _), table, _ = read_points(tmp_path / name, load_models(), BUNDLED)
        placed = place(base, a_law(), ["niilc"], table)
        assert placed.log_budget == pytest.approx(math.log10(base.facts.parameters * tokens)), name
        assert placed.value == pytest.approx(50) and said in placed.sentence and placed.convention in said
        assert said in place(adapted, a_law(), ["niilc"], table).sentence  # not scored, expected all the same
        assert 0 < moved(adapted, table)["ja"] < 1e-6


def test_every_base_of_the_hub_that_the_recipe_names_is_in_the_table_with_its_size():
    table = load_models()
    for base in BUNDLED.values():
        if base.hub_id:
            found = find_model(base.hub_id, table)
            assert found is not None, base.hub_id
            assert found.parameters == pytest.approx(base.parameters, rel=0.06), base.hub_id  # the papers print whole billions


def test_a_torn_run_is_told_and_the_others_are_read(tmp_path):
    a_run(tmp_path, "tiny-llama")
    torn = tmp_path / "torn" / "tiny-qwen" / "summary.json"
    torn.parent.mkdir(parents=True)
    torn.write_text("{", encoding="utf-8")
    points, _, notes = read_points(tmp_path, load_models(), BUNDLED)
    assert len(points) == 3 and len(notes) == 1 and notes[0].startswith("torn/tiny-qwen: the run cannot be read")


def test_no_runs_no_points(tmp_path):
    assert read_points(tmp_path / "none", load_models(), BUNDLED)[0] == []


def test_a_point_is_placed_with_residual_and_prediction_interval():
    law = a_law()
    facts = ModelFacts("mine", parameters=8e9, active_parameters=8e9, tokens_total=1e12, tokens_ja=1e11)
    x = math.log10(8e9 * 1e11)
    placed = place(Point("mine", "r", "base", facts, {"niilc": Score(0.62, 0.03, 198, "char_f1")}), law, ["niilc"], {"mine": facts})
    expected = predict(law, x)
    assert placed.log_budget == pytest.approx(x) and placed.value == pytest.approx(62) and placed.stderr == pytest.approx(3)
    assert (placed.predicted, placed.low, placed.high) == (expected.value, expected.low, expected.high)
    assert placed.residual == pytest.approx(62 - expected.value) and placed.extrapolated is False
    assert "prediction interval" in placed.sentence


def test_a_mean_needs_every_task_and_its_error_is_that_of_independent_tasks():
    facts = ModelFacts("mine", parameters=8e9, active_parameters=8e9, tokens_total=1e12, tokens_ja=1e11)
    one = {"niilc": Score(0.6, 0.03, 198, "char_f1")}
    assert "was not scored on jemhopqa" in place(Point("mine", "r", "base", facts, one), a_law(), ["niilc", "jemhopqa"], {}).sentence
    both = one | {"jemhopqa": Score(0.4, 0.04, 120, "char_f1")}
    placed = place(Point("mine", "r", "base", facts, both), a_law(), ["niilc", "jemhopqa"], {})
    assert placed.value == pytest.approx(50) and placed.stderr == pytest.approx(2.5)


def test_a_score_by_another_metric_is_another_scale():
    facts = ModelFacts("mine", parameters=8e9, active_parameters=8e9, tokens_total=1e12, tokens_ja=1e11)
    placed = place(Point("mine", "r", "base", facts, {"niilc": Score(0.3, 0.03, 127, "exact_match")}), a_law(), ["niilc"], {})
    assert placed.value is None and "exact_match" in placed.sentence and "char_f1" in placed.sentence


def test_far_outside_the_published_budgets_nothing_is_read_into_a_residual():
    facts = ModelFacts("tiny", parameters=6e6, active_parameters=6e6, tokens_total=1e7, tokens_ja=1e7)
    placed = place(Point("tiny", "r", "base", facts, {"niilc": Score(0.01, 0.01, 198, "char_f1")}), a_law(), ["niilc"], {})
    assert placed.extrapolated and "read nothing into this" in placed.sentence


def test_a_model_that_saw_no_japanese_has_no_japanese_budget_to_place():
    facts = ModelFacts("en", parameters=1e9, active_parameters=1e9, tokens_total=1e12, tokens_en=1e12, tokens_ja=0.0)
    placed = place(Point("en", "r", "base", facts), a_law(), ["niilc"], {})
    assert placed.log_budget is None and "no logarithm" in placed.sentence


def test_the_law_of_one_file_takes_the_score_of_its_metric_and_most_items(tmp_path):
    a_run(tmp_path, "llama-3-swallow-8b", scores={"base": [("niilc", "exact_match", 0.4), ("niilc", "char_f1", 0.58), ("shop", "nll", 1.2)]})
    (base, *_), _, _ = read_points(tmp_path, load_models(), BUNDLED)
    assert base.scores["niilc"] == Score(0.58, 0.02, 198, "char_f1") and "shop" not in base.scores


@needs_scores
def test_kept_items_make_the_difference_a_paired_one(tmp_path, monkeypatch):
    """Two models that differ on 6 of 198 items: paired, the loss is sure; from the two scores' errors alone it is not."""
    monkeypatch.setenv("TSUGIKI_DATA", str(SHARED))
    name, scores = "llama-3-swallow-8b", {}
    rng = np.random.default_rng(0)
    right = (rng.random(198) < 0.58).astype(float)
    lost = np.where(right)[0][:8]
    for model, values in (("base", right), ("adapted", right), ("Q4_K_M", np.where(np.isin(np.arange(198), lost), 0.0, right))):
        scores[model] = [("niilc", "char_f1", float(values.mean()))]
        folder = tmp_path / "benchmarks" / f"shop__{name}__{model}"
        folder.mkdir(parents=True)
        rows = [{"id": str(i), "document": str(i), "score": float(v)} for i, v in enumerate(values)]
        (folder / "items-tsugiki_saito_niilc.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    a_run(tmp_path, name, scores=scores, task="tsugiki_saito_niilc")
    reference = published(load_models())
    points, _, _ = read_points(tmp_path, reference.models, BUNDLED)
    laws = {"niilc_ja": a_law(middle=60)}
    question = next(q for q in QUESTIONS["saito"] if q.key == "niilc_ja")
    paired = {r["point"]: r for r in own_equivalence(points, [question], laws)}[f"shop/{name} Q4_K_M"]
    assert paired["paired"] and paired["difference"] == pytest.approx(-100 * 8 / 198)
    assert paired["difference_high"] < 0
    loose = [dataclasses.replace(p, items={}) for p in points]
    unpaired = {r["point"]: r for r in own_equivalence(loose, [question], laws)}[f"shop/{name} Q4_K_M"]
    assert not unpaired["paired"]
    width = [r["difference_high"] - r["difference_low"] for r in (paired, unpaired)]
    assert width[0] < width[1]
    (tmp_path / "benchmarks" / f"shop__{name}__Q4_K_M" / "items-tsugiki_saito_niilc.jsonl").write_text(
        '{"id": "0", "document": "0", "score": 1.0}\n', encoding="utf-8"
    )  # of another run, with --limit
    again = {r["point"]: r for r in own_equivalence(points, [question], laws)}[f"shop/{name} Q4_K_M"]
    assert not again["paired"] and again["difference"] == pytest.approx(unpaired["difference"])


def test_the_users_languages_stand_beside_the_published_ones(tmp_path):
    found = {"model": "base-F16.gguf", "done": 64, "sequences": 100, "tokens": 200,
             "languages": [{"language": "ja", "sequences": 0.75}, {"language": "en", "sequences": 0.125}, {"language": "ko", "sequences": 0.0625},
                           {"language": "und", "sequences": 0.0625}]}  # fmt: skip
    (tmp_path / "shop" / "tiny-llama" / "languages").mkdir(parents=True)
    (tmp_path / "shop" / "tiny-llama" / "languages" / "languages.json").write_text(json.dumps(found), encoding="utf-8")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "languages.json").write_text("{", encoding="utf-8")
    rows, notes = read_languages(tmp_path)
    assert [r["model"] for r in rows] == ["shop/tiny-llama/languages"] and rows[0]["source"] == "64 of 100 sequences of 200 tokens"
    assert len(notes) == 1 and notes[0].startswith("torn/languages.json cannot be read")
    table = analyse(printed_reference(load_models()), languages=rows)["languages"]
    mine = table[-1]
    assert mine["shares"].keys() == table[0]["shares"].keys()
    assert mine["shares"]["ja"] == 75 and mine["shares"]["de"] == 0 and mine["shares"]["others"] == 12.5
    assert sum(mine["shares"].values()) == pytest.approx(100)


@needs_scores
def test_levels_and_adapters_are_worth_a_factor_of_the_budget_by_the_published_law(tmp_path, monkeypatch):
    monkeypatch.setenv("TSUGIKI_DATA", str(SHARED))
    a_run(tmp_path, "llama-3-swallow-8b", scores={
        "base": [("niilc", "char_f1", 0.58)], "adapted": [("niilc", "char_f1", 0.56)], "Q4_K_M": [("niilc", "char_f1", 0.53)],
    })  # fmt: skip
    reference = published(load_models())
    points, table, _ = read_points(tmp_path, reference.models, BUNDLED)
    result = analyse(reference, points, table)
    law = next(row for row in result["laws"] if row["key"] == "niilc_ja")
    # Saito et al., Figure 7 and Table 1, as computed from their scores: 10.2491 points a decade, r 0.8602
    assert law["slope"]["value"] == pytest.approx(10.2491, abs=5e-5) and law["pearson"]["value"] == pytest.approx(0.8602, abs=5e-5)
    by = {row["point"]: row for row in result["own_equivalence"] if row["key"] == "niilc_ja"}
    assert by["shop/llama-3-swallow-8b Q4_K_M"]["factor"] == pytest.approx(10 ** (-3 / 10.2491), rel=1e-4)
    assert by["shop/llama-3-swallow-8b adapted"]["factor"] == pytest.approx(10 ** (-2 / 10.2491), rel=1e-4)
    placed = [q for p in result["yours"] for q in p["placements"] if q["key"] == "niilc_ja"]
    assert [q["value"] for q in placed] == pytest.approx([58, 56, 53]) and not any(q["extrapolated"] for q in placed)
    assert result["components"]["scratch"]["printed_cells"] == [76, 76]  # their Figure 8
    assert json.dumps(result, allow_nan=False)
    # their appendix C.2 prints 0.923 and, by a slip, 0.779; their scores give 0.8025
    scratch = {(r["component"], r["axis"]): (r["n"], r["pearson"]) for r in result["components"]["budgets"] if r["models"] == "scratch"}
    assert scratch["PC1", "en"] == (16, pytest.approx(0.9228, abs=5e-5)) and scratch["PC2", "ja"] == (10, pytest.approx(0.8025, abs=5e-5))
    draw_all(result, tmp_path / "figures", language="en", formats=("svg",))
    assert all((tmp_path / "figures" / f"{name}.svg").stat().st_size > 5000 for name in ("efficiency", "equivalence"))
    rows = tables(result)
    assert {row["point"] for row in rows["own_equivalence"]} == {f"shop/llama-3-swallow-8b {k}" for k in ("adapted", "Q4_K_M")}
    assert {row["law"] for row in rows["law_bands"]} == {law["key"] for law in result["laws"] if "band" in law}
    assert len(rows["factors"]) == 10 * 19 and len(rows["factor_scores"]) == 35
    page = render(result)
    # PC3 and PC4 are below noise by Horn's analysis (facts: 1.32 against 2.14), PC1 and PC2 above it and stable
    assert "Do not name PC3" in page and "Do not name PC4" in page and "Do not name PC1" not in page
    unstable = copy.deepcopy(result)
    unstable["components"]["lowest_congruence"][1] = 0.5
    assert "PC2には名前を付けられません：" in render(unstable)


def test_without_the_matrix_the_printed_table_is_analysed_and_said_to_be_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    reference = published(load_models())
    assert reference.kind == "takase" and len(reference.scores.models) == 9 and "not found" in reference.source
    result = analyse(reference)
    slopes = {row["key"]: (row["n"], row["slope"]["value"]) for row in result["laws"]}
    # ordinary least squares on Takase & Honda's Table 2, ELYZA left out (its tokens are not known)
    assert slopes["culture_ja"] == (8, pytest.approx(30.5, abs=0.05)) and slopes["neutral_total"] == (8, pytest.approx(15.8, abs=0.05))
    assert all("refused" in row for row in result["efficiency"]) and result["yours"] == []


def test_a_matrix_of_ones_own_with_holes_and_strangers_is_analysed_and_both_are_told(tmp_path):
    models = [m.name for m in load_models().values() if m.table_set == "saito_table1" and m.tokens_ja][:14]
    rng = np.random.default_rng(3)
    skill = rng.normal(0, 1, len(models) + 1)
    lines = ["model,quiz,sums,essay,facts"]
    for i, name in enumerate([*models, "Somebody's 7B"]):
        cells = [f"{0.5 + 0.1 * skill[i] + 0.03 * e:.4f}" for e in rng.normal(0, 1, 4)]
        lines.append(",".join([f'"{name}"', *(cells if i != 2 else [cells[0], "", *cells[2:]])]))
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reference = own(path, load_models())
    result = analyse(reference)
    assert reference.kind == "yours" and len(result["models"]) == 15
    assert any("Somebody's 7B" in note and "--models" in note for note in result["notes"])
    assert any("1 of 60 scores are missing" in note for note in result["notes"])
    # only sums has a hole: its laws are fitted again on fillings, and the notes (page, terminal) say what that did
    assert [(row["key"], row["missing"]) for row in result["missing"]] == [("sums_ja", pytest.approx(1 / 60)), ("sums_total", pytest.approx(1 / 60))]
    assert any("sums ~ ja" in note and "filled 20 times" in note and "Hiding as many again" in note for note in result["notes"])
    assert not any("quiz ~ ja" in note for note in result["notes"])
    assert {row["name"] for row in result["laws"]} >= {"quiz", "sums", "essay", "facts", "PC1"}
    assert result["missing"] and json.dumps(result, allow_nan=False)


@needs_scores
def test_a_stranger_in_the_matrix_takes_the_sensitivity_curve_from_nobody(tmp_path):
    """Saito et al.'s matrix and one unknown model: the five assumed shares, with the numbers of the 35 alone."""
    text = (SHARED / "scores" / "scores_35.csv").read_text(encoding="utf-8").splitlines()
    at = text[0].split(",").index("jcom")
    header = ["model", *text[0].split(",")[at : at + 19]]
    path = tmp_path / "mine.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(header)
        scores = load_scores(SHARED / "scores" / "scores_35.csv")
        assert scores.tasks == header[1:]
        rows.writerows([[m, *v] for m, v in zip(scores.models, scores.values, strict=True)])
        rows.writerow(["Somebody's 7B", *[0.5] * 19])
    reference = own(path, load_models())
    facts = {name: find_model(name, reference.models) for name in reference.scores.models}
    x = {"ja": np.array([budget(f, reference.models, "ja").log10 if f else np.nan for f in facts.values()])}
    families = [f.family if f else name for name, f in facts.items()]
    (row,) = _efficiency(reference.scores, QUESTIONS["saito"][:1], None, facts, families, reference.models, x)
    assert [p["share"] for p in row["sensitivity"]] == [0.0005, 0.001, 0.005, 0.01, 0.018]
    assert row["n"] == 25 and row["sensitivity"][1]["offset"] == pytest.approx(1.2, abs=0.05)


def test_a_model_under_two_spellings_is_refused_with_both_rows(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("model,a,b\nSwallow 7B,0.1,0.2\nMine,0.3,0.4\ntokyotech-llm/Swallow-7b-hf,0.1,0.3\nmine,0.2,0.2\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        analyse(own(path, load_models()))
    assert "'Swallow 7B' and 'tokyotech-llm/Swallow-7b-hf' are the same model" in str(error.value)
    assert "'Mine' and 'mine'" in str(error.value)


def test_budget_explains_bundled_and_published_models_and_names_near_ones():
    said = CliRunner().invoke(app, ["evaluate", "budget", "tiny-llama", "Swallow 7B"])
    assert said.exit_code == 0 and "training.json of tiny-llama" in said.output and "102 B in Japanese" in said.output
    wrong = CliRunner().invoke(app, ["evaluate", "budget", "Swalow 7B"])
    assert isinstance(wrong.exception, UserError) and "Did you mean" in str(wrong.exception)


def test_a_points_budget_can_be_explained(tmp_path):
    a_run(tmp_path, "tiny-llama")
    (_, adapted, _), table, _ = read_points(tmp_path, load_models(), BUNDLED)
    said = explain(adapted.facts, table)
    assert "adapter on tiny-llama" in said and "added in Japanese" in said


def test_the_printed_table_has_takase_and_hondas_budgets():
    reference = printed_reference(load_models())
    # their Table 3 gives Llama 3.1 1.8 % Japanese: 270 B of 15 T
    assert budget("Llama-3.1-8B-Instruct", reference.models, "ja", reference.rule).tokens == pytest.approx(270e9)


@pytest.mark.parametrize("paper, expected", [("saito", 0.25), ("takase", 0.5)])
def test_a_task_that_both_papers_define_is_read_by_the_laws_own_definition(tmp_path, paper, expected):
    a_run(tmp_path, "tiny-llama")
    for name, metric, value in (("tsugiki_takase_mgsm_ja", "exact_match", 0.5), ("tsugiki_saito_mgsm_ja", "acc", 0.25)):
        replace_results(
            tmp_path / "results.sqlite", "shop/tiny-llama", f"benchmark {name}",
            [Result("shop/tiny-llama/base", "tiny-llama", "mgsm_ja", metric, value, n=250, settings={"task": name})],
        )
    (base, *_), _, _ = read_points(tmp_path, load_models(), BUNDLED, paper)
    assert base.scores["mgsm_ja"].value == expected
