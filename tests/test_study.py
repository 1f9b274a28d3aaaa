"""A study survives its workers, is shared without harm to others' trials, and tells nobody its password."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from optuna.storages import fail_stale_trials
from optuna.trial import TrialState

from tsugiki.adapt.study import ask_point, beating, join_study, open_study, put_back, record_untold, shown_storage
from tsugiki.artifacts import read_json
from tsugiki.errors import UserError
from tsugiki.samples import write_encoded

SECRET = "Geheim%21wort"
BINARIES = [Path(found).parent for found in [shutil.which("initdb")] if found] + sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def states(study):
    return [t.state for t in study.get_trials()]


def rank():
    return {"rank": optuna.distributions.IntDistribution(1, 64)}


# --- one folder -----------------------------------------------------------------------------------------------


def test_trials_that_a_kill_left_running_are_failed_when_the_folder_is_opened_again(tmp_path):
    folder = tmp_path / "mine" / "base" / "sweep"
    study = open_study("sweep", folder)
    ask_point(study, 8, 0, "k")
    assert states(open_study("sweep", folder)) == [TrialState.FAIL]
    assert (folder / "study.sqlite3").exists()


def test_points_that_the_study_never_heard_of_are_recorded_once(tmp_path):
    study = open_study("sweep", tmp_path)
    study.tell(ask_point(study, 8, 0, "k"), 2.0)
    for _ in range(2):
        record_untold(study, {(8, 0): 2.0, (16, 1): 1.5}, "k")
    assert [(t.params["n"], t.params["seed"], t.value) for t in study.trials] == [(8, 0, 2.0), (16, 1, 1.5)]


def test_two_machines_sweeps_in_one_database_are_two_studies(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/team.db"
    here, there = (tmp_path / machine / "setsubi" / "tiny-llama" / "sweep" for machine in ("a", "b"))
    mine = open_study("sweep", here, url)
    ask_point(mine, 8, 0, "k")
    monkeypatch.setenv("TSUGIKI_STORAGE", url)
    other = open_study("sweep", there)
    assert states(mine) == [TrialState.RUNNING] and states(other) == []
    assert other.study_name != mine.study_name
    assert all(name.startswith("setsubi/tiny-llama/sweep-") for name in (mine.study_name, other.study_name))
    assert states(open_study("sweep", here)) == [TrialState.FAIL]
    assert not list(tmp_path.rglob("study.sqlite3"))


# --- many workers ---------------------------------------------------------------------------------------------


def test_joining_leaves_the_running_trials_of_others_alone(tmp_path):
    trial = join_study("search", tmp_path).ask(rank())
    study = join_study("search", tmp_path)
    assert states(study) == [TrialState.RUNNING]
    study.tell(trial.number, 1.0)
    assert study.best_value == 1.0


def test_a_trial_put_back_is_the_next_one_with_its_settings_and_is_put_back_once(tmp_path):
    study = join_study("search", tmp_path)
    trial = study.ask(rank())
    trial.set_user_attr("start", True)
    frozen = study.get_trials()[0]
    assert put_back(study, frozen)
    assert not put_back(study, frozen)
    again = study.ask(rank())
    assert again.params == trial.params and again.user_attrs["start"] and again.number == 1
    assert states(study) == [TrialState.FAIL, TrialState.RUNNING]


def test_a_trial_without_signs_of_life_goes_to_another_and_one_with_them_does_not(tmp_path):
    study = join_study("search", tmp_path, heartbeat=1)
    dead, alive = study.ask(rank()), study.ask(rank())
    study._storage.record_heartbeat(dead._trial_id)
    with beating(study, alive, 1):
        time.sleep(5)
        fail_stale_trials(study)
        assert states(study) == [TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
    assert study.ask(rank()).params == dead.params


# --- databases that cannot be used ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"postgresql://me:{SECRET}@127.0.0.1:1/team", "the database postgresql://me@127.0.0.1:1/team cannot be used"),
        (f"postgres://me@127.0.0.1:1/team?password={SECRET}", "cannot be used"),
        (f"mysql://me:{SECRET}@127.0.0.1/team", "no driver for the database mysql://me@127.0.0.1/team"),
        (f"nosuch://me:{SECRET}@127.0.0.1/team", "no driver"),
        (f"me:{SECRET}@127.0.0.1", "not a database's URL"),
        (f"postgresql://me:5/?#{SECRET}@127.0.0.1:1/team", "the database postgresql://me@127.0.0.1:1/team cannot be used"),
        (f"postgresql://me:x@{SECRET}@127.0.0.1:1/team", "not a database's URL"),
        (f"postgresql://me:x@y:{SECRET}@127.0.0.1:port/team", "not a database's URL"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_used_is_a_sentence_without_its_password(tmp_path, url, message, capfd):
    with pytest.raises(UserError, match=message) as caught:
        join_study("search", tmp_path, url)
    said = f"{caught.value}{caught.value.__cause__}{''.join(capfd.readouterr())}"
    assert SECRET not in said and "Geheim" not in said
    assert caught.value.hint


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "study.sqlite3").write_text("not a database at all, but text of some length " * 30)
    with pytest.raises(UserError, match=r"study\.sqlite3 cannot be used: file is not a database"):
        open_study("sweep", tmp_path)


def test_a_database_is_shown_without_password_and_options():
    assert shown_storage(f"postgresql://me:{SECRET}@db.example:5433/team?sslmode=require&password={SECRET}") == "postgresql://me@db.example:5433/team"
    assert shown_storage("sqlite:////srv/team.db") == "sqlite:////srv/team.db"


def test_the_command_line_refuses_an_unreachable_server_with_exit_code_two(console, tmp_path, monkeypatch):
    (tmp_path / "qa.jsonl").write_text("".join(f'{{"q": "ポンプP-{i}の点検は何か月ごとですか。", "a": "{i % 5}か月"}}\n' for i in range(60)), encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(
        "title: {ja: 試験, en: Trial}\nlicence: CC0\nsource: {jsonl: qa.jsonl}\nfields: {prompt: q, completion: a}\nnear_duplicates: null\n"
        "scoring: exact_match\nmax_new_tokens: 8\nmax_tokens: 128\nsweep: {counts: [8]}\n", encoding="utf-8")
    monkeypatch.setenv("TSUGIKI_STORAGE", f"postgresql://me:{SECRET}@127.0.0.1:1/team")
    code, out, err = console("adapt", "search", "mine.yaml", "--n", "8")
    assert code == 2
    assert "the database postgresql://me@127.0.0.1:1/team cannot be used" in err
    for text in (out, err, *(p.read_bytes().decode(errors="replace") for p in tmp_path.rglob("*") if p.is_file())):
        assert SECRET not in text


# --- a real PostgreSQL ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """The URL of a new server's empty database, with a password; it listens on 127.0.0.1."""
    pytest.importorskip("psycopg")
    place = next((p for p in BINARIES if all((p / name).exists() for name in ("initdb", "pg_ctl"))), None)
    if place is None:
        pytest.skip("PostgreSQL is not installed")
    who = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        who = {"user": "postgres", "group": "postgres", "extra_groups": []}
    folder = Path("/tmp" if os.getuid() == 0 else tmp_path_factory.mktemp("pg")) / f"tsugiki-pg-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "password").write_text(SECRET.replace("%21", "!"))
        if who:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]

        def call(*command):
            done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=(folder.parent / f"{folder.name}.log").open("ab"),
                                  stderr=subprocess.STDOUT, timeout=100, **who)
            if done.returncode:
                pytest.skip("PostgreSQL does not start here")

        call(str(place / "initdb"), "-D", str(folder / "data"), "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-E", "UTF8", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        call(str(place / "pg_ctl"), "-D", str(folder / "data"), "-w", "-l", str(folder / "server.log"), "-o", options, "start")
        try:
            yield f"postgresql://me:{SECRET}@127.0.0.1:{port}/postgres"
        finally:
            call(str(place / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


JOIN = "import sys; from pathlib import Path; from tsugiki.adapt.study import join_study; join_study('first', Path(), sys.argv[1])"
SEARCH = """
import sys
from pathlib import Path
from tsugiki.adapt.fit import FitSettings
from tsugiki.adapt.search import SearchSettings, SearchSpace, search
if __name__ == "__main__":
    base, data, out, url = sys.argv[1:]
    fit = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=24, batch_size=4, micro_batch=4, report_to="none")
    space = SearchSpace(rank=(2, 4), learning_rate=(1e-3, 2e-2), epochs=(20, 30))
    settings = SearchSettings(n=16, trials=5, space=space, fit=fit, workers=1, heartbeat=1)
    search(Path(base), Path(data), Path(out), settings, name="mine/my-base", storage=url)
"""


@contextmanager
def searching(script, *arguments):
    log = Path(arguments[-2]).with_suffix(".log")
    with log.open("w") as file:
        command = [*(["taskset", "-c", str(min(os.sched_getaffinity(0)))] if shutil.which("taskset") else []), sys.executable, "-P", str(script)]
        process = subprocess.Popen([*command, *map(str, arguments)], stdout=file, stderr=file, start_new_session=True)
        try:
            yield process, log
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(true, seconds=150):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_machines_may_open_an_empty_database_at_once(postgres, tmp_path):
    both = [subprocess.Popen([sys.executable, "-P", "-c", JOIN, postgres], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, said = process.communicate(timeout=150)
        assert process.returncode == 0, said


def test_a_wrong_password_is_a_sentence(postgres, tmp_path):
    with pytest.raises(UserError, match='password authentication failed for user "me"') as caught:
        join_study("x", tmp_path, postgres.replace(SECRET, "Andereswort"))
    assert "Andereswort" not in str(caught.value)


def test_the_password_may_come_from_libpqs_own_variable(postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", SECRET.replace("%21", "!"))
    assert join_study("y", tmp_path, postgres.replace(f":{SECRET}", "")).get_trials() == []


def test_two_machines_share_a_search_and_the_trial_of_a_killed_one_is_done_by_the_other(postgres, tmp_path):
    of_search = runpy.run_path(str(Path(__file__).with_name("test_search.py")))
    base, data = of_search["make_base"](tmp_path / "my-base"), tmp_path / "data"
    data.mkdir()
    write_encoded(data / "train.jsonl", of_search["rows"]("train", 16))
    write_encoded(data / "valid.jsonl", of_search["rows"]("valid", 14))
    script = tmp_path / "search.py"
    script.write_text(SEARCH)
    storage = join_study("looking", tmp_path, postgres)._storage

    def trials():
        names = [s.study_name for s in storage.get_all_studies() if s.study_name.startswith("mine/my-base/search-n16-")]
        return optuna.load_study(study_name=names[0], storage=storage).get_trials() if names else []

    with (searching(script, base, data, tmp_path / "one", postgres) as (one, _),
          searching(script, base, data, tmp_path / "two", postgres) as (two, log)):
        mine = f"{one.pid}-"
        until(lambda: any(t.state == TrialState.RUNNING and t.intermediate_values and t.user_attrs["owner"].startswith(mine) for t in trials()))
        os.kill(one.pid, signal.SIGKILL)  # its worker sees that and ends
        assert two.wait(400) == 0, log.read_text()
    found = trials()
    (killed,) = [t for t in found if t.state == TrialState.FAIL and "why" not in t.user_attrs]
    again = next(t for t in found if t.number > killed.number and t.params == killed.params)
    assert again.state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert killed.user_attrs["owner"].startswith(mine) and again.user_attrs["owner"].startswith(f"{two.pid}-")
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in found) == 5
    assert not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in found)
    result = read_json(tmp_path / "two" / "search.json")
    assert len(result["trials"]) == 5 and result["start"] is not None
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
