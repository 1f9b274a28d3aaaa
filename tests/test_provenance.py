"""Which data a score is from: a hub's revision is the commit that the hub gave, a folder's files go by their hash, and a
GitHub commit is never taken for a revision. The hub is a server on the loopback interface."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import pytest

from tsugiki.artifacts import digest, read_json
from tsugiki.errors import UserError
from tsugiki.evaluate.data import SETS, load_set, reading
from tsugiki.evaluate.suites import load_benchmarks
from tsugiki.quantize.convert import convert
from tsugiki.results import read_results

ROOT = Path(__file__).resolve().parents[1]
NEWEST, OLDER = "a" * 40, "b" * 40
CARD = """\
---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.parquet}
  - {split: test, path: main/test.parquet}
---
"""


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def questions(n: int, word: str) -> list[dict]:
    choices = {"text": ["water", "stone", "light", "wood"], "label": ["A", "B", "C", "D"]}
    return [{"id": str(i), "question_stem": f"{word} {i} is made of", "choices": choices, "answerKey": "ABCD"[i % 4]} for i in range(n)]


def repository(word: str) -> dict[str, bytes]:
    return {"README.md": CARD.encode(), "main/train.parquet": parquet(questions(6, word)), "main/test.parquet": parquet(questions(3, word))}


class Hub(BaseHTTPRequestHandler):
    """Data sets of one commit each, and one (allenai/openbookqa) of two: main is the newest."""

    protocol_version = "HTTP/1.1"
    sets: dict[str, dict[str, dict[str, bytes]]]

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == [""]:
            return self.answer(200)
        api = parts[0] == "api"
        _, owner, name, *rest = parts[1:] if api else parts
        commits = self.sets.get(f"{owner}/{name}")
        if commits is None:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        rev = rest[1] if len(rest) > 1 else "main"
        commit = next(iter(commits)) if rev == "main" else rev
        if commit not in commits:
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        files = commits[commit]

        def entry(path: str) -> dict:
            return {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}

        if api and (not rest or rest[0] == "revision"):
            return self.json({"_id": "0", "id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": f} for f in files], "tags": []})
        if api and rest[0] == "tree":
            under = "/".join(rest[2:])
            return self.json([entry(f) for f in files if f.startswith(under)])
        if api and rest[0] == "paths-info":
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            wanted = json.loads(asked)["paths"] if asked.startswith("{") else [v for k, v in (p.split("=") for p in unquote(asked).split("&")) if k == "paths"]
            folders = [{"type": "directory", "path": w, "oid": "0" * 40} for w in wanted if any(f.startswith(w + "/") for f in files)]
            return self.json([entry(w) for w in wanted if w in files] + folders)
        path = "/".join(rest[2:])
        if rest[0] != "resolve" or path not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(files[path]).hexdigest()
        return self.answer(200, files[path], ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")

    do_HEAD = do_POST = do_GET


@pytest.fixture(scope="module")
def hub():
    handler = type("Sets", (Hub,), {"sets": {
        "allenai/openbookqa": {NEWEST: repository("Thing"), OLDER: repository("Item")}, "me/mine": {"c" * 40: repository("Mine")},
    }})  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base.gguf"
    convert(ROOT / "recipes" / "bases" / "tiny-llama", path)
    return path


MINE = """\
task: try_mine
dataset_path: me/mine
dataset_name: main
test_split: test
output_type: multiple_choice
doc_to_text: question_stem
doc_to_choice: "{{choices.text}}"
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answerKey)}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


def evaluate(hub: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """``tsugiki evaluate run`` in a process of its own that knows this hub alone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TSUGIKI_DATA"))}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1", "PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    command = [sys.executable, "-P", "-c", "from tsugiki.recipes.cli import main; main()", "evaluate", "run", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def kept(folder: Path, name: str) -> dict:
    """The settings beside a task's score, the same in the results table and in lm-eval's JSON."""
    (row,) = [r for r in read_results(folder / "runs" / "results.sqlite") if r["settings"]["task"] == name and r["metric"] == "acc"]
    newest = max((folder / "runs" / "benchmarks" / "base").glob("results_*.json"))
    assert read_json(newest)["tsugiki"][name] == row["settings"]
    return row["settings"]


def test_the_commit_that_the_hub_gave_is_kept_with_the_score(hub, gguf, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.yaml").write_text(MINE, encoding="utf-8")
    done = evaluate(hub, tmp_path, gguf, "--tasks", "tsugiki_saito_openbookqa,try_mine", "--include", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    ours, theirs = kept(tmp_path, "tsugiki_saito_openbookqa")["data"], kept(tmp_path, "try_mine")["data"]
    assert ours == {"hub_id": "allenai/openbookqa", "revision": "not pinned", "github": None, "commit": None,
                    "read": [{"set": "openbookqa", "from": "hub", "hub_id": "allenai/openbookqa", "revision": NEWEST}]}  # fmt: skip
    assert theirs["hub_id"] == "me/mine" and theirs["read"] == [{"set": "me/mine", "from": "hub", "hub_id": "me/mine", "revision": "c" * 40}]


def test_a_revision_can_be_asked_for_and_one_that_is_not_there_is_an_error(hub, gguf, tmp_path):
    pinned = "--revision", f"tsugiki_saito_openbookqa={OLDER}"
    done = evaluate(hub, tmp_path, gguf, "--tasks", "tsugiki_saito_openbookqa", *pinned)
    assert done.returncode == 0, done.stderr
    data = kept(tmp_path, "tsugiki_saito_openbookqa")["data"]
    assert data["revision"] == data["read"][0]["revision"] == OLDER
    (samples,) = (tmp_path / "runs" / "benchmarks" / "base").glob("samples_*.jsonl")
    assert "Item 0 is made of" in samples.read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(MINE, encoding="utf-8")
    refused = evaluate(hub, tmp_path, gguf, "--tasks", f"{tmp_path / 'mine.yaml'}", "--revision", f"{tmp_path / 'mine.yaml'}={'d' * 40}")
    assert refused.returncode != 0 and "d" * 40 in refused.stderr


def test_a_revision_that_would_be_ignored_is_refused(console, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = tmp_path / "rows" / "test.jsonl"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps(r) + "\n" for r in questions(3, "Mine")), encoding="utf-8")
    for name, path in (("try_file", f"json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}"), ("try_folder", str(rows.parent))):
        task = MINE.replace("me/mine\ndataset_name: main", path).replace("try_mine", name)
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
    loaded, _ = load_benchmarks((), ["try_file", "try_folder"], include=[tmp_path])
    assert [b.data() for b in loaded] == 2 * [{"hub_id": None, "revision": None, "github": None, "commit": None, "read": []}]
    asked = "evaluate", "run", gguf, "--tasks", "try_file,try_folder", "--include", tmp_path
    for revision, said in (("other=main", "other: this task was not chosen"), ("main", "Write TASK=REV"),
                           ("try_file=main", "loads no data set of the hub"), ("try_folder=main", "loads no data set of the hub")):  # fmt: skip
        code, _, err = console(*asked, "--revision", revision)
        assert code == 2 and said in " ".join(err.split())


def test_without_a_network_what_the_cache_holds_is_used_and_the_rest_is_said_at_once(hub, gguf, tmp_path):
    asked = gguf, "--tasks", "tsugiki_saito_openbookqa"
    assert evaluate(hub, tmp_path, *asked).returncode == 0
    again = evaluate("http://127.0.0.1:9", tmp_path, *asked)
    assert again.returncode == 0, again.stderr
    assert kept(tmp_path, "tsugiki_saito_openbookqa")["data"]["read"][0]["revision"] == NEWEST
    missing = evaluate("http://127.0.0.1:9", tmp_path, gguf, "--tasks", "tsugiki_saito_hellaswag,tsugiki_saito_mmlu,tsugiki_saito_triviaqa")
    assert missing.returncode != 0 and " ".join(missing.stderr.split()).count("http://127.0.0.1:9 does not answer") == 3
    assert "Retrying" not in missing.stderr  # each set would try for 23 s


def test_a_folders_files_go_by_their_hash_and_have_no_revision(tmp_path):
    folder = tmp_path / "benchmarks" / "gsm8k"
    folder.mkdir(parents=True)
    lines = json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n"
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    with reading() as seen:
        load_set("gsm8k", tmp_path)
    sha = hashlib.sha256(lines.encode()).hexdigest()
    files = {f"benchmarks/gsm8k/{split}.jsonl": sha for split in ("train", "test")}
    assert seen.rows() == [{"set": "gsm8k", "from": "folder", "sha256": digest(files)}]
    with reading("main"), pytest.raises(UserError, match="was asked for, and the set lies in"):
        load_set("gsm8k", tmp_path)
    with reading("main"), pytest.raises(UserError, match="is not read from the hub"):
        load_set("lawqa_jp", tmp_path)


def test_a_sets_github_commit_and_hub_revision_are_two_things():
    gsm8k = SETS["gsm8k"]
    assert gsm8k.published == ("openai/grade-school-math", "3101c7d50724") and (gsm8k.hub_id, gsm8k.revision) == ("openai/gsm8k", None)
    assert SETS["openbookqa"].published is None and SETS["lawqa_jp"].hub_id is None
    assert all(s.published or s.hub_id or s.name == "wmt20" for s in SETS.values())
