"""A built wheel carries everything and works in a clean environment outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"COLUMNS": "80"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    # Built from what git would carry, so that nothing of this clone's own gets in and nothing is written into it.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        cwd=out, env=CLEAN | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel; the dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel],
        env=CLEAN, check=True,
    )
    site = next((folder / "lib").glob("python*/site-packages"))
    # A path in a .pth file is added, its own .pth files are not read: the editable install of this clone stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    work = folder.parent / "elsewhere"
    work.mkdir(exist_ok=True)
    return subprocess.run([folder / "bin" / "tsugiki", *arguments], cwd=work, env=CLEAN, capture_output=True, text=True)


def test_the_wheel_holds_every_module_domain_base_and_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("tsugiki", "adapt", "quantize", "evaluate", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".html", ".json", ".jinja", ".j2", ".safetensors", ".md", ".csv", ".h"):
                inside = path.relative_to(ROOT).as_posix()
                assert (inside if folder == "tsugiki" else f"tsugiki/{inside}") in names


def test_the_wheel_holds_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"tsugiki"}
    assert [n for n in names if "test" in Path(n).name.lower() or n.endswith((".pyc", ".log"))] == []
    assert any(n.endswith("licenses/LICENSE") for n in names) and any(n.endswith("licenses/NOTICE") for n in names)


def test_the_installed_kit_is_the_wheels_and_not_the_clones(installed):
    code = "import tsugiki, tsugiki.recipes.recipe as r; print(tsugiki.__file__); print(r.__file__)"
    done = subprocess.run([installed / "bin" / "python", "-P", "-c", code], cwd=installed, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(installed)) for line in done.stdout.split())


def test_help_and_list_work_away_from_the_repository(installed):
    helped = run(installed, "--help")
    assert helped.returncode == 0 and "recipe" in helped.stdout
    listed = run(installed, "recipe", "list")
    assert listed.returncode == 0, listed.stderr
    for name in ("setsubi", "construction", "tiny-llama", "tiny-qwen", "tiny-llmjp", "sweep.epochs"):
        assert name in listed.stdout


def test_the_wheels_own_domain_and_base_run(installed):
    # The smallest real work: setsubi's samples as token ids of the bundled base.
    done = run(installed, "recipe", "data", "setsubi")
    assert done.returncode == 0, done.stderr
    assert (installed.parent / "elsewhere" / "runs" / "setsubi" / "tiny-llama" / "data" / "train.jsonl").exists()
