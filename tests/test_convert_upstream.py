"""Tensors are byte for byte those of llama.cpp's own converter, and so is the metadata, but for differences explained.

Needs a llama.cpp source tree (llama-cpp-python's source archive holds one): TSUGIKI_LLAMA_CPP=DIR.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tsugiki.quantize.convert import convert
from tsugiki.quantize.families import FAMILIES
from tsugiki.quantize.parity import parity
from tsugiki.quantize.texts import SENTENCES, hard_texts

_SPEC = importlib.util.spec_from_file_location("families_cases", Path(__file__).with_name("test_convert_families.py"))
_MADE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MADE
_SPEC.loader.exec_module(_MADE)
CASES = {n: c for n, c in _MADE.CASES.items() if c.tokenizer != "tiny-llmjp"}  # upstream has no Unigram for Llama
TREE = Path(os.environ.get("TSUGIKI_LLAMA_CPP", "/nowhere"))
pytestmark = pytest.mark.skipif(
    not (TREE / "convert_hf_to_gguf.py").is_file(), reason="TSUGIKI_LLAMA_CPP names no llama.cpp source tree"
)

# Upstream knows a pre-tokenizer by the hash of a probe string; the bundled tokenizers are in no table, so its answer is
# put in its mouth here. One process for all models: importing it takes seconds.
RUN = """
import json, runpy, sys
tree, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [tree + "/gguf-py", tree]
from conversion import base
for model, out, pre in jobs:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "f16"]
    runpy.run_path(tree + "/convert_hf_to_gguf.py", run_name="__main__")
"""
OURS_ALONE = {  # for people, and what a program would otherwise have to guess
    "general.quantized_by", "general.languages", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.bos_token_id",  # Qwen has none; without it llama.cpp takes token 11
}
# Where llama.cpp has the same default, or reads another key: it overwrites yarn_attn_factor, attn_factor counts.
SETTINGS_ALONE = {"vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.scaling.attn_factor"}
EXPLAINED = {"general.name", "general.basename", "general.version", "general.finetune",  # guessed from the folder's name
             "rope.scaling.yarn_attn_factor", "tokenizer.ggml.add_sep_token"}  # the last: false, the default


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folder with each case's model and the file that upstream's converter made of it."""
    folder, jobs = tmp_path_factory.mktemp("upstream"), []
    for name, case in CASES.items():
        pre = {"tiny-llama": "llama-bpe", "tiny-qwen": "qwen2"}[case.tokenizer]
        jobs.append((str(_MADE.make_model(folder / name, case)), str(folder / f"{name}.gguf"), pre))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(TREE.resolve()), json.dumps(jobs)], capture_output=True, text=True, cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def contents(path):
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type.name, list(t.shape), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_metadata_are_upstreams(theirs, tmp_path, name):
    convert(theirs / name, tmp_path / "ours.gguf")
    (our_fields, our_tensors), (their_fields, their_tensors) = contents(tmp_path / "ours.gguf"), contents(theirs / f"{name}.gguf")
    assert set(our_tensors) == set(their_tensors)
    for tensor, value in their_tensors.items():
        if tensor == "rope_freqs.weight":  # float64 here, float32 there: the last bits
            np.testing.assert_allclose(*(np.frombuffer(v[2], np.float32) for v in (our_tensors[tensor], value)), rtol=2e-6)
        else:
            assert our_tensors[tensor] == value, tensor
    architecture = FAMILIES[json.loads((theirs / name / "config.json").read_text())["architectures"][0]].name

    def short(key):
        return key.removeprefix(f"{architecture}.")

    different = {k: (v, our_fields.get(k)) for k, v in their_fields.items() if our_fields.get(k) != v and short(k) not in EXPLAINED}
    assert different == {}
    assert {short(k) for k in set(our_fields) - set(their_fields)} <= OURS_ALONE | SETTINGS_ALONE


@pytest.mark.parametrize(("name", "model", "pre", "reasons"), [
    ("llama-spm", "llama", "default", {"space"}),  # Llama 2: transformers 5 puts no space before a text that begins with one
    ("qwen2", "gpt2", "qwen2", {"normalizer", "control"}),  # NFC; and an unused </s> in its vocabulary
    ("gpt-2", "gpt2", "gpt-2", set()),
])
def test_the_source_trees_real_vocabularies(tmp_path, name, model, pre, reasons):
    """The vocabularies of the real models, through transformers' own reading of them and back."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TREE / "models", gguf_file=f"ggml-vocab-{name}.gguf")
    rows = max(tokenizer.get_vocab().values()) + 1
    config = LlamaConfig(vocab_size=rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    report = convert(tmp_path, tmp_path / "m.gguf")
    found = parity(tmp_path / "m.gguf", AutoTokenizer.from_pretrained(tmp_path), {"plain": SENTENCES, "hard": hard_texts()}, most=10_000)
    assert (report.tokenizer, report.pre) == (model, pre)
    assert found.groups["plain"]["rate"] == 1.0
    assert {d["reason"] for d in found.differences} == reasons
