"""The model card says what the files are made of, in the form that model hubs read."""

import runpy
from pathlib import Path

import pytest
import yaml

from tsugiki.bases import Base, load_bases
from tsugiki.recipes.card import write_card
from tsugiki.recipes.recipe import BASES
from tsugiki.recipes.summary import build_summary

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))
write_run, stage_files = synthetic["write_run"], synthetic["stage_files"]


def card(tmp_path, base, stages=None):
    run = write_run(tmp_path, stages)
    text = write_card(run, build_summary(run), base).read_text(encoding="utf-8")
    head, _, body = text.removeprefix("---\n").partition("---\n")
    return yaml.safe_load(head), body


def test_the_front_matter_names_base_licence_and_language(tmp_path):
    head, _ = card(tmp_path, Base("swallow", hub_id="org/swallow", licence="llama3.1"))
    assert head["base_model"] == "org/swallow" and head["license"] == "llama3.1" and head["language"] == ["ja"]


def test_a_licence_that_hubs_do_not_know_is_named_as_it_is(tmp_path):
    head, body = card(tmp_path, Base("b", hub_id="org/b", licence="Own Licence: v1 # beta"))
    assert (head["license"], head["license_name"]) == ("other", "Own Licence: v1 # beta")
    assert "licence: Own Licence: v1 # beta" in body


def test_the_body_has_the_file_to_ship_and_every_level_with_its_verdict(tmp_path):
    files = stage_files()
    _, body = card(tmp_path, Base("b", licence="MIT"), files)
    choice = files["check"]["recommended"]["level"]
    sha = next(r["sha256"] for r in files["levels"]["levels"] if r["level"] == choice)
    assert f"levels/model-{choice}.gguf" in body and sha in body
    rows = [line for line in body.splitlines() if line.startswith(("| Q", "| F16")) and line.count("|") > 8]  # scores have a table too
    assert len(rows) == len(files["check"]["levels"])
    for row in files["check"]["levels"]:
        assert any(line.startswith(f"| {row['level']} ") and f"| {row['verdict']} |" in line for line in rows)
    assert "2,000 (best)" in body and "6,000 for training" in body


@pytest.mark.parametrize("stages", [("data",), ("data", "sweep"), ("data", "sweep", "gguf", "levels")])
def test_a_run_under_way_has_a_card_of_what_is_there(tmp_path, stages):
    files = stage_files()
    _, body = card(tmp_path, Base("b"), {k: files[k] for k in stages})
    assert "File to ship" not in body and "unknown: see the base's own card" in body


def test_every_named_base_gives_a_readable_card(tmp_path):
    for i, base in enumerate(load_bases(BASES).values()):
        head, _ = card(tmp_path / str(i), base)
        assert head["license"] and head["base_model"]
