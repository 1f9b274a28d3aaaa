"""Score matrices, model facts and budgets: read strictly, explained, and equal to the two papers' figures."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate.scaling import tables
from tsugiki.evaluate.scaling.budgets import (
    PRINTED,
    SAITO,
    Convention,
    adapted,
    assumed_base_share,
    budget,
    budgets,
    convention,
    explain,
    from_folder,
    named,
    quantized,
    takase,
)
from tsugiki.evaluate.scaling.tables import DATA, TASKS, ModelFacts, Scores, fetch_scores, load_models, load_scores

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("TSUGIKI_DATA", ROOT.parent / "shared/data"))
SCORES_35 = SHARED / "scores/scores_35.csv"
needs_scores = pytest.mark.skipif(not SCORES_35.exists(), reason="the public score matrix is not here")
MODELS = load_models()
PAPER_B = [m.name for m in MODELS.values() if m.table_set == "saito_table1"]
PAPER_A = [m.name for m in MODELS.values() if m.table_set == "takase_table2"]


def csv_file(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "scores.csv"
    path.write_bytes(text.encode(encoding))
    return path


def table(name: str) -> list[dict[str, str]]:
    return [row for _, row in tables.read_table(DATA / f"{name}.csv")[1]]


# --- the shipped tables --------------------------------------------------------------------------------------------


def test_the_shipped_table_has_both_papers_models_with_the_counts_of_known_budgets():
    facts = [MODELS[name] for name in PAPER_B]
    assert (len(PAPER_B), len(PAPER_A), len(MODELS)) == (35, 9, 63)
    known = [sum(m.tokens(language) is not None for m in facts) for language in ("total", "en", "ja")]
    assert known == [27, 27, 25]
    assert [sum(m.construction == c for m in facts) for c in ("PT", "CPT")] == [20, 15]


def test_every_figure_says_whether_it_is_reported_derived_or_assumed_and_where():
    for m in MODELS.values():
        for name in ("parameters", "active_parameters", "tokens_total", "tokens_en", "tokens_ja"):
            if getattr(m, name) is not None and (name != "active_parameters" or name in m.sources):
                kind, where = m.sources[name]
                assert kind in tables.KINDS and where, (m.name, name)


def test_a_continued_model_without_a_family_is_of_its_source_models(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text(
        "model,source_model\nOurs,Swallow 7B\nOurs 2,Ours\nTwin a,Unknown base\nTwin b,Unknown base\nScratch,\n", encoding="utf-8"
    )
    found = {m.name: m.family for m in load_models(path).values()}
    assert found == {"Ours": "Llama 2", "Ours 2": "Llama 2", "Twin a": "Unknown base", "Twin b": "Unknown base", "Scratch": "Scratch"}


def test_a_mixture_has_its_active_parameters_and_an_unknown_active_count_stays_unknown():
    assert MODELS["Mixtral-8x7B-v0.1"].active_parameters == 12.879e9
    assert MODELS["Mixtral-8x7B-v0.1"].parameters == 47e9
    assert MODELS["LLM-jp-4 32B-A3B"].active_parameters is None


def test_paper_a_table_1_means_and_table_3_sums():
    for row in table("takase_table1_mgsm"):
        values = [float(v) for k, v in row.items() if k not in ("model", "mean")]
        assert round(np.mean(values), 1) == float(row["mean"])
    for row in table("takase_table3_langdist"):
        assert 99.85 < sum(float(v) for k, v in row.items() if k != "model") < 100.05


# --- score matrices ------------------------------------------------------------------------------------------------


@needs_scores
def test_the_public_matrix_is_35_by_19_and_every_model_is_in_the_shipped_table():
    scores = load_scores(SCORES_35)
    assert scores.values.shape == (35, 19) and not np.isnan(scores.values).any()
    assert scores.models == PAPER_B and scores.tasks == list(TASKS)


@needs_scores
def test_the_deviation_that_the_text_gives_to_mgsm_is_that_of_gsm8k():
    """Saito et al. write 0.246 for MGSM."""
    scores = load_scores(SCORES_35)
    assert scores.column("mgsm_ja").std(ddof=1) == pytest.approx(0.2006, abs=5e-5)
    assert scores.column("gsm8k").std(ddof=1) == pytest.approx(0.2459, abs=5e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda tasks: st.lists(
            st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=tasks, max_size=tasks).filter(
                lambda row: any(cell is not None for cell in row)
            ),
            min_size=1,
            max_size=8,
        )
    )
)
def test_what_was_written_is_read_back_bit_for_bit(tmp_path_factory, cells):
    names = [f"模型 {i}, \"v{i}\"" for i in range(len(cells))]
    lines = ["model,note," + ",".join(f"t{j}" for j in range(len(cells[0])))]
    for name, row in zip(names, cells, strict=True):
        quoted = '"' + name.replace('"', '""') + '"'
        lines.append(f'{quoted},"a, note",' + ",".join("" if c is None else repr(c) for c in row))
    path = csv_file(tmp_path_factory.mktemp("s"), "\ufeff" + "\r\n".join(lines))
    scores = load_scores(path)
    expected = np.array([[np.nan if c is None else c for c in row] for row in cells])
    assert scores.models == names
    np.testing.assert_array_equal(scores.values, expected)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("model,jcom\na,0.5\nb,1.5e3\n", ["scores.csv:3 (b): jcom is 1500, outside 0–1"]),
        ("model,jcom\na,-0.1\n", ["scores.csv:2 (a): jcom is -0.1, outside 0–1"]),
        ("model,jcom,mgsm\na,62.5,0.4\nb,71,0.3\n", ["(a): jcom is 62.5, which looks like percent", "jcom in percent, mgsm in fractions"]),
        ("model,jcom\na,62.5\nb,0.7\n", ["line 3 (b) has 0.7: mixed scales (1 of 2 cells above 1)"]),
        ("model,jcom\na,0.5\nb,0.4\na,0.6\n", ["scores.csv:4 (a): the model occurs already in line 2"]),
        ("model,jcom,jcom\na,0.5,0.5\n", ["column 'jcom' occurs 2 times"]),
        ("model,licence,jcom\na,MIT,0.5\n", ["scores.csv:2 (a): column 'licence' holds 'MIT'", "unknown text columns"]),
        ("model,jcom\na,0.5,0.6\n", ["scores.csv:2 (a): 3 cells, but the header has 2"]),
        ("model,jcom\na,inf\n", ["'inf', which is no score"]),
        ("model,jcom\na,0.5\n,0.4\n", ["scores.csv:3 (no model name): the model has no name"]),
        ("model,jcom\na,0.5\nb,–\n", ["scores.csv:3 (b): the row has no score at all"]),
        ("model,note\na,x\n", ["no task column"]),
        ("model,jcom\n", ["no model row"]),
        ("name,jcom\na,0.5\n", ["there is no column 'model'"]),
        ("", ["the file is empty"]),
    ],
)  # fmt: skip
def test_a_bad_matrix_is_refused_with_a_sentence_naming_the_row(tmp_path, text, sentences):
    with pytest.raises(UserError) as error:
        load_scores(csv_file(tmp_path, text))
    for sentence in sentences:
        assert sentence in str(error.value)


def test_all_problems_of_a_file_are_told_at_once(tmp_path):
    text = "model,jcom,mgsm\na,0.5,7000\na,-1,0.5\nc,x,0.5\n"
    with pytest.raises(UserError) as error:
        load_scores(csv_file(tmp_path, text))
    for part in ("mgsm is 7000", "jcom is -1", "occurs already", "'x', which is no score"):
        assert part in str(error.value)


def test_a_file_in_another_encoding_or_absent_is_told_so(tmp_path):
    with pytest.raises(UserError, match="not UTF-8"):
        load_scores(csv_file(tmp_path, "model,jcom\n日本語,0.5\n", encoding="cp932"))
    with pytest.raises(UserError, match="no such file"):
        load_scores(tmp_path / "absent.csv")


def test_selecting_keeps_the_order_asked_for_and_refuses_unknown_names():
    scores = Scores(["a", "b", "c"], ["x", "y"], np.arange(6).reshape(3, 2) / 10)
    chosen = scores.select(models=["c", "a"], tasks=["y"])
    assert chosen.models == ["c", "a"] and chosen.tasks == ["y"]
    np.testing.assert_array_equal(chosen.values, [[0.5], [0.1]])
    np.testing.assert_array_equal(scores.column("x"), [0, 0.2, 0.4])
    with pytest.raises(UserError, match="unknown task 'z'"):
        scores.select(tasks=["z"])
    with pytest.raises(UserError, match="model 'a' occurs 2 times"):
        Scores(["a", "a"], ["x"], np.zeros((2, 1)))
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0, 0] = 1


# --- the public matrix over the network ------------------------------------------------------------------------------


def public_file() -> bytes:
    """A file of the public one's form: for each model a base row, sometimes an inst row of the same name first."""
    random = np.random.default_rng(0)
    rows = []
    for i, name in enumerate(PAPER_B):
        base = {key: round(float(v), 4) for key, v in zip(TASKS.values(), random.random(19), strict=True)}
        if i % 5 == 0:
            rows.append({"Type": "inst", "Model": MODELS[name].hf_id, "Coding": 0.5, **dict.fromkeys(TASKS.values(), 0.9)})
        rows.append({"Type": "base", "Model": MODELS[name].hf_id, "Coding": float("nan"), **base})
    return ("const dataSet = " + json.dumps(rows, indent=2, ensure_ascii=False) + ";\n").encode()


@contextmanager
def serving(content: bytes | None):
    """A server on the loopback that has ``content`` at the pinned address (None: nothing); yields its log."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if content is not None else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_matrix_is_downloaded_once_at_its_pinned_commit_and_only_base_rows_are_read(tmp_path):
    content = public_file()
    sha = hashlib.sha256(content).hexdigest()
    with serving(content) as (endpoint, asked):
        first = fetch_scores(tmp_path, endpoint, sha)
        again = fetch_scores(tmp_path, endpoint, sha)
    assert asked == [f"/swallow-llm/evaluation/{tables.COMMIT}/assets/data.js"]
    assert first.models == PAPER_B and first.tasks == list(TASKS)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.values[0], np.random.default_rng(0).random(19).round(4))


def test_bytes_with_another_checksum_are_refused_and_not_kept(tmp_path):
    with serving(public_file()) as (endpoint, _), pytest.raises(UserError, match="SHA-256"):
        fetch_scores(tmp_path, endpoint)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_copy_is_downloaded_again(tmp_path):
    content = public_file()
    sha = hashlib.sha256(content).hexdigest()
    with serving(content) as (endpoint, asked):
        whole = fetch_scores(tmp_path, endpoint, sha)
        (kept,) = tmp_path.iterdir()
        kept.write_bytes(content[:500])
        np.testing.assert_array_equal(fetch_scores(tmp_path, endpoint, sha).values, whole.values)
    assert len(asked) == 2


def test_without_a_network_the_way_out_is_told(tmp_path):
    with serving(None) as (endpoint, _), pytest.raises(UserError, match=r"404.*\n.*--scores FILE"):
        fetch_scores(tmp_path, endpoint)
    with pytest.raises(UserError, match="cannot download the score matrix"):
        fetch_scores(tmp_path, endpoint)  # the server is gone
    with pytest.raises(UserError, match="must be https"):
        fetch_scores(tmp_path, "file:///etc")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<html>moved</html>", "does not begin with 'const dataSet ='"),
        ("const dataSet = [{];", "not the public score file"),
        ("const dataSet = [];", "01-ai/Yi-1.5-6B: no row of type 'base'"),
        ('const dataSet = [{"Type": "base", "Model": "01-ai/Yi-1.5-6B", "JCom": 0.5}];', "no score 'NIILC'"),
    ],
)
def test_a_public_file_of_another_form_is_refused(text, sentence):
    with pytest.raises(UserError) as error:
        tables.parse_public_scores(text)
    assert sentence in str(error.value)


# --- tables of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "row", "sentence"),
    [
        ("tokens_total_b,tokens_en_b,tokens_ja_b", "100,80,30", "tokens: English 80 B + Japanese 30 B > total 100 B"),
        ("tokens_total_b,tokens_ja_b", "100,130", "tokens: Japanese 130 B > total 100 B"),
        ("params_b,active_params_b", "8,13", "active parameters 13 B > all parameters 8 B"),
        ("params_b", "-8", "params_b is -8, below 0"),
        ("params_b", "8B", "params_b is '8B', not a number"),
        ("construction", "SFT", "construction is 'SFT', not one of PT, CPT"),
        ("construction", "CPT", "construction is CPT, but no source_model is named"),
        ("construction,source_model", "PT,Llama 2 7B", "construction is PT (from scratch), but source_model"),
        ("tokens_total_b,kind_total", "100,guess", "kind_total is 'guess'"),
        ("added_ja_share", "70", "added_ja_share is 70, outside 0–1"),
        ("source_model", "m", "its source models form a circle through m"),
    ],
)
def test_a_contradictory_row_is_refused_by_its_line_and_name(tmp_path, header, row, sentence):
    path = csv_file(tmp_path, f"model,{header}\nm,{row}\n")
    with pytest.raises(UserError) as error:
        load_models(path)
    assert f"scores.csv:2 (m): {sentence}" in str(error.value)


def test_a_continued_model_cannot_have_seen_less_than_its_base(tmp_path):
    path = csv_file(tmp_path, "model,source_model,tokens_total_b\nbase,,100\nchild,Base,90\n")
    with pytest.raises(UserError, match=r"scores.csv:3 \(child\): total tokens 90 B < those of its source model base, 100 B"):
        load_models(path)


def test_unknown_columns_and_models_given_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown column 'licence'"):
        load_models(csv_file(tmp_path, "model,licence\nm,MIT\n"))
    with pytest.raises(UserError, match=r"scores.csv:3 \(m\): the model occurs already in line 2"):
        load_models(csv_file(tmp_path, "model,params_b\nm,1\nm,2\n"))


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["total", "en", "ja"])
def test_paper_bs_stated_shares_give_every_budget_it_prints(language):
    np.testing.assert_allclose(budgets(PAPER_B, MODELS, language, SAITO), budgets(PAPER_B, MODELS, language), rtol=1e-12)


def test_paper_as_shares_give_its_japanese_tokens():
    # N / D / D_ja in billions as facts recomputed them from Tables 2 and 3; ELYZA's continued tokens are unknown
    expected = {
        "Llama-3.1-8B-Instruct": (8, 15000, 270), "Llama-3.1-Swallow-8B-Instruct-v0.5": (8, 15210, 480),
        "Qwen2.5-32B": (32.8, 18000, 144), "Qwen2.5-32B-Instruct": (32.8, 18000, 144),
        "Qwen2.5-bakeneko-32B-Instruct": (32.8, 18018, 162), "ABEJA-Qwen2.5-32b-Japanese-v1.0": (32.8, 18100, 214),
        "Sarashina2.2-3B-Instruct-v0.1": (3.4, 10000, 2130), "LLM-jp-3.1-13B-Instruct4": (13, 2500, 910),
        "ELYZA-Shortcut-1.0-Qwen-32B": (32.8, None, None),
    }  # fmt: skip
    assert set(expected) == set(PAPER_A)
    for name, (n, total, ja) in expected.items():
        got = budget(name, MODELS, "total", takase()), budget(name, MODELS, "ja", takase())
        assert got[0].parameters == pytest.approx(n * 1e9)
        for b, tokens in zip(got, (total, ja), strict=True):
            assert (b.tokens is None and b.value is None) if tokens is None else b.tokens == pytest.approx(tokens * 1e9)


def test_paper_as_regressions_come_out_of_its_table_2_and_these_budgets():
    rows = {r["model"]: r for r in table("takase_table2_scores")}
    names = [n for n in PAPER_A if "ELYZA" not in n]
    culture = [np.mean([float(rows[n][k]) for k in ("niilcqa", "jmmlu_part", "jaqket")]) for n in names]
    neutral = [np.mean([float(rows[n][k]) for k in ("mgsm_ja", "mmlu_prox_ja")]) for n in names]
    slopes = [
        round(float(np.polyfit(np.log10(budgets(names, MODELS, language, takase())), y, 1)[0]), 1)
        for y in (neutral, culture)
        for language in ("total", "ja")
    ]
    assert slopes == [15.8, 0.0, -5.8, 30.5]


@needs_scores
@pytest.mark.parametrize(("share", "r"), [(0.0005, 0.85), (0.001, 0.86), (0.005, 0.85), (0.01, 0.81), (0.018, 0.74)])
def test_the_assumed_japanese_share_of_llama_moves_the_correlation_with_niilc(share, r):
    x = np.log10(budgets(PAPER_B, MODELS, "ja", assumed_base_share(share)))
    known = ~np.isnan(x)
    niilc = load_scores(SCORES_35).column("niilc")
    assert known.sum() == 25
    assert round(np.corrcoef(x[known], niilc[known])[0, 1], 2) == r


def test_a_budget_is_n_times_d_with_active_parameters_and_six_flops_each():
    b = budget("Llama 2 7B", MODELS, "ja")
    assert (b.value, b.flops, b.log10) == (7e9 * 2e9, 6 * 7e9 * 2e9, pytest.approx(19.14613, abs=1e-5))
    assert budget("Swallow-MX 8x7B v0.1", MODELS, "ja").value == 12.879e9 * 100e9
    assert budget("meta-llama/llama-2-7B-HF", MODELS, "ja") == b


def test_an_unknown_budget_is_none_and_its_explanation_says_why():
    b = budget("Mistral-7B-v0.1", MODELS, "ja")
    assert (b.value, b.flops, b.kind) == (None, None, "unknown") and np.isnan(b.log10)
    assert "Mistral-7B-v0.1: tokens in Japanese are not known" in b.explanation
    assert np.isnan(budgets(["Mistral-7B-v0.1"], MODELS, "ja")).all()


def test_a_continued_model_adds_its_tokens_to_its_bases(tmp_path):
    path = csv_file(
        tmp_path, "model,source_model,params_b,tokens_total_b,tokens_ja_b,added_total_b,added_ja_b\n"
        "base,,2,100,5,,\nchild,base,2,,,20,15\ngrandchild,Child,2,,,1,1\n",
    )  # fmt: skip
    models = load_models(path)
    assert budget("grandchild", models, "total").tokens == 121e9
    assert budget("grandchild", models, "ja").value == 2e9 * 21e9
    assert "child: 15 B added in Japanese" in budget("grandchild", models, "ja").explanation
    assert budget("grandchild", models, "en").value is None


def test_an_adapter_adds_its_own_tokens_by_language_and_a_quantized_file_none():
    base = MODELS["Llama 3 8B"]
    domain = adapted(base, "with setsubi", {"ja": 3e5, "und": 1e3}, passes=2.5)
    small = quantized(domain, "with setsubi Q4_K_M", 4_920_000_000)
    models = {**MODELS, domain.name: domain, small.name: small}
    for m in (domain, small):
        assert budget(m, models, "total").tokens == 15000e9 + 2.5 * 301e3
        assert budget(m, models, "ja").tokens == 15e9 + 2.5 * 3e5
        assert budget(m, models, "en").tokens == 14250e9
        assert budget(m, models, "ja").kind == "assumed"
    assert budget(domain, models, "ja", assumed_base_share(0.018)).tokens == pytest.approx(270e9 + 7.5e5, rel=1e-12)
    assert "file: 4,920,000,000 bytes" in explain(small, models)
    with pytest.raises(UserError, match="ja: nan tokens"):
        adapted(base, "bad", {"ja": float("nan")})


def test_the_share_of_continued_tokens_changes_only_what_nobody_says():
    half = Convention("half", added_ja=0.5)
    assert budget("Swallow 7B", MODELS, "ja", half).tokens == 2e9 + 50e9
    assert budget("RakutenAI-7B", MODELS, "ja", half).tokens == 87.5e9  # its base counts as 0 % in paper B
    abeja = Convention("half", takase().shares, 0.5)
    assert budget("ABEJA-Qwen2.5-32b-Japanese-v1.0", MODELS, "ja", abeja).tokens == pytest.approx(214e9)
    assert budget("Qwen2.5-bakeneko-32B-Instruct", MODELS, "ja", abeja).tokens == pytest.approx(153e9)


def test_a_share_that_contradicts_the_rest_is_refused_by_name():
    with pytest.raises(UserError, match=r"Llama 3 8B: tokens: English 14250 B \+ Japanese 900 B > total 15000 B"):
        budget("Llama 3 8B", MODELS, "ja", assumed_base_share(0.06))
    with pytest.raises(UserError, match=r"Llama 2: ja share 1.8 is not between 0 and 1"):
        assumed_base_share(1.8)
    with pytest.raises(UserError, match="no convention 'kaplan'"):
        convention("kaplan")


def test_models_made_from_each_other_in_a_circle_are_refused():
    ring = {n: ModelFacts(n, construction="CPT", source_model=s, added={"total": 1.0}) for n, s in ("ab", "ba")}
    with pytest.raises(UserError, match="circle"):
        budget("a", ring)


def test_an_unknown_name_is_told_with_the_names_most_like_it():
    with pytest.raises(UserError, match="Did you mean Llama 3 8B"):
        named("Llama 3 8 B!", MODELS)
    with pytest.raises(UserError, match=r"2 problem\(s\)\n.*foo\n.*bar"):
        budgets(["Llama 3 8B", "foo", "bar"], MODELS)
    with pytest.raises(UserError, match="no budget for language 'de'"):
        budget("Llama 3 8B", MODELS, "de")


def test_the_explanation_names_every_step_its_kind_and_its_note():
    text = explain("Youri 7B", MODELS)
    assert "continued from Llama2 7B" in text
    assert "= 2 B of Llama 2 7B + 40 B" in text and "(assumed: Saito et al. A.3" in text
    assert "note: EN 1834 and JA 42 both contain the same 40B" in text
    assert "0.018 × 15,000 B (Takase & Honda's share for Llama 3)" in explain("Llama 3 8B", MODELS, convention("takase"))
    assert all(explain(name, MODELS, rule) for name in MODELS for rule in (PRINTED, SAITO, takase()))


def test_a_bundled_bases_budget_is_exact(tmp_path):
    folder = ROOT / "recipes/bases/tiny-llama"
    record = json.loads((folder / "training.json").read_text())
    b = budget(str(folder), MODELS, "ja")
    assert b.value == record["parameters"] * record["tokens"]["ja"] and b.kind == "reported"
    with pytest.raises(UserError, match=r"no training\.json"):
        from_folder(tmp_path)
    (tmp_path / "training.json").write_text('{"tokens": {"ja": 3}}')
    with pytest.raises(UserError, match="not a record of a training"):
        from_folder(tmp_path)
