"""Tasks on a Ray cluster of three nodes in this machine: results as in one process, once each, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read at import: or else Ray takes the machine's address for 127.0.0.1
ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from tsugiki import cluster, pool  # noqa: E402
from tsugiki.adapt.fit import FitSettings  # noqa: E402
from tsugiki.adapt.sweep import SweepSettings, run_sweep  # noqa: E402
from tsugiki.artifacts import read_json, read_jsonl  # noqa: E402
from tsugiki.cluster import connected  # noqa: E402
from tsugiki.errors import UserError  # noqa: E402
from tsugiki.evaluate.run import BenchmarkSettings, find_models, items_path, model_folder, run_benchmarks  # noqa: E402
from tsugiki.evaluate.suites import load_benchmarks  # noqa: E402
from tsugiki.pool import Task, TaskError, run_tasks  # noqa: E402
from tsugiki.quantize.convert import convert  # noqa: E402
from tsugiki.samples import EncodedSample, write_encoded  # noqa: E402

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
FIT = FitSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=2, batch_size=4, micro_batch=4, report_to="none")

CALLS = """
import os, platform, signal, sys, time
from pathlib import Path
from tsugiki.errors import UserError
from tsugiki.pool import tell_progress

def copy(source, folder, name, threads, progress_file):
    tell_progress(progress_file, 1, 2, "half")
    out = folder / name
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "copy").write_bytes((source / "a" / "letters").read_bytes() + (folder / "earlier").read_bytes())
    (out / "empty").touch()
    return str(source), str(out), threads

def kill_once(log, out, threads, progress_file):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    if len(Path(log).read_text().split()) == 1:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    out.write_text("whole")

def slow(log, threads, progress_file):
    Path(log).write_text(str(os.getpid()))
    time.sleep(60)

def refused(log, threads, progress_file):
    while not Path(log).exists():
        time.sleep(0.05)
    raise UserError("it is empty", where="data.jsonl:7", hint="Fill it.")

def wrong(threads, progress_file):
    return {}["absent"]

def found_evaluate(threads, progress_file):
    from importlib.util import find_spec
    return find_spec("evaluate").origin
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a cluster of three nodes of one CPU each, on the loopback interface."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "calls_on_ray.py").write_text(CALLS)
    changed = {
        "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
        "RAY_memory_monitor_refresh_ms": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    patch = pytest.MonkeyPatch()
    for name, value in changed.items():
        patch.setenv(name, value)
    patch.syspath_prepend(folder)
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20, "include_dashboard": False}
    machines = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(2):
            machines.add_node(num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=100 << 20)
        yield machines.address
    finally:
        machines.shutdown()
        patch.undo()


@pytest.fixture
def calls(address):
    import calls_on_ray

    return calls_on_ray


def gone(pid):
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# --- tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_auto_starts_a_cluster_that_only_this_machine_reaches_and_that_ends_with_the_work(tmp_path):
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "calls_on_ray.py").write_text(CALLS)
    (tmp_path / "run.py").write_text(
        "import psutil\nfrom tsugiki.cluster import connected\nfrom tsugiki.pool import Task, run_tasks\n"
        "import calls_on_ray\n"
        "with connected('auto'):\n"
        "    print(next(run_tasks([Task('evaluate', calls_on_ray.found_evaluate, ())], 1))[1])\n"
        "    import ray\n"
        "    print({n['NodeManagerAddress'] for n in ray.nodes()})\n"
        "    family = psutil.Process().children(recursive=True)\n"
        "    print({c.laddr.ip.removeprefix('::ffff:') for p in family for c in p.net_connections() if c.status == 'LISTEN'})\n"
        "psutil.wait_procs(family, timeout=20)\n"
        "print([p for p in family if p.is_running() and p.status() != 'zombie'])\n"
    )
    with tempfile.TemporaryDirectory() as short:  # sockets lie in it, whose names may not be long
        # An address of its own: or else `auto` would find clusters of others here.
        places = {"RAY_TMPDIR": short, "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "calls"), "PYTHONSAFEPATH": "1"}
        env = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} | places
        done = subprocess.run([sys.executable, tmp_path / "run.py"], env=env, cwd=BASE.parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, nodes, listening, left = done.stdout.splitlines()[-4:]
    assert "site-packages" in found  # our folder `evaluate`, in the working directory, does not hide it
    assert (nodes, listening, left) == ("{'127.0.0.1'}", "{'127.0.0.1'}", "[]")


def test_what_nodes_lack_is_sent_and_what_tasks_make_is_landed_once(calls, address, tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    (source / "a" / "letters").write_bytes(b"abc" * 1000)
    (source / "nothing").touch()
    earlier = tmp_path / "out" / "earlier"  # read where the tasks write
    earlier.parent.mkdir()
    earlier.write_bytes(b"def")
    offer = cluster._offer

    def offered_to_other_machines(tasks):
        offered = {path: (value, cluster._pack(Path(path), ray.put)) for path, (value, _) in offer(tasks).items()}
        source.rename(tmp_path / "elsewhere")
        return offered

    monkeypatch.setattr(cluster, "_offer", offered_to_other_machines)
    tasks = [Task(name, calls.copy, (source, earlier.parent, name), reads=(source, earlier), writes=(earlier.parent / name,)) for name in "012"]
    with connected(address):
        found = dict(run_tasks(tasks, 1))
    assert set(found) == set(tasks)
    for task in tasks:
        place, out, threads = found[task]
        assert Path(place).name == "source" and Path(place) != source and Path(out) != earlier.parent / task.label and threads == 1
        assert not Path(place).exists() and not Path(out).exists()  # the copies went with the session
        assert (earlier.parent / task.label / "deep" / "copy").read_bytes() == b"abc" * 1000 + b"def"
        assert (earlier.parent / task.label / "empty").read_bytes() == b""
    assert sorted(p.name for p in earlier.parent.iterdir()) == ["0", "1", "2", "earlier"]


def test_a_node_has_only_what_is_the_same_at_the_same_path(tmp_path):
    (tmp_path / "a").write_text("1")
    value = cluster.tree_digest(tmp_path)
    assert cluster._survey([], {str(tmp_path): value, str(tmp_path / "b"): value})[1]["at_hand"] == [str(tmp_path)]
    (tmp_path / "a").write_text("2")
    assert cluster._survey([], {str(tmp_path): value})[1]["at_hand"] == []


def test_a_killed_worker_is_tried_again(calls, address, tmp_path):
    with connected(address):
        list(run_tasks([Task("killed", calls.kill_once, (tmp_path / "log", tmp_path / "out"), writes=(tmp_path / "out",))], 1))
    assert len(set((tmp_path / "log").read_text().split())) == 2
    assert (tmp_path / "out").read_text() == "whole"


def test_a_users_mistake_comes_through_and_the_others_are_cancelled(calls, address, tmp_path):
    log = tmp_path / "log"
    tasks = [Task("slow", calls.slow, (log,)), Task("refused", calls.refused, (log,))]
    with connected(address):
        with pytest.raises(TaskError) as caught:
            list(run_tasks(tasks, 1))
        assert gone(int(log.read_text()))
        with pytest.raises(KeyError, match="absent"):
            list(run_tasks([Task("wrong", calls.wrong, ())], 1))
    assert (caught.value.message, caught.value.where, caught.value.hint) == ("refused: it is empty", "data.jsonl:7", "Fill it.")
    assert caught.value.task is tasks[1]


# --- a sweep ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 12)):
        write_encoded(folder / f"{split}.jsonl", [
            EncodedSample(f"{split}{i}", "問", "答" * (1 + i % 4), f"{split}{i // 2}", ("rule", "fact")[i % 2],
                          rng.integers(0, 6000, 3 + i).tolist(), rng.integers(0, 50, 2 + i % 5).tolist())
            for i in range(count)
        ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def here(data, tmp_path_factory):
    """A sweep in process, one thread a point as on the nodes."""
    out = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "cpu_count", lambda: 1)
        return out, run_sweep(BASE, data, out, SETTINGS)


SETTINGS = SweepSettings(counts=(8, 16), workers=1, train_items=5, fit=FIT)


def trials(out):
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{out / 'study.sqlite3'}")
    return sorted((t.params["n"], t.value) for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))


def test_a_sweep_on_three_nodes_gives_the_bytes_of_the_sweep_in_process(here, data, address, tmp_path):
    out, result = here
    with connected(address):
        found = run_sweep(BASE, data, tmp_path, SETTINGS)
    assert sorted(p.name for p in (tmp_path / "points").iterdir()) == ["base", "n000008-s0", "n000016-s0"]
    for point in ("base", "n000008-s0", "n000016-s0"):
        assert (tmp_path / "points" / point / "nats.npy").read_bytes() == (out / "points" / point / "nats.npy").read_bytes()
    for name in ("adapter_model.safetensors", "base.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (out / "adapter" / name).read_bytes()
    assert found["optimum"] == result["optimum"]
    assert trials(tmp_path) == trials(out)


def test_a_point_killed_in_mid_fit_goes_on_from_its_checkpoint_and_is_there_once(data, address, tmp_path):
    settings = replace(SETTINGS, counts=(16,), fit=replace(FIT, epochs=15, checkpoint_minutes=1e-9))  # 60 steps
    killed = []

    def kill():
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            if list(Path(tempfile.gettempdir()).glob(f"tsugiki-*/*/files/{str(tmp_path).lstrip('/')}/unfinished/*/last.json")):
                for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        if cmdline.read_bytes().startswith(b"ray::16 samples"):
                            os.kill(int(cmdline.parent.name), signal.SIGKILL)
                            killed.append(cmdline)
                    except OSError:
                        continue
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    with connected(address):
        run_sweep(BASE, data, tmp_path, settings)
    killer.join()
    assert killed
    point = read_json(tmp_path / "points" / "n000016-s0" / "point.json")
    assert 0 < point["resumed_at"] < 60 and point["point"]["steps"] == 60
    assert sorted(p.name for p in (tmp_path / "points").iterdir()) == ["base", "n000016-s0"]
    assert [n for n, _ in trials(tmp_path)] == [16]


# --- an evaluation ----------------------------------------------------------------------------------------------

TASK = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
"""
OPTIONS = TASK + """\
output_type: multiple_choice
doc_to_text: "問い：{{question}}\\n答え："
doc_to_choice: options
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, bos: never}
"""
ANSWERS = TASK + """\
output_type: generate_until
doc_to_text: "問い：{{question}}\\n答え："
doc_to_target: "{{options[1]}}"
generation_kwargs: {until: ["。"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0, bos: model}
"""


def test_models_and_tasks_on_the_nodes_give_the_files_of_the_run_in_process(address, tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    rows = [{"id": f"q{i}", "question": f"{i}番の設備の点検は何か月ごとですか。", "options": ["毎日", "三か月", "年に一度"], "gold": i % 3} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    for name, text in (("options", OPTIONS), ("answers", ANSWERS)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path / "rows.jsonl")).replace("NAME", name), encoding="utf-8")
    convert(BASE, tmp_path / "one.gguf")
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes())
    models = find_models([str(tmp_path / "one.gguf"), str(tmp_path / "two.gguf")])
    benchmarks, _ = load_benchmarks((), ["options", "answers"], include=[tmp_path / "tasks"])
    settings = BenchmarkSettings(n_gpu_layers=0)
    expected = run_benchmarks(models, benchmarks, settings, out=tmp_path / "here")
    said = []
    with connected(address):
        found = run_benchmarks(models, benchmarks, settings, out=tmp_path / "there", say=said.append)
    assert found == expected and len(said) == 4
    for model in ("one", "two"):
        for task in ("options", "answers"):
            here, there = (read_jsonl(items_path(tmp_path / place, model, task)) for place in ("here", "there"))
            assert there == here and [i["id"] for i in here] == [r["id"] for r in rows]
        results = [read_json(next(model_folder(tmp_path / place, model).glob("results_*.json"))) for place in ("here", "there")]
        assert results[0]["results"] == results[1]["results"] and list(results[1]["results"]) == ["options", "answers"]
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["one", "requests.sqlite", "two"]
    assert kept(tmp_path / "there") == kept(tmp_path / "here")


def test_a_run_that_goes_on_gives_tasks_the_requests_finished_before_in_a_file_that_stays_as_it_is(tmp_path, monkeypatch):
    """The nodes go by its hash, and the results of the first task are merged while others have not begun."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"id": f"q{i}", "question": f"{i}番の設備は何か月ごとですか。", "options": ["毎日", "三か月", "年に一度"], "gold": i % 3} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    for name, text in (("options", OPTIONS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path / "rows.jsonl")).replace("NAME", name), encoding="utf-8")
    convert(BASE, tmp_path / "one.gguf")
    models = find_models([str(tmp_path / "one.gguf")])
    monkeypatch.chdir(tmp_path)
    benchmarks, _ = load_benchmarks((), ["options", "answers.yaml"], include=[Path(".")])
    monkeypatch.chdir(tmp_path.parent)  # a node's workers are elsewhere
    run_benchmarks(models, benchmarks, BenchmarkSettings(limit=2, n_gpu_layers=0), out=tmp_path / "out")
    before = kept(tmp_path / "out")

    def one_by_one(tasks, workers, note):
        offered = {path: cluster.tree_digest(path) for task in tasks for path in task.reads}
        (copy,) = (path for path in offered if path.name == "requests.sqlite")
        assert kept(copy.parent) == before
        for task in tasks:
            yield from pool.run_here([task], workers, note)
            assert {path: cluster.tree_digest(path) for path in offered} == offered

    token = pool.runner.set(one_by_one)
    try:
        run_benchmarks(models, benchmarks, BenchmarkSettings(n_gpu_layers=0), out=tmp_path / "out")
    finally:
        pool.runner.reset(token)
    assert len(kept(tmp_path / "out")) > len(before)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "requests.sqlite"]


def kept(folder):
    """Finished requests of a run, without the seconds they took."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(folder / "requests.sqlite")) as store:
        return [(key, json.loads(value) | {"seconds": 0}) for key, value in store.execute("SELECT key, value FROM results ORDER BY key")]


# --- room and refusals ------------------------------------------------------------------------------------------


def node(**resources):
    return {"Alive": True, "Resources": resources}


def test_tasks_share_the_nodes_that_they_fit():
    cards = [Task(str(i), print, (), gpus=1) for i in range(3)]
    assert set(cluster._needs([node(CPU=8, GPU=2), node(CPU=64)], cards).values()) == {(4, 1)}
    assert set(cluster._needs([node(CPU=8), node(CPU=4)], cards).values()) == {(4, 0)}  # no GPU anywhere
    assert set(cluster._needs([node(CPU=2), node(CPU=16)], cards[:1]).values()) == {(16, 0)}
    two = Task("two", print, (), cpus=3, gpus=2)
    assert cluster._needs([node(CPU=8, GPU=2), node(CPU=8, GPU=1)], [two, cards[0]]) == {two: (3, 2), cards[0]: (4, 1)}
    with pytest.raises(UserError, match="large needs 16 CPUs and 0 GPUs") as caught:
        cluster._needs([node(CPU=8), {"Alive": False, "Resources": {"CPU": 32}}], [Task("large", print, (), cpus=16)])
    assert "The largest have 8 CPUs and 0 GPUs." in str(caught.value)
    with pytest.raises(UserError, match="four needs 1 CPUs and 4 GPUs"):  # not done without a GPU where there are some
        cluster._needs([node(CPU=8, GPU=2), node(CPU=8)], [Task("four", print, (), gpus=4)])


@pytest.mark.parametrize(("address", "message"), [("127.0.0.1:9", "127.0.0.1:9 cannot be reached"), ("somewhere", "takes auto, HOST:PORT")])
def test_an_address_where_nobody_listens_is_told_at_once(address, message):
    began = time.monotonic()
    with pytest.raises(UserError, match=message), connected(address):
        pass
    assert time.monotonic() - began < 11


def test_without_the_extra_the_command_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed") as caught, connected("auto"):
        pass
    assert "pip install 'tsugiki[ray]'" in caught.value.hint


def test_without_an_address_tasks_run_here(tmp_path):
    with connected(None):
        assert pool.runner.get() is pool.run_here
