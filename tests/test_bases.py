"""Bases: the list, from a name to a folder, and what a folder's files say."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tsugiki import bases as module
from tsugiki.bases import Base, check_folder, count_parameters, fingerprint, load_bases, profile, resolve
from tsugiki.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
BASES = load_bases(RECIPES / "bases.yaml")
BUNDLED = [n for n, b in BASES.items() if b.path]

# Shapes as their config.json prints them (read on the hub's pages), for the counts in bases.yaml.
LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
QWEN25_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
LLMJP3_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 99584, "tie_word_embeddings": False,
}  # fmt: skip
LLMJP3_13B = {
    "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
    "num_key_value_heads": 40, "vocab_size": 99584, "tie_word_embeddings": False,
}  # fmt: skip
SARASHINA22_3B = {
    "model_type": "llama", "hidden_size": 2560, "intermediate_size": 8960, "num_hidden_layers": 32, "num_attention_heads": 16,
    "num_key_value_heads": 8, "vocab_size": 102400, "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "swallow-8b-instruct-v0.3": LLAMA_3_8B,
    "llama-3-swallow-8b": LLAMA_3_8B,
    "llama-3-swallow-8b-instruct": LLAMA_3_8B,
    "elyza-jp-8b": LLAMA_3_8B,
    "qwen2.5-7b": QWEN25_7B,
    "qwen2.5-7b-instruct": QWEN25_7B,
    "qwen3-8b": QWEN3_8B,
    "llm-jp-3-1.8b": LLMJP3_1B,
    "llm-jp-3-1.8b-instruct3": LLMJP3_1B,
    "llm-jp-3-13b": LLMJP3_13B,
    "sarashina2.2-3b": SARASHINA22_3B,
}


def transformers_count(config: dict) -> int:
    """Parameters as transformers itself counts them, on the meta device (no memory)."""
    config = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).num_parameters()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)))


def save_model(folder: Path, tokenizer=None, *, shard: str = "5GB", **config) -> torch.nn.Module:
    """A random model of a small shape, written as transformers writes it."""
    shape = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128,
    } | config  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A whole small model in two shards; tests copy it before they break it."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, shard="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def model(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


# --- the list ---


@pytest.mark.parametrize("name", BASES)
def test_every_entry_is_complete(name):
    base = BASES[name]
    assert base.name == name and base.family and base.architecture.endswith("ForCausalLM") and base.licence
    assert base.chat_template in ("own", "supplied") and "ja" in base.languages
    assert base.parameters or "parameters" in base.unverified
    if base.path:
        assert base.path.parent == (RECIPES / "bases").resolve()
    else:
        assert base.obligations
        # A revision is a whole commit, or it is `main` and says that nobody checked one.
        assert (len(base.revision) == 40) != (base.revision == "main" and "revision" in base.unverified)


@pytest.mark.parametrize("name", SHAPES)
def test_listed_parameters_are_those_that_transformers_counts(name):
    assert BASES[name].parameters == transformers_count(SHAPES[name]) == count_parameters(SHAPES[name])


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_base_is_what_its_entry_says(name):
    base = BASES[name]
    if not base.path.is_dir():
        pytest.skip(f"{name} is not trained in this checkout")
    found = profile(resolve(name, BASES))
    assert (found.parameters, found.family, found.architecture) == (base.parameters, base.family, base.architecture)
    assert found.parameters == transformers_count(json.loads((base.path / "config.json").read_text()))
    assert found.rows_256, found.odd_rows
    assert found.bytes <= 13e6


GOOD = """
mine:
  hub_id: someone/model
  revision: main
  family: llama-3
  architecture: LlamaForCausalLM
  licence: MIT
  gated: false
  chat_template: own
  languages: [ja]
"""


def test_a_path_is_relative_to_the_list(tmp_path):
    text = GOOD.replace("hub_id: someone/model\n  revision: main", "path: ../models/x").replace("  gated: false\n", "")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "b.yaml").write_text(text)
    assert load_bases(tmp_path / "lists" / "b.yaml")["mine"].path == tmp_path / "models" / "x"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("licence: MIT", "license: MIT", ["(mine.license): no such key; do you mean licence?", "(mine.licence): is missing"]),
        ("gated: false", "gated: 'no'", ["b.yaml:8 (mine.gated): 'no' is not true or false"]),
        ("gated: false", "gated: false\n  parameters: 8e9", ["(mine.parameters): '8e9' is not a whole number"]),
        ("gated: false", "gated: false\n  parameters: true", ["(mine.parameters): True is not a whole number"]),
        ("gated: false", "gated: false\n  parameters: 0", ["(mine.parameters): 0 is less than 1"]),
        ("gated: false", "gated: false\n  gated: true", ["b.yaml:9 (mine.gated): written twice; the first is on line 8"]),
        ("languages: [ja]", "languages: ja", ["(mine.languages): 'ja' is not a list of texts"]),
        ("languages: [ja]", "languages: [ja, no]", ["is not a list of texts"]),  # the Norway problem of YAML
        ("chat_template: own", "chat_template: mine", ["'mine' is none of own, supplied"]),
        ("someone/model", "model", ["(mine.hub_id): 'model' is not of the form organisation/model"]),
        ("hub_id: someone/model", "path: x", ["(mine.revision): belongs to a base on the hub"]),
        ("hub_id: someone/model", "path: x\n  hub_id: a/b", ["(mine): needs either path", "and not both"]),
        ("  revision: main\n", "", ["(mine.revision): is missing"]),
        ("licence: MIT", "licence: ''", ["(mine.licence): is empty"]),
        ("licence: MIT", "licence: MIT\n  unverified: [lizenz]", ["'lizenz' is no key of an entry"]),
        ("mine:", "8:", ["the name is 8, not text"]),
    ],
)
def test_a_wrong_entry_is_refused_with_file_line_and_key(tmp_path, old, new, said):
    (tmp_path / "b.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as error:
        load_bases(tmp_path / "b.yaml")
    assert all(s in str(error.value) for s in said), str(error.value)
    assert "b.yaml:" in str(error.value)


def test_all_problems_of_all_entries_come_at_once(tmp_path):
    (tmp_path / "b.yaml").write_text(GOOD.replace("gated: false", "gated: 1") + "other: 5\nthird: {path: x, family: 3}\n")
    with pytest.raises(UserError) as error:
        load_bases(tmp_path / "b.yaml")
    for said in ("(mine.gated)", "(other): its fields are 5", "(third.family)", "(third.licence): is missing"):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1\nb: 2", "not YAML"),
        (b"- a\n- b\n", "a mapping of name to fields"),
        (b"", "a mapping of name to fields"),
        (b"a: \xff", "not UTF-8"),
        (b"a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, said):
    (tmp_path / "b.yaml").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_bases(tmp_path / "b.yaml")
    assert "b.yaml" in str(error.value)


def test_a_missing_list_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such list of bases"):
        load_bases(tmp_path / "none.yaml")


# --- local folders ---


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("swalow-8b", "swallow-8b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"), ("TINY-LLAMA", "tiny-llama")],
)
def test_an_unknown_name_suggests_the_closest(typed, suggested):
    with pytest.raises(UserError) as error:
        resolve(typed, BASES)
    assert f"no base is named '{typed}'" in str(error.value) and suggested in error.value.hint


def test_a_name_like_none_lists_all():
    with pytest.raises(UserError) as error:
        resolve("????", BASES)
    assert all(name in error.value.hint for name in BASES)


def test_a_bundled_base_that_was_not_trained_says_how(tmp_path):
    with pytest.raises(UserError, match="make tiny-bases"):
        resolve("t", {"t": Base("t", path=tmp_path / "none")})


def test_a_whole_local_folder_is_taken(model):
    assert resolve(str(model), BASES) == model == resolve(model, {})


def test_a_file_is_no_base(model):
    with pytest.raises(UserError, match="is a file; a base is a folder"):
        resolve(model / "config.json", BASES)


def break_config(folder):
    (folder / "config.json").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def only_pickles(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"x")


def no_weights(folder):
    only_pickles(folder)
    (folder / "pytorch_model.bin").unlink()


def missing_shard(folder):
    max(folder.glob("*.safetensors")).unlink()


def cut_shard(folder):
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-2])


def lfs_pointer(folder):
    max(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def html_page(folder):
    max(folder.glob("*.safetensors")).write_text("<html>Please log in</html>")


def bad_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (break_config, "config.json is missing"),
        (break_tokenizer, "tokenizer files are missing"),
        (only_pickles, "its weights are pickles (pytorch_model.bin)"),
        (no_weights, "no *.safetensors weights are there"),
        (missing_shard, "weight files are missing: model-0000"),
        (cut_shard, "its header says"),
        (lfs_pointer, "is a Git LFS pointer"),
        (html_page, "is not a safetensors file"),
        (bad_index, "model.safetensors.index.json is damaged"),
    ],
)
def test_a_broken_local_folder_says_what_is_wrong(model, harm, said):
    harm(model)
    with pytest.raises(UserError) as error:
        resolve(model, BASES)
    assert said in str(error.value) and str(model) in str(error.value) and error.value.hint


def test_everything_wrong_with_a_folder_comes_at_once(model):
    break_config(model), break_tokenizer(model), cut_shard(model)
    with pytest.raises(UserError, match="3 problem"):
        check_folder(model)


# --- hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNWANTED = ("pytorch_model.bin", "modeling_mine.py", "original/consolidated.00.safetensors", "model.gguf", "optimizer.pt")


class Hub(BaseHTTPRequestHandler):
    """The hub's endpoints that a snapshot download calls, with the headers that it sends."""

    folder: Path
    asked: list
    gated = disabled = False

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.asked.append((self.command, path))
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        names = [p.relative_to(self.folder).as_posix() for p in files]
        if self.disabled:
            return self.answer(503)
        if not path.removeprefix("/api/models").startswith("/some/model/"):
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        rest = path.split("/some/model/")[1]
        if rest.startswith(("revision/", "tree/")):
            kind, revision = rest.split("/")
            if revision not in ("main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if kind == "revision":
                siblings = [{"rfilename": n} for n in names]
                body = {"_id": "0", "id": "some/model", "sha": COMMIT, "siblings": siblings, "gated": self.gated}
            else:
                body = [
                    {"type": "file", "path": n, "size": f.stat().st_size, "oid": hashlib.sha1(f.read_bytes()).hexdigest()}
                    for n, f in zip(names, files, strict=True)
                ]
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        _, revision, name = rest.split("/", 2)
        if self.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
        if revision != COMMIT or name not in names:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = (self.folder / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")

    do_HEAD = do_GET


@pytest.fixture
def hub(model, monkeypatch):
    """A hub on the loopback interface that holds one repository, some/model."""
    from huggingface_hub import close_session, constants

    for name in UNWANTED:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(b"never fetched")
    (model / "README.md").write_text("card")
    (model / "LICENSE").write_text("text")
    handler = type("OneHub", (Hub,), {"folder": model, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    handler.stop = lambda: (server.shutdown(), server.server_close(), thread.join())
    yield handler
    handler.stop()
    close_session()


def on_hub(**changed) -> dict[str, Base]:
    fields = {"hub_id": "some/model", "revision": "main", "licence": "The Licence", "parameters": 8_000_000_000} | changed
    return {"it": Base("it", **fields)}


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_download_takes_the_wanted_files_and_no_others(hub, tmp_path, revision):
    folder = resolve("it", on_hub(revision=revision), cache_dir=tmp_path / "cache", endpoint=hub.url)
    source = {p.name: p.read_bytes() for p in hub.folder.iterdir() if p.is_file() and p.name not in UNWANTED}
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")} == source
    assert {"README.md", "LICENSE", "config.json"} <= set(source)
    assert not [path for _, path in hub.asked if path.endswith(UNWANTED)]
    assert fingerprint(folder) == fingerprint(hub.folder) and profile(folder) == profile(hub.folder)


def test_what_was_downloaded_once_needs_no_network(hub, tmp_path):
    first = resolve("it", on_hub(), cache_dir=tmp_path / "cache", endpoint=hub.url)
    hub.stop()
    assert resolve("it", on_hub(), cache_dir=tmp_path / "cache", endpoint=hub.url) == first


def sentence(bases, **options) -> str:
    with pytest.raises(UserError) as error:
        resolve("it", bases, **options)
    assert error.value.hint
    return str(error.value)


def test_a_gated_repository_says_where_to_accept(hub, tmp_path):
    hub.gated = "manual"
    said = sentence(on_hub(), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert "asks for a licence to be accepted" in said
    assert f"Open {hub.url}/some/model, accept the licence (The Licence)" in said and "hf auth login" in said


def test_a_hidden_gated_repository_says_where_to_accept(hub, tmp_path):
    said = sentence(on_hub(hub_id="some/hidden", gated=True), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert "without an accepted licence" in said and "hf auth login" in said


def test_a_missing_repository_is_named(hub, tmp_path):
    said = sentence(on_hub(hub_id="some/thing"), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert "no repository some/thing" in said and f"{hub.url}/some/thing" in said


@pytest.mark.parametrize("revision", ["v9", "f" * 40])
def test_a_missing_revision_is_named(hub, tmp_path, revision):
    said = sentence(on_hub(revision=revision), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert f"has no revision '{revision}'" in said and "commits/main" in said


def test_a_hub_that_is_down_is_named(hub, tmp_path):
    hub.stop()
    said = sentence(on_hub(), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert f"{hub.url} cannot be reached" in said and "local folder" in said


def test_a_hub_that_fails_gives_its_status(hub, tmp_path):
    hub.disabled = True
    assert "status 503" in sentence(on_hub(), cache_dir=tmp_path / "c", endpoint=hub.url)


def test_a_full_disk_gives_both_numbers(hub, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))  # in the names of unfinished downloads
    blobs = tmp_path / "c" / "models--some--model" / "blobs"
    blobs.mkdir(parents=True)
    for file in hub.folder.glob("*.safetensors"):
        (blobs / f"{hashlib.sha256(file.read_bytes()).hexdigest()}.00000000.incomplete").symlink_to("/dev/full")
    said = sentence(on_hub(), cache_dir=tmp_path / "c", endpoint=hub.url)
    assert "the disk is full" in said and "about 16.0 GB" in said and "GB are free" in said and "HF_HUB_CACHE" in said


def test_a_repository_without_safetensors_is_refused(hub, tmp_path):
    for file in [*hub.folder.glob("*.safetensors"), hub.folder / "model.safetensors.index.json"]:
        file.unlink()
    assert "no *.safetensors weights are there" in sentence(on_hub(), cache_dir=tmp_path / "c", endpoint=hub.url)


def in_new_process(cache: Path, **environment: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from tsugiki.bases import Base, resolve\n"
        "try: print(resolve('it', {'it': Base('it', hub_id='some/model', revision='main')}, cache_dir=sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"NO_PROXY": "127.0.0.1"} | environment
    return subprocess.run(
        [sys.executable, "-c", code, str(cache)], env=env, capture_output=True, text=True, timeout=60, check=True
    )


def test_hf_endpoint_and_offline_mode_are_heeded(hub, tmp_path):
    nothing = in_new_process(tmp_path / "c", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert nothing.stdout.startswith("UserError") and "HF_HUB_OFFLINE" in nothing.stdout and not hub.asked
    fetched = in_new_process(tmp_path / "c", HF_ENDPOINT=hub.url)
    assert Path(fetched.stdout.strip()).is_dir(), fetched.stdout
    assert in_new_process(tmp_path / "c", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1").stdout == fetched.stdout


# --- fingerprint ---


def test_the_fingerprint_follows_what_results_depend_on(model):
    before = fingerprint(model)
    (model / "README.md").write_text("another card")
    assert fingerprint(model) == before
    seen = {before}
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", max(model.glob("*.safetensors")).name):
        content = (model / file).read_bytes() if (model / file).exists() else b" "
        (model / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        seen.add(fingerprint(model))
    assert len(seen) == 5


def test_the_fingerprint_of_large_weights_sees_both_ends_and_the_header(model, monkeypatch):
    monkeypatch.setattr(module, "FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(module, "SAMPLED_BLOCK_BYTES", 64)
    file = max(model.glob("*.safetensors"))
    content = file.read_bytes()
    seen = {fingerprint(model)}
    for place in (20, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        seen.add(fingerprint(model))
    file.write_bytes(content + b"\0")
    seen.add(fingerprint(model))
    assert len(seen) == 4
    file.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])  # other weights, same shapes
    assert fingerprint(model) not in seen


# --- profile ---


def write_config(folder: Path, **config) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    layers=st.integers(1, 3),
    kv=st.integers(1, 4),
    group=st.integers(1, 4),
    head=st.sampled_from([8, 16, 32]),
    own_head_dim=st.booleans(),
    ffn=st.integers(1, 300),
    vocab=st.integers(4, 500),
    tied=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_parameters_are_those_that_transformers_counts(
    kind, layers, kv, group, head, own_head_dim, ffn, vocab, tied, bias
):
    config = {
        "model_type": kind, "num_hidden_layers": layers, "num_attention_heads": kv * group, "num_key_value_heads": kv,
        "hidden_size": kv * group * head, "intermediate_size": ffn, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip
    if own_head_dim:
        config |= {"head_dim": 24} if kind != "qwen2" else {}
    elif kind == "qwen3":
        config["head_dim"] = head
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = bias
    if kind == "llama":
        config["mlp_bias"] = bias
    assert count_parameters(config) == transformers_count(config)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_profiled_from_its_headers(tmp_path, kind, tied):
    model = save_model(tmp_path, model_type=kind, tie_word_embeddings=tied, head_dim=64, shard="1MB")
    found = profile(tmp_path)
    assert found.parameters == model.num_parameters()
    assert (found.layers, found.hidden, found.ffn, found.heads, found.kv_heads, found.head_dim) == (2, 256, 512, 4, 2, 64)
    assert found.queries_per_kv == 2 and found.vocab_size == 320 and found.context == 128
    assert found.architecture == type(model).__name__ and found.dtype == "bfloat16"
    assert (found.qkv_bias, found.qk_norm, found.tied_embeddings) == (kind == "qwen2", kind == "qwen3", tied)
    assert found.rows_256 and found.odd_rows == () and not found.moe
    assert 0 < found.bytes - 2 * model.num_parameters() < 10_000  # the rest is the headers
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "bare")
    bare = profile(tmp_path / "bare")
    assert (bare.parameters, bare.qkv_bias, bare.qk_norm) == (found.parameters, found.qkv_bias, found.qk_norm)
    assert bare.bytes is None


def test_rows_that_k_quants_cannot_take_are_named(tmp_path):
    save_model(tmp_path, hidden_size=128, intermediate_size=768)
    found = profile(tmp_path)
    assert not found.rows_256
    assert "layers.*.self_attn.q_proj (128)" in found.odd_rows and "lm_head (128)" in found.odd_rows
    assert not any("down_proj" in row for row in found.odd_rows)


def test_rows_are_judged_from_the_configuration_alone(tmp_path):
    # Qwen2.5-0.5B: width 896, which is no multiple of 256.
    write_config(tmp_path, **QWEN25_7B | {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864})
    assert not profile(tmp_path).rows_256
    write_config(tmp_path, **QWEN25_7B)
    assert profile(tmp_path).rows_256 and profile(tmp_path).queries_per_kv == 7


@pytest.mark.parametrize(
    ("written", "theta", "kind"),
    [
        ({}, 10_000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": None}, 500_000.0, None),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 5e5, "llama3"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}, 5e5, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 10_000.0, "linear"),
    ],
)
def test_both_spellings_of_the_rotary_settings_are_read(tmp_path, written, theta, kind):
    found = profile(write_config(tmp_path, **LLAMA_3_8B, **written))
    assert found.rope_theta == theta
    assert kind is None if found.rope_scaling is None else kind in found.rope_scaling.values()
    assert (found.rope_scaling is None) == (kind is None)


def test_the_family_of_a_llama_is_that_of_its_tokenizer(tmp_path):
    write_config(tmp_path, **LLMJP3_1B)
    byte_level_tokenizer().save_pretrained(tmp_path)
    assert profile(tmp_path).family == "llama-3"
    unigram_tokenizer().save_pretrained(tmp_path)
    assert profile(tmp_path).family == "llama-2"
    assert profile(write_config(tmp_path, **QWEN3_8B)).family == "qwen3"


def test_a_mixture_of_experts_is_recognised(tmp_path):
    found = profile(write_config(tmp_path, **QWEN3_8B | {"model_type": "qwen3_moe", "num_experts": 128, "moe_intermediate_size": 768}))
    assert found.moe and found.experts == 128 and found.parameters is None


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there is no config.json"), ("{", "not JSON"), ("[]", "not a JSON object"), ('{"model_type": "gpt2"}', "hidden_size is missing")],
)
def test_a_bad_config_is_a_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=said):
        profile(tmp_path)


def test_importing_bases_loads_no_heavy_library():
    code = "import sys, tsugiki.bases; print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
