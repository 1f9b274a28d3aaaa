"""A base whose licence allows no derived models is refused; an unknown licence is said."""

import shutil
from pathlib import Path

import pytest

from tsugiki.artifacts import write_text
from tsugiki.bases import Base, load_bases
from tsugiki.errors import UserError
from tsugiki.licences import allows_derivatives, card_licence, check_licence, is_non_commercial, licence_notes
from tsugiki.recipes.recipe import BASES, open_run

TINY = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"


# Names as SPDX, the hub's list of licences and Creative Commons write them.
@pytest.mark.parametrize("name", [
    "cc-by-nd-4.0", "CC-BY-ND-3.0", "cc-by-nc-nd-4.0", "CC BY-NC-ND 4.0", "Attribution-NoDerivatives 4.0 International",
    "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0", "Research licence, no derivative works", "No-Derivs 2.0",
])  # fmt: skip
def test_a_licence_without_derivatives_is_known_by_its_name(name):
    assert allows_derivatives(name) is False
    with pytest.raises(UserError, match="allows no derived models"):
        check_licence(Base("some", licence=name))


@pytest.mark.parametrize("name", [
    "Apache-2.0", "MIT", "cc-by-sa-4.0", "cc-by-4.0", "Llama 3.1 Community License and Gemma Terms of Use", "cc-by-nc-4.0", "OpenRAIL",
    "BSD-3-Clause", "NDL terms", "Qwen Research License",
])  # fmt: skip
def test_other_licences_are_not_taken_for_one(name):
    assert allows_derivatives(name) is True
    check_licence(Base("some", licence=name))


@pytest.mark.parametrize("name", ["", " ", "unknown", "other", "Unknown"])
def test_an_unknown_licence_is_said_and_not_refused(name):
    base = Base("some", licence=name)
    check_licence(base)
    [(ja, en)] = licence_notes(base)
    assert "some" in ja and "not known" in en


@pytest.mark.parametrize(("name", "expected"), [
    ("cc-by-nc-4.0", True), ("CC BY-NC-SA 4.0", True), ("Non-Commercial use only", True), ("research only", True),
    ("cc-by-4.0", False), ("Apache-2.0", False), ("", False),
])  # fmt: skip
def test_a_licence_for_other_than_commercial_use_is_said(name, expected):
    assert is_non_commercial(name) is expected
    assert any("commercial" in en for _, en in licence_notes(Base("some", licence=name))) is expected


def test_every_named_base_may_be_adapted_and_its_licence_is_known():
    assert {n: allows_derivatives(b.licence) for n, b in load_bases(BASES).items()} == dict.fromkeys(load_bases(BASES), True)


@pytest.mark.parametrize(("card", "expected"), [
    ("---\nlicense: cc-by-nd-4.0\n---\n# x", "cc-by-nd-4.0"),
    ("---\nlanguage: [ja]\nlicense: other\nlicense_name: my-terms\n---\n", "my-terms"),
    ("---\nlicense: [mit, apache-2.0]\n---\n", "mit and apache-2.0"),
    ("---\nlicense: other\n---\n", "other"),
    ("# no front matter\nlicense: mit\n", ""), ("---\n: [broken\n---\n", ""), ("---\n- a\n---\n", ""), ("", ""),
    ("---\nlicense: mit\ndate: 2024-13-45\n---\n", ""), (f"---\nlicense: {'[' * 9_000}\n---\n", ""),
])  # fmt: skip
def test_the_licence_in_a_model_card(card, expected, tmp_path):
    write_text(tmp_path / "README.md", card)
    assert card_licence(tmp_path) == expected


def test_a_folder_without_a_card_has_no_licence(tmp_path):
    assert card_licence(tmp_path) == ""


def test_a_card_that_disagrees_with_the_list_is_said(tmp_path):
    write_text(tmp_path / "README.md", "---\nlicense: cc-by-nd-4.0\n---\n")
    [(ja, en)] = licence_notes(Base("some", licence="Apache-2.0"), tmp_path)
    assert "cc-by-nd-4.0" in ja and "cc-by-nd-4.0" in en and "Apache-2.0" in en
    assert licence_notes(Base("tiny-llama", licence="Apache-2.0"), TINY) == []


def test_a_folder_is_refused_by_its_card_before_anything_is_computed(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "theirs")
    write_text(folder / "README.md", "---\nlicense: cc-by-nc-nd-4.0\n---\n")
    with pytest.raises(UserError, match=r"licence of theirs \(cc-by-nc-nd-4.0\) allows no derived models"):
        open_run("setsubi", str(folder), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    write_text(folder / "README.md", "---\nlicense: mit\n---\n")
    assert open_run("setsubi", str(folder), runs=tmp_path / "runs").base.licence == "mit"
