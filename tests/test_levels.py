"""Levels are what llama.cpp makes, whole or absent, and the report reads them back from the file."""

import os
import subprocess
import sys
from contextlib import nullcontext
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest

from tsugiki.errors import UserError
from tsugiki.quantize import child, levels
from tsugiki.quantize.imatrix import Imatrix, write_imatrix
from tsugiki.quantize.levels import LEVELS, make_level, plan_level, read_types


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
    with pytest.raises(UserError, match="IQ2_XS needs an importance matrix"):
        make_level(f16, "IQ2_XS", tmp_path / "out" / "q.gguf")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UserError, match=r"'Q9_K' is not known\n.*Q4_K_M"):
        make_level(f16, "Q9_K", tmp_path / "q.gguf")


def test_an_abort_in_native_code_does_not_end_this_process(f16, tmp_path, monkeypatch):
    old = tmp_path / "q.gguf"
    old.write_bytes(b"old")
    monkeypatch.setattr(child.sys, "executable", _aborting_python(tmp_path))
    with pytest.raises(UserError, match=r"the process of “Q4_K_M of model.gguf” was ended by SIGABRT: GGML_ASSERT"):
        make_level(f16, "Q4_K_M", old)
    assert old.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _aborting_python(folder):
    """Stands for native code that aborts half-way through its output."""
    script = folder / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, os, sys\njob = json.loads(sys.stdin.readline())\nopen(job['out'], 'wb').write(b'half')\n"
        "print('GGML_ASSERT(row) failed', file=sys.stderr, flush=True)\nos.abort()\n"
    )
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
    shapes = {t.name: ([int(n) for n in t.shape], t.tensor_type) for t in gguf.GGUFReader(f16).tensors}
    made = make_level(f16, "Q4_K_M", tmp_path / "q.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    job = {"path": str(f16), "folder": str(tmp_path), "level": "Q4_K_M"}
    for free, enough in ((made.bytes - 32, False), (made.bytes + 2048, True)):
        monkeypatch.setattr(levels.shutil, "disk_usage", lambda _, free=free: levels.shutil._ntuple_diskusage(0, 0, free))
        with nullcontext() if enough else pytest.raises(UserError, match=r"Q4_K_M needs .* MB, the disk has"):
            levels._refuse_resources(job, shapes, types)


def test_a_plan_is_what_is_then_written(f16, tmp_path):
    make_level(f16, "Q3_K_M", tmp_path / "q.gguf")
    written = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert plan_level(f16, "Q3_K_M") == written


def test_single_tensors_get_the_types_asked_for(f16, tmp_path):
    wanted = {"blk.0.attn_k.weight": "Q8_0", "output.weight": "Q5_K", "token_embd.weight": "F16", "blk.1.ffn_up.weight": "IQ4_XS"}
    make_level(f16, "Q4_K_M", tmp_path / "stock.gguf")
    make_level(f16, "Q4_K_M", tmp_path / "q.gguf", overrides=wanted)
    stock, own = ({t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / n).tensors} for n in ("stock.gguf", "q.gguf"))
    assert own == stock | wanted
    with pytest.raises(UserError, match=r"blk.9.attn_k.weight: there is no such tensor"):
        make_level(f16, "Q4_K_M", tmp_path / "q.gguf", overrides={"blk.9.attn_k.weight": "Q8_0"})
    with pytest.raises(UserError, match="the type 'Q9' is not known"):
        make_level(f16, "Q4_K_M", tmp_path / "q.gguf", overrides={"output.weight": "Q9"})


def importance(f16, names=None):
    """Made-up importance for every matrix of the model but the embeddings."""
    rng = np.random.default_rng(1)
    shapes = {t.name: t.shape for t in gguf.GGUFReader(f16).tensors if len(t.shape) == 2 and t.name.startswith("blk.")}
    sums = {n: rng.gamma(0.5, 100, (1, int(s[0]))).astype(np.float32) for n, s in shapes.items() if names is None or n in names}
    return Imatrix(sums, {n: np.array([100], np.float32) for n in sums}, ["text.txt"], 3)


@pytest.mark.parametrize("level", ["Q4_K_M", "IQ2_XXS"])
def test_with_importance_a_level_equals_llama_quantizes_byte_by_byte(f16, tmp_path, level):
    tool = Path(os.environ.get("TSUGIKI_UPSTREAM", "")) / "llama-quantize"
    if not tool.is_file():
        pytest.skip("TSUGIKI_UPSTREAM does not name a folder with llama-quantize")
    write_imatrix(tmp_path / "im.gguf", importance(f16))
    subprocess.run([tool, "--imatrix", "im.gguf", f16, "theirs.gguf", level], cwd=tmp_path, check=True, capture_output=True)
    make_level(f16, level, tmp_path / "ours.gguf", imatrix=tmp_path / "im.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_importance_changes_the_weights_and_is_named_in_the_file(f16, tmp_path):
    write_imatrix(tmp_path / "im.gguf", importance(f16))
    make_level(f16, "Q4_K_M", tmp_path / "plain.gguf")
    make_level(f16, "Q4_K_M", tmp_path / "with.gguf", imatrix=tmp_path / "im.gguf")
    plain, with_ = (gguf.GGUFReader(tmp_path / n) for n in ("plain.gguf", "with.gguf"))
    changed = {a.name for a, b in zip(plain.tensors, with_.tensors, strict=True) if not np.array_equal(a.data, b.data)}
    assert changed == set(importance(f16).sums)
    assert with_.fields["quantize.imatrix.file"].contents() == "im.gguf"
    assert with_.fields["quantize.imatrix.dataset"].contents() == "text.txt"
    assert with_.fields["quantize.imatrix.entries_count"].contents() == len(changed)
    assert with_.fields["quantize.imatrix.chunks_count"].contents() == 3


def test_importance_of_another_model_and_too_little_of_it_are_refused(f16, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", ffn=512, layers=3)
    write_imatrix(tmp_path / "other-im.gguf", importance(other))
    with pytest.raises(UserError, match="another model: 9 problem"):  # 7 matrices of a third layer, 2 of another width
        make_level(f16, "Q4_K_M", tmp_path / "q.gguf", imatrix=tmp_path / "other-im.gguf")
    write_imatrix(tmp_path / "half.gguf", importance(f16, {f"blk.0.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "attn_output")}))
    with pytest.raises(UserError, match=r"not enough for IQ2_XXS[\s\S]*blk.1.attn_k.weight: IQ2_XXS needs importance"):
        make_level(f16, "IQ2_XXS", tmp_path / "q.gguf", imatrix=tmp_path / "half.gguf")
    assert not (tmp_path / "q.gguf").exists()


def test_one_command_makes_levels_of_a_file_or_of_a_domain(f16, tmp_path):
    def run(*words):
        command = [Path(sys.executable).with_name("tsugiki"), "quantize", "levels", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run(f16, "--levels", "Q8_0,IQ4_NL", "--out", "made")
    assert done.returncode == 0 and sorted(p.name for p in (tmp_path / "made").iterdir()) == ["model-IQ4_NL.gguf", "model-Q8_0.gguf"]
    assert "Q8_0" in done.stdout and f"{read_types(tmp_path / 'made' / 'model-IQ4_NL.gguf').bpw:.3f}" in done.stdout
    wrong = run("setsubi", "--levels", "Q8_0")
    assert wrong.returncode == 2 and "go with a .gguf file" in wrong.stderr
    unknown = run("no-such-domain")
    assert unknown.returncode == 2 and "no-such-domain" in unknown.stderr
