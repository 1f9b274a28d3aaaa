"""The command line: every command and option is documented, and a mistake is one sentence with exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import typer
import yaml

import tsugiki
from tsugiki.artifacts import atomic_path, read_json, sha256_tree, write_json
from tsugiki.recipes import cli
from tsugiki.recipes.domains import load_domain

GOOD = {
    "title": {"ja": "試験", "en": "Trial"},
    "licence": "CC0",
    "source": {"jsonl": "qa.jsonl"},
    "fields": {"prompt": "q", "completion": "a"},
    "near_duplicates": None,
    "scoring": "exact_match",
    "sweep": {"counts": [8, 16]},
}


def rows(count: int = 60, **names: str) -> list[dict]:
    q, a = names.get("q", "q"), names.get("a", "a")
    return [{q: f"設備{i}の点検は何か月ごとですか。番号は{i * i}です。", a: f"{i % 5 + 1}か月"} for i in range(count)]


def lines(values: list) -> str:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)


@pytest.fixture
def tsugiki_(console, monkeypatch):
    """The console script on a terminal of 80 columns, without a data folder."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TSUGIKI_DATA", raising=False)
    return console


def commands(command, path=()):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


TREE = list(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path, command", TREE, ids=[" ".join(p) or "tsugiki" for p, _ in TREE])
def test_every_command_and_every_option_is_documented(tsugiki_, path, command):
    assert command.help and command.help.strip()
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{' '.join(path)} {parameter.name} has no help"
    code, out, _ = tsugiki_(*path, "--help")
    assert code == 0 and "Usage:" in out
    for parameter in command.params:
        for option in getattr(parameter, "opts", []):
            if option.startswith("--"):
                assert option in out, option


def test_every_stage_is_a_command_of_its_own():
    names = {" ".join(path) for path, _ in TREE}
    assert {"recipe data", "adapt sweep", "quantize gguf", "quantize levels", "quantize check", "evaluate domain", "recipe report",
            "recipe run", "recipe list", "recipe init", "recipe show", "chat", "compare"} <= names


def test_the_version_is_printed(tsugiki_):
    assert tsugiki_("--version") == (0, tsugiki.__version__ + "\n", "")


def test_the_list_cuts_no_name_at_eighty_columns(tsugiki_):
    from tsugiki.bases import load_bases
    from tsugiki.recipes.recipe import BASES, setting_names

    code, out, _ = tsugiki_("recipe", "list")
    assert code == 0 and "…" not in out
    assert max(map(len, out.splitlines())) <= 80
    for base in load_bases(BASES).values():
        assert re.search(rf"^{re.escape(base.name)}\s", out, re.M) and (base.hub_id or "bundled") in out
    for key, setting in setting_names().items():
        assert re.search(rf"^{re.escape(key)}\s", out, re.M) and setting.metadata["help"], key


MISTAKES = [
    (("recipe", "run", "setsubo"), "setsubi"),
    (("recipe", "run", "../x"), "cannot name a domain"),
    (("recipe", "run", "setsubi", "--base", "tiny-lama"), "Do you mean tiny-llama or"),
    (("recipe", "run", "setsubi", "--stages", "data,swep"), "Did you mean sweep?"),
    (("recipe", "run", "setsubi", "--set", "sweep.epoch=3"), "Did you mean sweep.epochs?"),
    (("recipe", "run", "setsubi", "--set", "sweep.epochs"), "key=value"),
    (("recipe", "run", "setsubi", "--set", "sweep.epochs=many"), "sweep.epochs: epochs must be of type int, not 'many'"),
    (("recipe", "run", "setsubi", "--set", "sweep.epochs=true"), "not True"),
    (("recipe", "run", "setsubi", "--set", "sweep.epochs=0"), "epochs must be at least 1, not 0"),
    (("recipe", "run", "setsubi", "--set", "sweep.counts=[]"), "counts must be distinct whole numbers"),
    (("recipe", "run", "setsubi", "--set", "sweep.counts=[a]"), "counts must be of type"),
    (("recipe", "run", "setsubi", "--set", "sweep.learning_rate=.nan"), "learning_rate must be of type float, not nan"),
    (("recipe", "run", "setsubi", "--set", "check.confidence=95"), "confidence must be between 0 and 1, not 95.0"),
    (("recipe", "run", "setsubi", "--set", "check_items=0"), "check_items must be at least 1, not 0"),
    (("recipe", "run", "setsubi", "--set", "levels=[Q4_K_X]"), "the level 'Q4_K_X' is not known"),
    (("recipe", "run", "setsubi", "--set", "levels=[]"), "levels must be distinct"),
    (("recipe", "run", "setsubi", "--set", "levels=[F16,Q8_0]"), "levels must be distinct"),
    (("recipe", "run", "setsubi", "--set", "levels={"), "is not a value"),
    (("adapt", "sweep", "setsubi"), "the stage 'data' has not been run"),
    (("recipe", "show", "setsubi"), "there is no run of setsubi on tiny-llama"),
    (("chat", "setsubi", "--question", "x"), "Run it first: tsugiki recipe run setsubi"),
    (("compare", "setsubi"), "there is no run of setsubi"),
    (("quantize", "types", "none.gguf"), "none.gguf"),
    (("recipe", "tiny-bases", "--corpus", "nowhere"), "there is no folder nowhere"),
    (("recipe", "tiny-bases", "--corpus", ".", "--only", "tiny-gpt"), "there is no tiny base 'tiny-gpt'"),
    (("recipe", "init", "x", "--from", "none.jsonl"), "there is no such file"),
    (("recipe", "init", "x", "--from", "none.jsonl", "--prompt", "q"), "--prompt and --completion are named together"),
    (("recipe", "run"), "Missing argument"),
    (("recipe", "run", "setsubi", "--epochs", "3"), "No such option"),
    (("recipe", "bake"), "No such command"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_a_sentence_and_exit_code_two(tsugiki_, arguments, message):
    code, out, err = tsugiki_(*arguments)
    assert code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())
    assert "Traceback" not in err and out == ""


def test_debug_shows_where_a_mistake_was_found(tsugiki_):
    code, _, err = tsugiki_("--debug", "recipe", "run", "setsubo")
    assert code == 2 and "Traceback" in err and "error:" in err


def test_a_fault_of_ours_is_exit_code_one_and_says_what_to_do(tsugiki_, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("[/bold] of [x]")

    monkeypatch.setattr(cli, "load_bases", broken)
    code, _, err = tsugiki_("recipe", "list")
    assert code == 1 and "internal error: ZeroDivisionError: [/bold] of [x]" in err and "--debug" in err
    assert "Traceback" not in err
    code, _, err = tsugiki_("--debug", "recipe", "list")
    assert code == 1 and "Traceback" in err


def test_ctrl_c_is_a_sentence_and_exit_code_two(tsugiki_, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_bases", interrupted)
    code, _, err = tsugiki_("recipe", "list")
    assert code == 2 and "interrupted: what was finished is kept, and nothing half-written; run the same command again to go on" in err and "Traceback" not in err


def test_a_full_disk_or_a_place_that_cannot_be_written_is_exit_code_two(tsugiki_, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "a.gguf"))

    monkeypatch.setattr(cli, "load_bases", full)
    code, _out, err = tsugiki_("recipe", "list")
    assert code == 2 and "a.gguf: No space left on device" in err and "Free some space" in err and "Traceback" not in err


def test_a_termination_is_as_an_interruption(tsugiki_, monkeypatch, tmp_path):
    def terminated(*_):
        with atomic_path(tmp_path / "half") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    monkeypatch.setattr(cli, "load_bases", terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code, _, err = tsugiki_("recipe", "list")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 2 and "interrupted" in err and "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_a_rate_may_be_written_as_people_write_it(tsugiki_):
    from tsugiki.recipes.recipe import settle

    assert settle(load_domain("setsubi"), ["sweep.learning_rate=1e-3"], large=False).sweep.fit.learning_rate == 1e-3


def test_missing_data_says_where_to_get_it(tsugiki_, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    code, _, err = tsugiki_("recipe", "run", "construction", "--data-dir", "empty")
    assert code == 2 and "corpora/law_qa/construction/train.jsonl" in err and "https://laws.e-gov.go.jp/" in err
    monkeypatch.setenv("TSUGIKI_DATA", str(tmp_path / "nowhere"))
    code, _, err = tsugiki_("recipe", "run", "construction")
    assert code == 2 and "TSUGIKI_DATA" in err and "nowhere" in err


# --- bad data ---

BAD = [
    ("a row that is not JSON", lines(rows()) + '{"q": "x", "a": \n', "qa.jsonl:61: not JSON"),
    ("a row that is a list", lines([*rows(), ["x", "y"]]), "qa.jsonl:61: a JSON object is needed, not a list"),
    ("a missing field", lines([*rows(), {"q": "x"}]), "qa.jsonl:61 (a)"),
    ("an empty answer", lines([*rows(), {"q": "x", "a": " "}]), "qa.jsonl:61 (a)"),
    ("a null question", lines([{"q": None, "a": "x"}, *rows()]), "qa.jsonl:1 (q)"),
    ("a number as the answer", lines([*rows(), {"q": "x", "a": {"b": 1}}]), "qa.jsonl:61 (a)"),
    ("an answer that is far too long", lines([*rows(), {"q": "x", "a": "長" * 20_001}]), "qa.jsonl:61 (a)"),
    ("Shift_JIS", lines(rows()).encode() + '{"q": "質問", "a": "答え"}'.encode("cp932"), "qa.jsonl:61: not UTF-8"),
    ("nothing", "", "qa.jsonl: the file holds no rows"),
    ("true as the answer", lines([*rows(), {"q": "x", "a": True}]), "qa.jsonl:61 (a)"),
    ("half a surrogate pair", lines(rows()) + '{"q": "\\ud83d", "a": "z"}\n', "qa.jsonl:61 (q)"),
    ("one document only", lines(rows(1)), "1"),
]


@pytest.mark.parametrize("content, message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_data_is_refused_by_file_line_and_field_and_touches_nothing(tsugiki_, tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(GOOD, allow_unicode=True), encoding="utf-8")
    (tmp_path / "qa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    earlier = tmp_path / "runs" / "mine" / "tiny-llama" / "data"
    write_json(earlier / "stage.json", {"key": "of an earlier run", "outputs": []})
    before = sha256_tree(earlier)
    code, _, err = tsugiki_("recipe", "data", "mine.yaml")
    assert code == 2 and message in err and "Traceback" not in err
    assert sha256_tree(earlier) == before


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("mine.yaml", "title: [", "mine.yaml:"),
        ("mine.yaml", yaml.safe_dump(GOOD | {"scoring": "bleu"}), "mine.yaml (scoring): 'bleu' is not one of"),
        ("mine.yaml", yaml.safe_dump(GOOD | {"sweep": {"counts": [8], "epoch": 2}}), "sweep.epoch"),
        ("mine.txt", "x", "mine.txt"),
    ],
)
def test_a_bad_domain_is_refused_by_file_and_key(tsugiki_, tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "qa.jsonl").write_text(lines(rows()), encoding="utf-8")
    code, _, err = tsugiki_("recipe", "run", name)
    assert code == 2 and message in err and "Traceback" not in err


# --- init ---


def test_init_writes_a_domain_that_then_runs(tsugiki_, tmp_path):
    (tmp_path / "qa.jsonl").write_text(lines(rows()), encoding="utf-8")
    code, _, err = tsugiki_("recipe", "init", "mine", "--from", "qa.jsonl", "--prompt", "q", "--completion", "a")
    assert code == 0, err
    assert "60 from 60 documents" in err and "tsugiki recipe run mine" in err
    assert "mine" in tsugiki_("recipe", "list")[1]
    code, _, err = tsugiki_("recipe", "data", "mine")
    assert code == 0, err
    data = read_json(tmp_path / "runs" / "mine" / "tiny-llama" / "data" / "data.json")
    assert sum(data["samples"].values()) == 60


def test_init_names_the_fields_it_needs_and_takes_them(tsugiki_, tmp_path):
    values = [r | {"章": f"第{i % 40}章"} for i, r in enumerate(rows(q="本文", a="正解"))]
    (tmp_path / "qa.jsonl").write_text(lines(values), encoding="utf-8")
    code, _, err = tsugiki_("recipe", "init", "mine", "--from", "qa.jsonl")
    assert code == 2 and "--prompt FIELD --completion FIELD" in err
    assert not (tmp_path / "domains").exists()
    fields = ("--prompt", "本文", "--completion", "正解", "--document", "章")
    code, _, err = tsugiki_("recipe", "init", "mine", "--from", "qa.jsonl", *fields)
    assert code == 0, err
    assert load_domain("mine").fields.document == "章"
    code, _, err = tsugiki_("recipe", "init", "mine", "--from", "qa.jsonl", *fields)
    assert code == 2 and "--force" in err
    assert tsugiki_("recipe", "init", "mine", "--from", "qa.jsonl", *fields, "--force")[0] == 0
    code, _, err = tsugiki_("recipe", "init", "other", "--from", "qa.jsonl", "--prompt", "無い", "--completion", "正解")
    assert code == 2 and "無い" in err and not Path("domains/other.yaml").exists()
