"""A judge's ratings of a run's answers reach its results table, summary and report, with all that says what they are worth."""

from __future__ import annotations

import json
import re
import runpy
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tsugiki.artifacts import read_json, write_json
from tsugiki.recipes.judged import keep_judged
from tsugiki.recipes.report import write_report
from tsugiki.recipes.summary import build_summary, validate_summary
from tsugiki.results import read_results

write_run = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))["write_run"]
SAID = {"base": "[[0]]", "adapted": "[[3]]"}


@contextmanager
def judge():
    """An OpenAI-compatible server: 0 for answers of the base, 3 for the adapted model's, nothing to read for every fifth item."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model, number = re.search(r"(base|adapted) の答え (\d+)", request["messages"][-1]["content"]).groups()
            text = "どちらとも" if int(number) % 5 == 4 else SAID[model]
            body = json.dumps({
                "id": "x", "object": "chat.completion", "created": 0, "model": request["model"],
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def write_answers(run: Path, model: str, extra: str = "") -> None:
    rows = [{"id": f"q{i}", "document": f"d{i}", "question": f"問い{i}", "reference": f"油{i}", "answer": f"{model} の答え {i}{extra}"} for i in range(20)]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (run / "evaluate" / f"answers-{model}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def judged(console, tmp_path) -> Path:
    run = write_run(tmp_path / "runs")
    for model in SAID:
        write_answers(run, model)
    build_summary(run)
    write_report(run)
    with judge() as url:
        code, out, err = console("evaluate", "judge", run, "--endpoint", url, "--model", "judge-8b")
    assert code == 0, err
    assert "report.html" in " ".join(out.split())
    return run


def section(run: Path) -> str:
    page = (run / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<section id="judge">.*?</section>', page, re.S)
    return found.group(0) if found else ""


def test_ratings_stand_in_the_results_table_with_judge_and_rubric(judged):
    rows = {r["model"]: r for r in read_results(judged.parents[1] / "results.sqlite") if r["stage"] == "judge domain"}
    assert {m: (r["value"], r["n"]) for m, r in rows.items()} == {"setsubi/tiny-llama/base": (0.0, 16), "setsubi/tiny-llama/adapted": (3.0, 16)}
    said = rows["setsubi/tiny-llama/adapted"]["settings"]
    assert said["judge"]["model"] == "judge-8b" and said["judge"]["temperature"] == 0
    assert said["rubric"]["version"] == 1 and said["answers"] == 20 and said["malformed"] == {"no rating": 4}


def test_the_summary_holds_the_ratings_and_their_paired_difference(judged):
    summary = read_json(judged / "summary.json")
    assert validate_summary(summary) == []
    rows = {r["model"]: r for r in summary["benchmarks"] if r["metric"] == "judge domain 1 (0 to 3)"}
    assert {m: (r["task"], r["value"], r["n"], r["unparsed"]) for m, r in rows.items()} == {
        "base": ("setsubi", 0.0, 16, pytest.approx(0.2)), "adapted": ("setsubi", 3.0, 16, pytest.approx(0.2)),
    }  # fmt: skip
    (step,) = [c for c in summary["changes"] if c["metric"].startswith("judge")]
    assert (step["from"], step["to"], step["n"], step["difference"], step["change"]) == ("base", "adapted", 16, 3.0, "gained")


def test_the_report_shows_number_malformed_judge_and_version(judged):
    text = re.sub("<[^>]+>", "", section(judged))
    for shown in ("16 / 20", "点がないno rating 4", "judge-8b", "Rubric ", "version 1", "+3.00", "3.00"):
        assert shown in text, shown
    assert "今の回答より前の採点" not in text


def test_ratings_of_answers_that_are_no_more_are_marked_and_leave_the_summary(judged):
    write_answers(judged, "adapted", extra="（新）")
    write_report(judged)
    assert section(judged).count("今の回答より前の採点") == 1
    left = build_summary(judged)
    assert [r["model"] for r in left["benchmarks"] if r["metric"].startswith("judge")] == ["base"]
    assert not [c for c in left["changes"] if c["metric"].startswith("judge")]


def test_the_terminal_shows_the_judge_beside_the_score_and_not_in_its_place(judged, console):
    code, out, err = console("recipe", "show", "setsubi", "--runs", judged.parents[1])
    assert code == 0, err
    score = next(r for r in read_json(judged / "summary.json")["benchmarks"] if r["model"] == "adapted" and r["metric"] == "exact_match")
    lines = {line.partition("  ")[0]: line for line in out.splitlines() if line.startswith("setsubi, ")}
    assert f"{score['value']:.3f}" in lines["setsubi, exact_match"] and "3.000" in lines["setsubi, judge domain 1 (0 to 3)"]


def test_ratings_of_two_turn_answers_hold_until_the_model_is_another(judged):
    benchmark = read_json(judged / "judge-domain" / "judge.json")
    benchmark["rubric"]["name"] = "mt-bench-ja"
    for row in benchmark["models"]:
        row |= {"turns": {"1": row["mean"], "2": row["mean"]}, "answers": "of other questions"}
    record = {"outputs": [{"path": f"{name}-F16.gguf", "sha256": name} for name in ("base", "model")]}
    write_json(judged / "gguf" / "stage.json", record)
    keep_judged(judged, judged / "judge-mt-bench-ja" / "judge.json", benchmark, "setsubi", "tiny-llama")

    def left() -> list[str]:
        return [r["model"] for r in build_summary(judged)["benchmarks"] if r["task"] == "mt-bench-ja"]

    assert left() == ["base", "adapted"]
    record["outputs"][1]["sha256"] = "another"
    write_json(judged / "gguf" / "stage.json", record)
    assert left() == ["base"]


def test_a_run_may_be_named_from_where_one_stands(console, tmp_path, monkeypatch):
    run = write_run(tmp_path / "runs")
    for model in SAID:
        write_answers(run, model)
    monkeypatch.chdir(run)
    with judge() as url:
        code, _, err = console("evaluate", "judge", ".", "--endpoint", url, "--model", "judge-8b")
    assert code == 0, err
    assert {r["run"] for r in read_results(tmp_path / "runs" / "results.sqlite")} == {"setsubi/tiny-llama"}


def test_a_run_that_no_judge_has_seen_has_no_such_section(tmp_path):
    run = write_run(tmp_path)
    write_report(run)
    assert section(run) == ""
