"""The check from files alone: llama-perplexity's own windows and numbers, bounded memory, damaged files, interruption."""

import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.quantize.check import encode_sets
from tsugiki.quantize.compare import plan_groups
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level
from tsugiki.quantize.profile import read_header
from tsugiki.quantize.standalone import CheckFiles, check_files
from tsugiki.quantize.windows import cut, read_questions

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "recipes" / "bases" / "tiny-llama"
TEXT = ROOT / "README.ja.md"
COMMAND = [sys.executable, "-P", "-c", "from tsugiki.recipes.cli import main; main()", "quantize", "check"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    found = {"F16": folder / "F16.gguf"}
    convert(BASE, found["F16"])
    for level in ("Q8_0", "Q4_K_M"):
        found[level] = folder / f"{level}.gguf"
        make_level(found["F16"], level, found[level])
    return found


# --- windows ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 99), max_size=200), st.sampled_from([4, 6, 16]), st.sampled_from([None, 0]))
def test_windows_are_side_by_side_and_their_second_half_is_scored(ids, window, bos):
    rows = cut(ids, window=window, bos=bos)
    assert len(rows) == len(ids) // window
    for i, row in enumerate(rows):
        part = ids[i * window : (i + 1) * window]
        assert row.ids[1:] == part[1:] and row.ids[0] == (part[0] if bos is None else bos)
        assert len(row.completion_ids) == window - window // 2 - 1


@pytest.fixture(scope="module")
def result(files, tmp_path_factory):
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"prompt": f"{i}の次の数は何ですか。", "completion": f"{i + 1}です。", "document": f"d{i}"} for i in range(12)]
    questions.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    out = questions.parent / "out"
    job = CheckFiles(files["F16"], (files["Q8_0"], files["Q4_K_M"]), samples=questions, texts=(f"ja={TEXT}",), windows=2,
                     max_new_tokens=4)
    found = check_files(job, out)
    assert json.loads((out / "check.json").read_text(encoding="utf-8")) == found
    return found


def test_the_perplexity_of_plain_text_is_that_of_a_plain_loop_over_transformers(result):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(BASE)(TEXT.read_text(encoding="utf-8").removesuffix("\n"))["input_ids"]
    nll = []
    for start in (0, 512):
        window = [model.config.bos_token_id, *ids[start + 1 : start + 512]]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double().numpy()
        for at in range(256, 511):  # the token at `at` predicts the next
            nll.append(np.logaddexp.reduce(logits[at]) - logits[at][window[at + 1]])
    row = result["texts"]["ja"]["levels"][0]
    assert result["texts"]["ja"]["tokens"] == len(nll) == 510
    assert row["nll"] == pytest.approx(np.mean(nll), rel=1e-4)


def test_domain_and_text_are_judged_apart_on_the_same_pass(result):
    assert [r["level"] for r in result["levels"]] == ["F16", "Q8_0", "Q4_K_M"] == [r["level"] for r in result["texts"]["ja"]["levels"]]
    assert result["samples"] == 12 and "flips" in result["levels"][1] and "score" not in result["texts"]["ja"]["levels"][1]
    assert result["levels"][1]["nll"] != result["texts"]["ja"]["levels"][1]["nll"]
    assert result["profile"]["attention"] == "grouped-query" and set(result["files"]) == {"F16", "Q8_0", "Q4_K_M"}
    assert len(result["memory"]["groups"]) == 1


def test_a_reference_is_called_what_its_file_calls_itself(files, tmp_path):
    found = check_files(CheckFiles(files["Q8_0"], (files["Q4_K_M"],), texts=(f"ja={TEXT}",), window=64, windows=2))
    assert [r["level"] for r in found["levels"]] == list(found["files"]) == ["Q8_0", "Q4_K_M"]
    assert "F16" not in json.dumps([r["why"] for r in found["levels"]]) and "Q8_0" in found["levels"][1]["why"]["en"]


def test_questions_get_the_files_own_template(files, tmp_path):
    from transformers import AutoTokenizer

    from tsugiki.chat import encode
    from tsugiki.samples import Sample

    rows = [{"id": "1", "prompt": "水は何度で沸きますか。", "completion": "百度です。", "document": "d", "kind": ""}]
    sets, _ = encode_sets(files["F16"], {}, rows)
    expected = encode(AutoTokenizer.from_pretrained(BASE), [Sample(**rows[0])])
    assert sets["domain"] == expected


def test_llama_perplexity_says_the_same_of_the_same_text(result, files, tmp_path):
    if not os.environ.get("TSUGIKI_UPSTREAM"):
        pytest.skip("TSUGIKI_UPSTREAM names no folder with llama-perplexity")
    tool = [str(Path(os.environ["TSUGIKI_UPSTREAM"]) / "llama-perplexity"), "-t", "1", "-fa", "off", "--no-repack", "-f", str(TEXT)]
    tool += ["--kl-divergence-base", str(tmp_path / "logits")]

    def said(last, *options):
        for _ in range(3):  # its log, written by a thread of its own, was once seen to lack the end
            done = subprocess.run([*tool, *map(str, options)], capture_output=True, text=True, errors="replace", check=True)
            if last in done.stdout + done.stderr:
                break
        return done.stdout + done.stderr

    ppl = float(re.search(r"Final estimate: PPL = ([\d.]+)", said("Final estimate", "-m", files["F16"], "--chunks", 2))[1])
    rows = result["texts"]["ja"]["levels"]
    assert math.exp(rows[0]["nll"]) == pytest.approx(ppl, rel=1e-2)
    for row in rows[1:]:
        text = said("Same top p:", "-m", files[row["level"]], "--kl-divergence")
        for name, value in (("Mean +KLD", row["kld_mean"]), (r"Mean PPL\(Q\) ", math.exp(row["nll"])), ("99.0% +KLD", row["kld_p99"])):
            assert value == pytest.approx(float(re.search(rf"{name} *: +([\d.]+)", text)[1]), rel=1e-2)
        assert row["top1"] == pytest.approx(float(re.search(r"Same top p: +([\d.]+)", text)[1]) / 100, abs=0.01)


# --- memory -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), min_size=2, max_size=9), st.integers(0, 300))
def test_groups_hold_every_level_once_and_fit_where_one_level_fits(sizes, budget):
    needs = {str(i): n for i, n in enumerate(sizes)}
    groups = plan_groups(needs, budget)
    assert [name for group in groups for name in group] == list(needs)[1:]
    for group in groups:
        assert len(group) == 1 or needs["0"] + sum(needs[n] for n in group) <= budget


def test_one_level_at_a_time_gives_the_same_numbers(files):
    job = {"texts": (f"ja={TEXT}",), "window": 64, "windows": 3}
    levels = (files["Q8_0"], files["Q4_K_M"])
    together = check_files(CheckFiles(files["F16"], levels, **job))
    apart = check_files(CheckFiles(files["F16"], levels, memory=1, **job))
    assert apart["memory"]["groups"] == [["Q8_0"], ["Q4_K_M"]]
    assert apart["levels"] == together["levels"]
    interpreter = 250e6  # Python with numpy, scipy and llama.cpp, before a file is open
    for found in (together, apart):
        assert 0 < found["memory"]["peak_rss"] < found["memory"]["needed"] + interpreter
    assert apart["memory"]["peak_rss"] <= together["memory"]["peak_rss"]


# --- bad input --------------------------------------------------------------------------------------------------


def small(files, level, **options):
    return CheckFiles(files["F16"], (level,), texts=(f"ja={TEXT}",), window=64, windows=2, **options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(["header", "tensors", "data"]), st.integers(0, 2**31), st.integers(1, 40))
def test_flipped_bits_end_in_a_result_or_in_a_sentence(files, tmp_path_factory, where, seed, number):
    """The parent lives whatever the bits say: a crash in native code is a child's, and NaN weights are named."""
    data = bytearray(files["Q8_0"].read_bytes())
    start = min(t.offset for t in read_header(files["Q8_0"]).tensors.values())
    names = data.index(b"blk.0.")
    low, high = {"header": (0, 4096), "tensors": (names, start), "data": (start, len(data))}[where]
    rng = random.Random(seed)
    for _ in range(number):
        data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "level.gguf").write_bytes(data)
    try:
        found = check_files(small(files, folder / "level.gguf"), folder / "out")
    except UserError as error:
        assert str(error) and not list((folder / "out").glob("*"))
    else:
        json.dumps(found, allow_nan=False)
        assert [p.name for p in (folder / "out").iterdir()] == ["check.json"]


def test_weights_that_are_not_numbers_are_named(files, tmp_path):
    data = bytearray(files["F16"].read_bytes())
    entry = read_header(files["F16"]).tensors["output_norm.weight"]
    data[entry.offset : entry.offset + 4] = np.float32(np.nan).tobytes()
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(UserError, match=r"nan\.gguf: its logits are not finite at \d+ of \d+ tokens"):
        check_files(small(files, tmp_path / "nan.gguf"))


def command(*arguments, temporary=None, **options):
    environment = os.environ | {"COLUMNS": "120", "PYTHONSAFEPATH": "1"} | ({"TMPDIR": str(temporary)} if temporary else {})
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment, **options)


def test_truncated_foreign_and_missing_files_are_all_named_with_exit_2(files, tmp_path):
    cut_file, foreign = tmp_path / "cut.gguf", tmp_path / "foreign.gguf"
    cut_file.write_bytes(files["Q8_0"].read_bytes()[:-5000])
    foreign.write_bytes(b"PK\x03\x04" + bytes(100))
    child = command(files["F16"], cut_file, foreign, tmp_path / "missing.gguf", "--text", TEXT, "--out", tmp_path / "out")
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 2 and "3 problem(s)" in said and "Traceback" not in said
    assert "truncated" in said and "not a GGUF" in said and "no such file" in said and not (tmp_path / "out").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(files, tmp_path):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    child = command(files["F16"], files["Q8_0"], "--text", TEXT, "--window", 64, "--windows", 4, "--out", tmp_path / "out",
                    temporary=tmp_path, preexec_fn=full)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 2 and "File too large" in said and "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())


def test_an_interrupted_check_ends_its_children_and_writes_nothing(files, tmp_path):
    child = command(files["F16"], files["Q8_0"], files["Q4_K_M"], "--text", TEXT, "--out", tmp_path / "out", temporary=tmp_path,
                    start_new_session=True)

    def children():
        found = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        return [p for t in Path(f"/proc/{child.pid}/task").glob("*/children") for p in t.read_text().split()] if found.exists() else []

    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tsugiki-check-*/all.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    while not children() and time.monotonic() < deadline:
        time.sleep(0.05)
    running = children()
    child.send_signal(signal.SIGINT)  # to the parent alone
    said, _ = child.communicate(timeout=60)
    assert running and child.returncode == 2 and "interrupted" in said and "Traceback" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in running)
    assert not list(tmp_path.glob("tsugiki-check-*")) and not list((tmp_path / "out").glob("*"))


def test_wrong_lines_of_questions_are_named_by_number(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnot json\n{"prompt": "a"}\n{"prompt": 1, "completion": "b"}\n[]\n')
    with pytest.raises(UserError, match=r"4 problem\(s\)[\s\S]*:2: not JSON[\s\S]*:3: completion is missing[\s\S]*:4[\s\S]*:5"):
        read_questions(path)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    child = command("setsubi", "--text", TEXT)
    assert "a domain is checked alone" in child.communicate(timeout=60)[0] and child.returncode == 2
