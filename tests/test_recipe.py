"""The recipe, end to end, through the console script: what it writes, what it does not do twice, what a kill costs."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tsugiki.artifacts import read_json, sha256_tree
from tsugiki.recipes.recipe import STAGES
from tsugiki.recipes.summary import validate_summary
from tsugiki.results import read_results

SCRIPT = Path(sys.executable).with_name("tsugiki")
BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
SETTINGS = (
    "sweep.counts=[16,32]", "sweep.epochs=1", "check_items=8", "check.resamples=100", "levels=[Q8_0,Q4_K_M]",
    "evaluate.tasks=[]",
)
YAML = """\
title: {ja: 試験, en: Trial}
licence: CC0
source: {jsonl: qa.jsonl}
fields: {prompt: q, completion: a}
near_duplicates: null
scoring: exact_match
max_new_tokens: 8
max_tokens: 128
valid_share: 0.1
test_share: 0.2
sweep: {counts: [16, 32]}
"""


def write_rows(path: Path, extra: str = "") -> None:
    rows = [{"q": f"ポンプP-{100 + i}の点検は何か月ごとですか。", "a": f"{i % 5 + 1}か月"} for i in range(80)]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows) + extra, encoding="utf-8")


def command(*arguments: str, settings=SETTINGS) -> list[str]:
    return [str(SCRIPT), *arguments, *(part for s in settings for part in ("--set", s))]


def run(folder: Path, *arguments: str, settings=()) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, settings=settings), cwd=folder, capture_output=True, text=True, timeout=300)


def recipe(folder: Path, *changes: str) -> tuple[str, set[str]]:
    """Run the recipe; returns what it said and the stages that it ran."""
    done = run(folder, "recipe", "run", "mine.yaml", settings=(*SETTINGS, *changes))
    assert done.returncode == 0, done.stderr
    return done.stderr, {s for s in STAGES if f"\n{s:<9} done already" not in done.stderr}


def stages(folder: Path) -> dict[str, tuple]:
    """Of each finished stage: when and by which process its record was written."""
    paths = (folder / "runs" / "mine" / "tiny-llama" / s / "stage.json" for s in STAGES)
    return {p.parent.name: (p.stat().st_mtime_ns, read_json(p)["pid"]) for p in paths if p.exists()}


def new_folder(folder: Path) -> Path:
    write_rows(folder / "qa.jsonl")
    (folder / "mine.yaml").write_text(YAML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = new_folder(tmp_path_factory.mktemp("recipe"))
    done = run(folder, "recipe", "run", "mine.yaml", settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def copy(first, tmp_path) -> Path:
    """A finished run of its own for a test that changes it."""
    return Path(shutil.copytree(first[0], tmp_path / "copy", symlinks=True))


@pytest.fixture
def finished(first) -> Path:
    return first[0] / "runs" / "mine" / "tiny-llama"


def test_every_stage_leaves_a_record_with_the_hashes_of_what_it_wrote(finished):
    assert [s for s in STAGES if not (finished / s / "stage.json").exists()] == []
    for stage in STAGES:
        record = read_json(finished / stage / "stage.json")
        assert record["stage"] == stage and record["inputs"] and record["seconds"] >= 0 and record["peak_rss"] > 0
        for output in record["outputs"]:
            assert sha256_tree(finished / stage / output["path"]) == output["sha256"]


def test_the_summary_is_the_documented_one(finished):
    summary = read_json(finished / "summary.json")
    assert validate_summary(summary) == []
    assert list(summary) == [
        "domain", "base", "samples", "sweep", "parity", "levels", "recommended", "benchmarks", "changes", "report",
    ]
    assert [p["n"] for p in summary["sweep"]["points"]] == [16, 32]
    assert [r["level"] for r in summary["levels"]] == ["F16", "Q8_0", "Q4_K_M"]
    assert sum(summary["samples"].values()) == 80
    assert summary["parity"]["rate"] == 1.0
    assert (finished / summary["recommended"]["path"]).is_file()
    assert {(c["family"], c["from"], c["to"]) for c in summary["changes"]} >= {("domain", "base", "adapted"), ("domain", "adapted", "Q8_0")}
    assert "<html" in (finished / summary["report"]).read_text(encoding="utf-8")


def test_no_path_of_this_machine_is_in_what_a_user_may_share(finished):
    for path in ("summary.json", "report.html", "sweep/adapter/adapter_config.json", "gguf/gguf.json", "levels/levels.json"):
        assert str(finished.parents[2]) not in (finished / path).read_text(encoding="utf-8"), path


def test_the_results_table_has_the_numbers_and_the_stage_they_come_from(finished):
    rows = read_results(finished.parents[1] / "results.sqlite")
    assert {r["stage"] for r in rows} == {"sweep", "check", "evaluate"}
    for row in rows:
        assert row["run"] == "mine/tiny-llama"
        assert row["provenance"] == read_json(finished / row["stage"] / "stage.json")["key"]
        assert row["n"] > 0
    summary = read_json(finished / "summary.json")
    nll = {r["settings"]["n"]: r["value"] for r in rows if r["stage"] == "sweep" and r["metric"] == "nll"}
    assert nll == {p["n"]: p["nll"] for p in summary["sweep"]["points"]}


def test_what_is_printed_holds_no_library_noise_no_bars_and_no_empty_lines(first):
    said = first[1].stderr
    assert "Warning" not in said and "Loading weights" not in said and "\x1b" not in said and "━" not in said
    assert all(line.strip() for line in said.splitlines())
    assert "time: " in first[1].stdout and "Take " in first[1].stdout


def test_a_second_run_does_nothing_and_says_so(first):
    before = stages(first[0])
    began = time.monotonic()
    said, ran = recipe(first[0])
    assert ran == set() and "nothing to do" in said
    assert stages(first[0]) == before
    assert time.monotonic() - began < 0.5 * sum(read_json(p)["seconds"] for p in first[0].rglob("stage.json")) + 10


def test_a_margin_changes_the_check_and_the_report_but_no_model(copy):
    chosen = read_json(copy / "runs/mine/tiny-llama/check/check.json")["recommended"]["level"]
    _, ran = recipe(copy, "check.margin_nll=0.4")
    now = read_json(copy / "runs/mine/tiny-llama/check/check.json")["recommended"]["level"]
    # The scores before and after depend on the check by the recommended level alone.
    assert ran == {"check", "report"} | ({"evaluate"} if now != chosen else set())


def test_another_sample_count_keeps_the_points_that_are_there(copy):
    points = copy / "runs/mine/tiny-llama/sweep/points"
    before = {p.name: (p / "point.json").stat().st_mtime_ns for p in points.iterdir()}
    _, ran = recipe(copy, "sweep.counts=[16,24,32]")
    assert {"sweep", "report"} <= ran and "data" not in ran
    now = {p.name: (p / "point.json").stat().st_mtime_ns for p in points.iterdir()}
    assert len(now) == len(before) + 1 and before.items() <= now.items()
    kept = read_json(copy / "runs/mine/tiny-llama/sweep/sweep.json")["kept"]["n"]
    assert kept == 24 or ran == {"sweep", "report"}


def test_other_epochs_change_everything_from_the_sweep_on(copy):
    _, ran = recipe(copy, "sweep.epochs=2")
    assert ran == set(STAGES) - {"data"}


def test_a_deleted_report_is_written_again_and_a_new_licence_trains_nothing(copy):
    (copy / "runs/mine/tiny-llama/report.html").unlink()
    assert recipe(copy)[1] == {"report"}
    assert recipe(copy)[1] == set()
    (copy / "mine.yaml").write_text(YAML.replace("CC0", "CC-BY-4.0"), encoding="utf-8")
    assert recipe(copy)[1] == {"data", "report"}
    assert "CC-BY-4.0" in (copy / "runs/mine/tiny-llama/report.html").read_text(encoding="utf-8")


def test_a_mistake_leaves_the_earlier_run_as_it_was(copy):
    before = {p: sha256_tree(p) for p in (copy / "runs/mine/tiny-llama").iterdir() if p.name != ".lock"}
    write_rows(copy / "qa.jsonl", '{"q": "最後の質問", "a": ""}\n')
    done = run(copy, "recipe", "run", "mine.yaml", settings=SETTINGS)
    assert done.returncode == 2 and "qa.jsonl:81" in done.stderr and "(a)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: sha256_tree(p) for p in before} == before
    write_rows(copy / "qa.jsonl")
    assert recipe(copy)[1] == set()


def test_samples_may_not_be_longer_than_the_bases_context(tmp_path):
    new_folder(tmp_path)
    (tmp_path / "mine.yaml").write_text(YAML.replace("max_tokens: 128", "max_tokens: 4096"), encoding="utf-8")
    done = run(tmp_path, "recipe", "run", "mine.yaml", settings=SETTINGS)
    assert done.returncode == 2 and "max_tokens is 4,096" in done.stderr and "2,048 tokens" in done.stderr


def test_two_runs_of_one_recipe_do_not_mix(copy):
    with (copy / "runs/mine/tiny-llama/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run(copy, "recipe", "run", "mine.yaml", settings=SETTINGS)
    assert done.returncode == 2 and "another process is at work on this run" in done.stderr


def start(folder: Path) -> subprocess.Popen:
    # A shell's background job ignores Ctrl-C, and so would its children.
    return subprocess.Popen(
        command("recipe", "run", "mine.yaml"), cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(process: subprocess.Popen, path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)


def test_killed_at_any_moment_it_finishes_without_redoing_what_was_done(tmp_path):
    folder, chance = new_folder(tmp_path), random.Random(1)
    inside = folder / "runs" / "mine" / "tiny-llama"
    done: dict[str, tuple] = {}
    points: dict[str, int] = {}
    for moment in ("sweep/study.sqlite3", ".gguf.new", ".check.new"):
        process = start(folder)
        wait_for(process, inside / moment)
        time.sleep(chance.uniform(0, 1.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert done.items() <= stages(folder).items()
        done = stages(folder)
        now = {p.parent.name: p.stat().st_mtime_ns for p in inside.glob("sweep/points/*/point.json")}
        assert points.items() <= now.items()
        points = now
    assert {"data", "sweep"} <= set(done)
    recipe(folder)
    assert done.items() <= stages(folder).items() and set(stages(folder)) == set(STAGES)
    assert validate_summary(read_json(inside / "summary.json")) == []
    assert [p.name for p in inside.iterdir() if p.name.endswith((".new", ".old", ".tmp"))] == []


def is_alive(group: int) -> bool:
    """Whether a process of the group still runs; one that ended and was not fetched yet does not."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def test_ctrl_c_ends_with_a_sentence_and_leaves_no_process(tmp_path):
    folder = new_folder(tmp_path)
    process = start(folder)
    wait_for(process, folder / "runs/mine/tiny-llama/sweep/study.sqlite3")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert "interrupted: what was finished is kept, and nothing half-written; run the same command again to go on" in said and "Traceback" not in said
    end = time.monotonic() + 10
    while is_alive(process.pid):
        assert time.monotonic() < end, "a process of the recipe is still there"
        time.sleep(0.1)


def test_chat_answers_as_base_and_adapter_do_in_transformers(first, finished):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tsugiki.chat import prompt_text

    question = "ポンプP-103の点検は何か月ごとですか。"
    done = run(first[0], "chat", "mine", "--level", "F16", "--question", question, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished / "sweep" / "adapter").eval()
    ids = tokenizer(prompt_text(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    out = model.generate(**ids, do_sample=False, max_new_tokens=12, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")


def test_compare_puts_every_level_side_by_side(first):
    done = run(first[0], "compare", "mine", "--question", "点検は？")
    assert done.returncode == 0, done.stderr
    assert "点検は？" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:1] in "FQ" and line.strip()] == ["F16", "Q8_0", "Q4_K_M"]


def test_show_tells_the_finished_run_in_eighty_columns_without_cutting_a_number(first, finished):
    os_environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run([SCRIPT, "recipe", "show", "mine"], cwd=first[0], env=os_environment, capture_output=True, text=True)
    assert done.returncode == 0 and "…" not in done.stdout
    for row in read_json(finished / "summary.json")["levels"]:
        assert f"{row['delta_nll']:+.4f}" in done.stdout and row["verdict"] in done.stdout


def test_a_level_that_was_not_made_and_a_run_that_is_not_there_are_sentences(first):
    done = run(first[0], "chat", "mine", "--level", "Q2_K", "--question", "x")
    assert done.returncode == 2 and "There is: F16, Q4_K_M, Q8_0" in done.stderr
    done = run(first[0], "recipe", "show", "setsubi")
    assert done.returncode == 2 and "tsugiki recipe run setsubi" in done.stderr
