"""The house: which way the folders lean on each other, and that none of them hides a library."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tsugiki.recipes.domains import BUNDLED, load_domain

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "tsugiki": set(),
    "adapt": set(),
    "evaluate": set(),
    "quantize": {"evaluate"},
    "recipes": {"adapt", "quantize", "evaluate"},
}
SOURCES = [p for folder in MAY_IMPORT for p in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_downward_only(path):
    own = path.relative_to(ROOT).parts[0]
    folders = {name.split(".")[1] for name in imported(path) if re.match(r"tsugiki\.(adapt|quantize|evaluate|recipes)\b", name)}
    assert folders - {own} <= MAY_IMPORT[own]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_folder_is_imported_through_the_package(path):
    assert {name.split(".")[0] for name in imported(path)}.isdisjoint({"adapt", "quantize", "evaluate", "recipes"})


def test_the_library_evaluate_is_not_hidden_by_our_folder():
    code = "import importlib.util as u; spec = u.find_spec('evaluate'); print(spec.origin if spec else 'none')"
    safe = os.environ | {"PYTHONSAFEPATH": "1"}
    for command in ([sys.executable, "-c", code], [sys.executable, "-P", "-c", code]):
        done = subprocess.run(command, cwd=ROOT, env=safe, capture_output=True, text=True, check=True)
        assert str(ROOT / "evaluate") not in done.stdout


def test_pytest_does_not_put_the_root_on_the_path():
    assert str(ROOT) not in sys.path and "" not in sys.path


def test_make_goes_through_the_console_script_and_the_safe_path():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^export PYTHONSAFEPATH *= *1", text, re.M)
    for target in ("recipe", "chat", "compare", "tiny-bases"):
        rule = re.search(rf"^{target}:.*\n((?:\t.*\n?)+)", text, re.M)
        assert rule and "$(BIN)/tsugiki " in rule.group(1), target
    assert "python -m tsugiki" not in text


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)", text, re.M).group(1).split()
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [t for t in phony if not re.search(rf"^{t}\s", shown, re.M)] == []


def test_every_domain_in_the_package_loads():
    found = sorted(BUNDLED.glob("*.yaml"))
    assert {"setsubi", "construction"} <= {p.stem for p in found}
    for path in found:
        assert load_domain(path).name == path.stem


def test_no_file_of_the_project_names_a_path_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a clone")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".json", ".html", ".txt") and path.stat().st_size < 1e6:
            found = re.findall(r"(?<![\w.$/])/(?:home|root|Users|tmp)/\w+", path.read_text(encoding="utf-8", errors="replace"))
            assert found == [], f"{name}: {found}"
