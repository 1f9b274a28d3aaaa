"""Levels are what llama.cpp makes, whole or absent, and the report reads them back from the file."""

import os
import subprocess
import sys
from math import prod

import gguf
import numpy as np
import pytest

from tsugiki.errors import UserError
from tsugiki.quantize import levels
from tsugiki.quantize.levels import LEVELS, make_level, read_types


def write_gguf(path, *, width=256, ffn=768, vocab=512, layers=2):
    """A llama of random weights, F16, written without the converter."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 0"])
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,), "output.weight": (vocab, width)}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{n}.weight": (width, width) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{n}_norm.weight": (width,) for n in ("attn", "ffn")}
        shapes |= {f"blk.{i}.ffn_{n}.weight": (ffn, width) for n in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (width, ffn)
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(0, 0.05, shape).astype(np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def f16(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("levels") / "model.gguf")


@pytest.mark.parametrize("level", LEVELS)
def test_types_and_bits_are_those_in_the_file(f16, tmp_path, level):
    found = make_level(f16, level, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    bits = sum(prod(map(int, t.shape)) / gguf.GGML_QUANT_SIZES[t.tensor_type][0] * gguf.GGML_QUANT_SIZES[t.tensor_type][1] * 8
               for t in reader.tensors)
    assert found.level == level
    assert found.bpw == pytest.approx(bits / sum(prod(map(int, t.shape)) for t in reader.tensors), rel=1e-12)
    assert found.bytes == (tmp_path / "out.gguf").stat().st_size
    assert sum(t["tensors"] for t in found.types.values()) == len(reader.tensors)
    assert found.types["F32"]["tensors"] == 5  # norms
    assert found.fallbacks == []
    assert found == read_types(tmp_path / "out.gguf")


def test_a_level_equals_llama_cpps_own_byte_by_byte(f16, tmp_path):
    make_level(f16, "Q4_K_M", tmp_path / "ours.gguf")
    plain = (
        "import sys, llama_cpp\n"
        "p = llama_cpp.llama_model_quantize_default_params()\n"
        "p.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M\n"
        "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))\n"
    )
    subprocess.run(
        [sys.executable, "-c", plain, f16, tmp_path / "plain.gguf"], check=True, capture_output=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_more_bits_make_a_larger_file(f16, tmp_path):
    sizes = [make_level(f16, level, tmp_path / f"{level}.gguf").bpw for level in LEVELS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < read_types(f16).bpw


def test_rows_that_do_not_divide_are_named_with_the_type_they_got(tmp_path):
    f16 = write_gguf(tmp_path / "odd.gguf", width=96, ffn=288)
    found = make_level(f16, "Q4_K_M", tmp_path / "q.gguf")
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert {f["name"] for f in found.fallbacks} == {n for n in written if "norm" not in n}
    assert all(f["type"] == written[f["name"]] and not f["type"].endswith("_K") for f in found.fallbacks)
    assert found.bpw > 5.0
    assert make_level(f16, "Q8_0", tmp_path / "q8.gguf").fallbacks == []


def test_a_refusal_leaves_nothing_and_gives_llama_cpps_reason(f16, tmp_path):
    with pytest.raises(UserError, match=r"importance matrix|imatrix"):
        make_level(f16, "IQ2_XS", tmp_path / "out" / "q.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match=r"'Q9_K' is not known\n.*Q4_K_M"):
        make_level(f16, "Q9_K", tmp_path / "q.gguf")


def test_an_abort_in_native_code_does_not_end_this_process(f16, tmp_path, monkeypatch):
    old = tmp_path / "q.gguf"
    old.write_bytes(b"old")
    monkeypatch.setattr(levels.sys, "executable", _aborting_python(tmp_path))
    with pytest.raises(UserError, match=r"could not make Q4_K_M \(exit -6\)"):
        make_level(f16, "Q4_K_M", old)
    assert old.read_bytes() == b"old"


def _aborting_python(folder):
    """Stands for native code that aborts half-way through its output."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport os, sys\nopen(sys.argv[4], 'wb').write(b'half')\nos.abort()\n")
    script.chmod(0o755)
    return str(script)


def test_damaged_files_are_refused_before_native_code_sees_them(f16, tmp_path):
    data = f16.read_bytes()
    for cut in (0, 3, 100, len(data) // 2, len(data) - 4096):
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(UserError):
            make_level(tmp_path / "cut.gguf", "Q8_0", tmp_path / "q.gguf")
    with pytest.raises(UserError):
        read_types(tmp_path / "missing.gguf")
    assert not (tmp_path / "q.gguf").exists()


def test_a_full_disk_is_seen_before_the_work(f16, tmp_path, monkeypatch):
    monkeypatch.setattr(levels.shutil, "disk_usage", lambda _: levels.shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(UserError, match="the disk has 0 MB free"):
        make_level(f16, "Q4_K_M", tmp_path / "q.gguf")
