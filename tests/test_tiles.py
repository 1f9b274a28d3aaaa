"""Weights in a CPU's matrix tiles: where they pay, and that the mended instructions multiply right."""

import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.tiles import tiles_pay, tiles_work
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level

ROOT = Path(__file__).resolve().parent.parent
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

# llama.cpp's way: the configuration is filled field by field, matrices are written, loaded, multiplied, stored
PROGRAM = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstdio>
#include <sys/syscall.h>
#include <unistd.h>
struct config { uint8_t palette = 0, start = 0, reserved[14] = {0}; uint16_t bytes[16] = {0}; uint8_t rows[16] = {0}; };
__attribute__((noinline)) void dirty() { volatile char stack[4096]; for (char &c : const_cast<char (&)[4096]>(stack)) c = 0x55; }
__attribute__((noinline)) void configure() {
    alignas(64) config tiles = {};
    tiles.palette = 1;
    for (int i = 0; i < 3; ++i) { tiles.rows[i] = 16; tiles.bytes[i] = 64; }
    _tile_loadconfig(&tiles);
}
alignas(64) static int8_t a[16][64], b[16][64];
alignas(64) static int32_t c[16][16];
int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 3;
    dirty();
    configure();
    for (int round = 0; round < 2; ++round) {
        for (int i = 0; i < 16; ++i) for (int k = 0; k < 64; ++k) { a[i][k] = i * 7 + k * 3 + round; b[i][k] = i * 5 - k + round; }
        _tile_zero(0);
        _tile_loadd(1, a, 64);
        _tile_loadd(2, b, 64);
        _tile_dpbssd(0, 1, 2);
        _tile_stored(0, c, 64);
        for (auto &row : c) for (int32_t x : row) printf("%d ", x);
    }
}
"""


@pytest.mark.skipif("amx_int8" not in CPU or not shutil.which("g++"), reason="needs a CPU with AMX and g++")
def test_tiles_compiled_with_the_header_multiply_as_a_plain_product(tmp_path):
    (tmp_path / "tiles.cpp").write_text(PROGRAM)
    header = ROOT / "evaluate" / "amx_tiles.h"
    subprocess.run(["g++", "-O3", "-march=native", f"-include{header}", "tiles.cpp", "-o", "tiles"], cwd=tmp_path, check=True)
    found = subprocess.run([tmp_path / "tiles"], capture_output=True, text=True)
    if found.returncode == 3:
        pytest.skip("the system does not give out tiles")
    assert found.returncode == 0
    i, k = np.arange(16)[:, None], np.arange(64)
    expected = []
    for turn in range(2):
        a, b = (i * 7 + k * 3 + turn).astype(np.int8).astype(int), (i * 5 - k + turn).astype(np.int8).astype(int)
        expected.append(a @ b.reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16))  # rows hold groups of four
    assert np.array_equal(np.fromstring(found.stdout, int, sep=" "), np.concatenate(expected).ravel())


def test_tiles_are_taken_where_most_weights_gain():
    kind = gguf.GGMLQuantizationType
    assert tiles_pay([kind.F32, kind.Q8_0, kind.Q8_0])
    assert tiles_pay([kind.Q4_K] * 30 + [kind.Q6_K] * 8 + [kind.F32] * 50)
    assert not tiles_pay([kind.F16] * 30 + [kind.F32] * 50)
    assert not tiles_pay([kind.Q6_K] * 30)


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M"])
def test_a_prompt_on_quantized_weights_neither_crashes_nor_differs_by_batch(tmp_path, level):
    """A build whose tiles crash must not use them; one whose tiles work gives what single rows, without tiles, give."""
    convert(ROOT / "recipes" / "bases" / "tiny-llama", tmp_path / "f16.gguf")
    make_level(tmp_path / "f16.gguf", level, tmp_path / "level.gguf")
    ids = np.random.default_rng(0).integers(100, 6000, 96).tolist()
    with Engine(tmp_path / "level.gguf", n_threads=1, n_ctx=256, n_seq_max=1) as engine:
        many = engine.decode(ids, range(96), 0, [1] * 96).copy()
        engine.clear()
        one = np.concatenate([engine.decode([t], [i], 0, [1]).copy() for i, t in enumerate(ids)])

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(one), log_softmax(many)
    assert (np.exp(p) * (p - q)).sum(axis=1).mean() < 1e-4, tiles_work()


def test_tiles_that_torch_used_in_the_same_thread_are_configured_again(tmp_path):
    """torch multiplies bfloat16 in tiles and gives them back; llama.cpp alone would end in an illegal instruction."""
    convert(ROOT / "recipes" / "bases" / "tiny-llama", tmp_path / "f16.gguf")
    make_level(tmp_path / "f16.gguf", "Q8_0", tmp_path / "level.gguf")
    (tmp_path / "run.py").write_text("""
import sys
import numpy as np
import torch
from tsugiki.evaluate.engine import Engine

def answer():
    with Engine(sys.argv[1], n_threads=1, n_ctx=128, n_seq_max=1) as engine:
        return engine.decode(list(range(100, 164)), range(64), 0, [1] * 64).copy()

torch.set_num_threads(1)
before = answer()
matrix = torch.ones(512, 512, dtype=torch.bfloat16)
torch.nn.functional.linear(matrix, matrix)
print(np.array_equal(before, answer()))
""")
    done = subprocess.run([sys.executable, "-P", tmp_path / "run.py", tmp_path / "level.gguf"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
