"""A stage runs when something it depends on changed, and only then; a failed stage is not done."""

import subprocess
import sys

import pytest

from tsugiki.artifacts import digest, read_json, sha256_file, write_text
from tsugiki.errors import UserError
from tsugiki.recipes import stages
from tsugiki.recipes.stages import alone, code_digest, run_stage, stage_hash


class Stage:
    """A stage that writes its inputs to a file and counts how often it ran."""

    def __init__(self, folder, **options):
        self.folder, self.options, self.runs, self.seen = folder, options, 0, []

    def __call__(self, inputs, *, fails=False):
        def work(folder):
            self.seen.append(sorted(p.name for p in folder.iterdir()))
            self.runs += 1
            write_text(folder / "out.txt", digest(inputs))
            if fails:
                raise UserError("the disk is full")
            write_text(folder / "parts" / "a.txt", "part")
            return [folder / "out.txt", folder / "parts"]

        return run_stage(self.folder, inputs, work, **self.options)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "run" / "sweep")


def test_it_runs_once(stage):
    assert stage({"n": 1}) is True
    assert stage({"n": 1}) is False
    assert stage.runs == 1


def test_an_equal_input_is_the_same_input(stage):
    assert stage({"a": [1, 2], "b": {"c": None}}) is True
    assert stage({"b": {"c": None}, "a": (1, 2)}) is False


@pytest.mark.parametrize("changed", [{"n": 2}, {"n": 1, "m": 0}, {}, {"n": "1"}, {"n": 1.5}])
def test_a_changed_input_runs_it_again(stage, changed):
    stage({"n": 1})
    assert stage(changed) is True
    assert (stage.folder / "out.txt").read_text() == digest(changed)
    assert stage({"n": 1}) is True


def test_a_lost_or_cut_output_runs_it_again(stage):
    stage({"n": 1})
    (stage.folder / "out.txt").unlink()
    assert stage({"n": 1}) is True
    (stage.folder / "out.txt").write_text("cut")
    assert stage({"n": 1}) is True
    (stage.folder / "parts" / "a.txt").unlink()
    assert stage({"n": 1}) is True
    assert stage({"n": 1}) is False


def test_a_change_upstream_runs_what_depends_on_it_and_nothing_else(tmp_path):
    upstream, other = Stage(tmp_path / "data"), Stage(tmp_path / "bases")
    below, aside = Stage(tmp_path / "sweep"), Stage(tmp_path / "report")
    for rows in (1, 2):
        upstream({"rows": rows})
        other({"base": "tiny-llama"})
        below({"data": stage_hash(upstream.folder)})
        aside({"bases": stage_hash(other.folder)})
    assert [s.runs for s in (upstream, other, below, aside)] == [2, 1, 2, 1]


def test_an_upstream_stage_that_ran_again_with_the_same_outputs_changes_nothing(tmp_path):
    def run(comment):
        def work(folder):
            write_text(folder / "out.txt", "same")
            return [folder / "out.txt"]

        run_stage(tmp_path / "data", {"comment": comment}, work)
        return stage_hash(tmp_path / "data")

    assert run("one") == run("two")


def test_a_stage_that_was_not_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"stage 'data' has not been run") as caught:
        stage_hash(tmp_path / "data")
    assert "--stages" in caught.value.hint


def test_failed_work_is_not_done_and_leaves_what_an_earlier_run_made(stage):
    stage({"n": 1})
    with pytest.raises(UserError, match="disk is full"):
        stage({"n": 2}, fails=True)
    assert (stage.folder / "out.txt").read_text() == digest({"n": 1})
    assert stage({"n": 1}) is False
    assert stage({"n": 2}) is True
    assert (stage.folder / "out.txt").read_text() == digest({"n": 2})


def test_a_first_run_that_fails_leaves_nothing_that_looks_done(stage):
    with pytest.raises(UserError):
        stage({"n": 1}, fails=True)
    assert not (stage.folder / "stage.json").exists()
    with pytest.raises(UserError, match="has not been run"):
        stage_hash(stage.folder)
    assert stage({"n": 1}) is True


def test_a_stage_that_works_in_its_own_folder_is_not_done_after_a_failure(tmp_path):
    stage = Stage(tmp_path / "sweep", keep_partial=True)
    stage({"n": 1})
    with pytest.raises(UserError):
        stage({"n": 2}, fails=True)
    assert not (stage.folder / "stage.json").exists()
    assert stage({"n": 1}) is True


def test_a_finished_stage_leaves_no_other_folder_beside_its_own(stage):
    for n in (1, 2):
        stage({"n": n})
    assert [p.name for p in stage.folder.parent.iterdir()] == ["sweep"]


def test_what_depends_on_one_file_ignores_the_others(tmp_path):
    def run(table, note):
        def work(folder):
            write_text(folder / "table.txt", table)
            write_text(folder / "note.txt", note)
            return [folder / "table.txt", folder / "note.txt"]

        run_stage(tmp_path / "data", {"t": table, "n": note}, work)
        return stage_hash(tmp_path / "data", "table.txt"), stage_hash(tmp_path / "data")

    (table, whole), (same, other) = run("1", "a"), run("1", "b")
    assert table == same
    assert whole != other
    assert run("2", "b")[0] != table


def test_a_run_is_held_by_one_process_and_let_go_by_a_killed_one(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom tsugiki.recipes.stages import alone\n"
        "with alone(Path(sys.argv[1])):\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(UserError, match="another process"), alone(tmp_path / "run"):
            pass
        other.kill()
    with alone(tmp_path / "run"):
        pass


def test_a_stage_starts_in_an_empty_folder_unless_it_keeps_what_it_can_use(tmp_path):
    fresh, resuming = Stage(tmp_path / "data"), Stage(tmp_path / "sweep", keep_partial=True)
    for stage in (fresh, resuming):
        with pytest.raises(UserError):
            stage({"n": 1}, fails=True)
        stage({"n": 1})
        stage({"n": 2})
    assert fresh.seen == [[], [], []]
    assert resuming.seen == [[], ["out.txt"], ["out.txt", "parts"]]


def test_its_record_says_what_it_read_wrote_and_cost(stage):
    stage({"n": 1})
    record = read_json(stage.folder / "stage.json")
    assert record["stage"] == "sweep"
    assert record["inputs"] == {"n": 1}
    assert record["seconds"] >= 0
    assert record["peak_rss"] > 1_000_000
    assert [(o["path"], o["bytes"]) for o in record["outputs"]] == [("out.txt", 64), ("parts", 4)]
    assert record["outputs"][0]["sha256"] == sha256_file(stage.folder / "out.txt")


def test_an_output_that_was_not_written_is_an_error_and_not_done(tmp_path):
    with pytest.raises(FileNotFoundError):
        run_stage(tmp_path / "data", {}, lambda folder: [folder / "absent.txt"])
    assert not (tmp_path / "data" / "stage.json").exists()


def test_code_is_known_by_its_content():
    assert code_digest("tsugiki.adapt.nll") == code_digest("tsugiki.adapt.nll")
    assert code_digest("tsugiki.adapt.nll") != code_digest("tsugiki.adapt.fit")


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """A kit of three modules, of which the first imports the second in a function, and the second the third."""
    sources = {
        "tsugiki.one": "def work():\n    from tsugiki.two import number\n    return number\n",
        "tsugiki.two": "import tsugiki.three\nnumber = 1  # of them\n",
        "tsugiki.three": '"""Says little."""\n\n\ndef third() -> int:\n    """Three."""\n    return 3\n',
    }

    def write(name, text):
        version = len(list(tmp_path.iterdir()))  # a file of its own: what was read is remembered
        files[name] = tmp_path / f"{version}.py"
        files[name].write_text(text, encoding="utf-8")

    files = {}
    for name, text in sources.items():
        write(name, text)
    monkeypatch.setattr(stages, "_source", files.get)
    return write


def test_a_change_in_whatever_is_imported_counts(kit):
    before = code_digest("tsugiki.one")
    kit("tsugiki.three", "def third() -> int:\n    return 4\n")
    assert code_digest("tsugiki.one") != before


def test_words_and_layout_of_the_code_do_not_count(kit):
    before = code_digest("tsugiki.one")
    kit("tsugiki.three", '"""Says more."""\n\ndef third() -> int:\n    # three\n    return (3)\n')
    assert code_digest("tsugiki.one") == before


def test_what_a_stage_computes_with_is_in_its_key():
    """The modules that a list kept by hand once left out."""
    found = set()
    waiting = ["tsugiki.recipes.before_after"]
    while waiting:
        name = waiting.pop()
        if name not in found and (path := stages._source(name)):
            found.add(name)
            waiting += stages._read_code(path)[1]
    assert {"tsugiki.evaluate.metrics", "tsugiki.evaluate.data", "tsugiki.evaluate.suites", "tsugiki.intervals"} <= found
    assert "tsugiki.recipes.recipe" not in found  # which would be everything
