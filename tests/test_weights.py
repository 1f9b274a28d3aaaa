"""Damaged, cut-off and hostile files, a full disk, an interruption: a sentence, nothing half-written, the old file stays."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
from tsugiki.quantize.weights import open_weights, read_header, same_values

ROOT = Path(__file__).resolve().parents[1]
BASES = Path(os.environ.get("TSUGIKI_TEST_BASES", ROOT / "recipes" / "bases"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model of the Llama family."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if not (BASES / "tiny-llama" / "tokenizer.json").is_file():
        pytest.skip("the bundled base tiny-llama is not there")
    folder = tmp_path_factory.mktemp("weights") / "base"
    tokenizer = AutoTokenizer.from_pretrained(BASES / "tiny-llama")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def copy_of(base, folder):
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def written(folder, header, data=b"", length=None):
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_rows_are_those_of_the_library(base):
    weights = open_weights(base)
    expected = load_file(base / "model.safetensors")
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name].rows(), tensor)
        assert torch.equal(weights[name].rows(1, 3), tensor[1:3])
        assert same_values(weights[name], weights[name], rows=5)
    assert not same_values(weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])


HOSTILE = {
    "empty": (b"", b"", None, "not a whole safetensors file"),
    "length beyond the file": ({"a": entry()}, b"\0" * 8, 1 << 40, "its header says that it has 1,099,511,627,776"),
    "length beyond memory": (b"{}", b"", (1 << 64) - 1, "not a whole"),
    "no JSON": (b"{not json at all", b"", None, "header is damaged"),
    "no object": (b"[1, 2]", b"", None, "no JSON object"),
    "deeply nested": (b"[" * 100_000 + b"]" * 100_000, b"", None, "header is damaged"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "header is damaged"),
    "a name twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                     b"\0" * 4, None, "comes twice"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, None, "b overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20, None, "leaves a hole of 4 bytes"),
    "beyond the file": ({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, b"\0" * 8, None, "its header says"),
    "wrong bytes": ({"a": entry(shape=(3,))}, b"\0" * 8, None, "its shape (3,) of F32 says otherwise"),
    "negative": ({"a": entry(shape=(-2,))}, b"\0" * 8, None, "has the shape"),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, None, "says otherwise"),
    "floats": ({"a": entry(shape=(2.0,))}, b"\0" * 8, None, "has the shape"),
    "huge": ({"a": entry(shape=(1 << 62, 1 << 62, 1 << 62))}, b"\0" * 8, None, "says otherwise"),
    "unknown type": ({"a": entry(dtype="Q4")}, b"\0" * 8, None, "unknown type 'Q4'"),
    "no entry": ({"a": 7}, b"", None, "described by 7"),
    "trailing": ({"a": entry()}, b"\0" * 9, None, "its header says"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(base, tmp_path, name):
    header, data, length, sentence = HOSTILE[name]
    folder = copy_of(base, tmp_path / "b")
    path = written(folder, header, data, length)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert sentence in str(error.value)
    if name != "a name twice":  # the format's own library takes the last of the two
        with pytest.raises(Exception):  # noqa: B017 - it refuses all others, each in its own words
            safe_open(path, framework="pt").keys()
    with pytest.raises(UserError):
        convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_what_is_no_safetensors_file_is_named(base, tmp_path):
    folder = copy_of(base, tmp_path / "b")
    path = folder / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        convert(folder, tmp_path / "out.gguf")
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="pickle"):
        convert(folder, tmp_path / "out.gguf")
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickles can run code"):
        convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(("index", "sentence"), [
    ('{"weight_map": {"a": "../model.safetensors"}}', "not a safetensors file of this folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "not a safetensors file of this folder"),
    ('{"weight_map": {"a": "model.bin"}}', "not a safetensors file of this folder"),
    ('{"weight_map": {"a": ["x"]}}', "not a safetensors index"), ("[]", "not a safetensors index"),
    ('{"weight_map": {"a": "model-2.safetensors"}}', "model-2.safetensors is missing"),
])
def test_a_hostile_index_is_refused(base, tmp_path, index, sentence):
    folder = copy_of(base, tmp_path / "b")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "out.gguf")
    assert sentence in str(error.value)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_flipped_bit_in_the_header_is_refused_or_changes_nothing(base, tmp_path_factory, data):
    original = (base / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    at, bit = data.draw(st.integers(0, 8 + length - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(original)
    changed[at] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(changed)
    try:
        found = read_header(path)
    except UserError:
        return
    # A letter of a tensor's name, or of the metadata: what the shapes say is still what the file holds.
    assert sum(t.rows().numel() for t in found.values()) == sum(t.numel() for t in load_file(base / "model.safetensors").values())


def test_a_file_that_is_cut_while_it_is_read_is_refused(base, tmp_path):
    folder = copy_of(base, tmp_path / "b")
    weights = open_weights(folder)
    os.truncate(folder / "model.safetensors", 50_000)
    with pytest.raises(UserError, match="has become shorter"):
        weights["model.embed_tokens.weight"].rows()


def limited(limit):
    """A child that may write files of at most so many bytes, as a full disk would let it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


CONVERT = """
import sys
from tsugiki.errors import UserError
from tsugiki.quantize.convert import convert
try:
    convert(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.7, 0.999])
def test_a_full_disk_at_any_point_leaves_the_old_file(base, tmp_path, share):
    whole = convert(base, tmp_path / "whole.gguf").bytes
    (tmp_path / "whole.gguf").unlink()
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-P", "-c", CONVERT, base, out], capture_output=True, text=True, preexec_fn=lambda: limited(int(whole * share)),
    )
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stdout
    assert "unchanged" in done.stdout
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf"}


def test_too_little_room_is_seen_before_anything_is_written(base, tmp_path, monkeypatch):
    from tsugiki.quantize import convert as conversion

    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"the file needs .* MB, the disk has 0 MB free"):
        convert(base, tmp_path / "out" / "model.gguf")
    assert not list((tmp_path / "out").iterdir())


def test_an_interruption_leaves_the_old_file(base, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_bytes(b"old")
    slow = CONVERT.replace("try:", "from tsugiki.quantize import convert as c\nimport time\nold = c._append\n"
                           "def slow(*a):\n    print('writing', flush=True)\n    time.sleep(0.2)\n    old(*a)\nc._append = slow\ntry:")
    child = subprocess.Popen([sys.executable, "-P", "-c", slow, base, out], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(3):
        assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(30) != 0
    child.stdout.close()
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf"}


def test_a_target_that_cannot_be_written_is_said(base, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not be written"):
        convert(base, tmp_path / "file" / "out.gguf")


def test_weights_of_other_types_are_refused(base, tmp_path):
    folder = copy_of(base, tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for kind in (torch.int8, torch.float64, torch.float8_e4m3fn):
        save_file(weights | {name: weights[name].to(kind)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"{name} has type .*; F32, F16 or BF16 is needed"):
            convert(folder, tmp_path / "out.gguf")
