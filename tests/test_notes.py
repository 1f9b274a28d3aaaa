"""What is silently different in a file is told in both languages, with the numbers that the file itself has."""

import dataclasses
import runpy
from pathlib import Path

import gguf
import numpy as np
import pytest

from tsugiki.quantize.levels import make_level
from tsugiki.quantize.notes import file_notes
from tsugiki.recipes.report import write_report

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_run.py")))


def narrow_model(path):
    """A llama of one layer whose rows of 96 no K-quant can take."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for add, value in ((writer.add_context_length, 64), (writer.add_embedding_length, 96), (writer.add_block_count, 1), (writer.add_feed_forward_length, 96),
                       (writer.add_head_count, 2), (writer.add_head_count_kv, 2), (writer.add_layer_norm_rms_eps, 1e-5)):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 64)
    writer.add_token_merges(["t 0"])
    rng = np.random.default_rng(0)
    for name in ("token_embd", "output", *(f"blk.0.{n}" for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))):
        rows = 64 if "." not in name else 96
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.05, (rows, 96)).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(96, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_matrices_in_another_type_than_their_levels_are_told_with_the_files_own_numbers(tmp_path):
    narrow_model(tmp_path / "f16.gguf")
    made = make_level(tmp_path / "f16.gguf", "Q4_K_M", tmp_path / "q.gguf", n_threads=1)
    written = [t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors if len(t.shape) > 1]
    (note,) = file_notes({}, {"levels": [dataclasses.asdict(made) | {"level": "Q4_K_M"}]})
    assert note["en"].startswith(f"Q4_K_M: {len(written)} matrices") and note["ja"].startswith("Q4_K_M：")
    for kind in set(written):
        assert f"{written.count(kind)} × {kind}" in note["en"] and f"{written.count(kind)} × {kind}" in note["ja"]


@pytest.mark.parametrize(("stage", "numbers"), [
    ({"conversion": {"dtype": "f16", "wide": {"blk.0.ffn_down.weight": "BF16"}, "notes": ["1 tensor(s) hold values beyond 65504 and are written wider than f16"]}},
     ("1", "F16", "BF16", "blk.0.ffn_down.weight")),
    ({"parity_groups": [{"group": "domain", "texts": 400, "unknown": 3}, {"group": "hard", "texts": 9, "unknown": 0}]}, ("3", "400", "0.8%", "domain")),
    ({"bos": {"hf": 1, "gguf": 1, "gguf_added": 2}}, ("BOS",)),
    ({"conversion": {"dtype": "f16", "wide": {}, "notes": ["attention slides over 4,096 tokens"]}}, ("attention slides over 4,096 tokens",)),
])
def test_each_thing_is_told_once_in_both_languages(stage, numbers):
    (note,) = file_notes(stage, {})
    assert all(n in note[language] for n in numbers for language in ("en", "ja"))


def test_a_plain_run_has_nothing_to_tell():
    plain = {"conversion": {"dtype": "f16", "wide": {}, "notes": []}, "parity_groups": [{"group": "domain", "texts": 9, "unknown": 0}],
             "bos": {"hf": 1, "gguf": 1, "gguf_added": 1}}
    assert file_notes(plain, {"levels": [{"level": "Q8_0", "bpw": 8.5, "fallbacks": []}]}) == file_notes({}, {}) == []


def test_the_report_shows_the_notes_as_text(tmp_path):
    stages = synthetic["stage_files"]()
    stages["gguf"]["conversion"] = {"dtype": "f16", "wide": {}, "notes": ["a note with <b>&"]}
    stages["levels"]["levels"][-1]["fallbacks"] = [{"name": "output.weight", "row": 96, "type": "Q5_0"}]
    folder = synthetic["write_run"](tmp_path, stages)
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "a note with &lt;b&gt;&amp;" in page and "a note with <b>" not in page
    assert "1 matrices have rows that its types cannot take" in page and "別の型で書かれています（1 × Q5_0）" in page
