"""A header that lies is refused with a sentence, in no time and no memory, whatever it says."""

import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.gguf_file import check_gguf
from tsugiki.quantize.convert import convert

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
HUGE = 2**63


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name=b"a.weight", shape=(32, 4), kind=0, offset=0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def build(pairs=(), tensors=None, counts=None, data=b"\0" * 512) -> bytes:
    """A GGUF of version 3 (the layout of ggml's gguf.md)."""
    tensors = [tensor()] if tensors is None else tensors
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return path


def test_a_whole_file_passes(tmp_path):
    check_gguf(write(tmp_path, build([pair(b"general.alignment", 4, struct.pack("<I", 32))])))


array = struct.pack


@pytest.mark.parametrize(("content", "words"), [
    (build(counts=(HUGE, 0)), "past the end"),
    (build(counts=(1, HUGE)), "past the end"),
    (build(pairs=[pair(b"a", 9, array("<IQ", 8, HUGE))]), "past the end"),
    (build(pairs=[pair(b"a", 9, array("<IQ", 9, HUGE))]), "past the end"),
    (build(pairs=[pair(b"a", 9, array("<IQ", 4, HUGE))]), "past the end"),
    (build(pairs=[pair(b"a", 8, array("<Q", HUGE))]), "past the end"),
    (build(pairs=[pair(b"a", 9, array("<IQIQIQ", 9, 1, 9, 1, 9, 1))]), "unknown type 9"),
    (build(pairs=[pair(b"a", 77, b"")]), "unknown type 77"),
    (build(pairs=[pair(b"a", 4, b"abcd")] * 2), "the key b'a' twice"),
    (build(tensors=[tensor(), tensor()]), "b'a.weight' twice"),
    (build(tensors=[tensor(offset=8)]), "no multiple of the alignment 32"),
    (build(tensors=[tensor(shape=(32, 0))]), r"shape \[32, 0\]"),
    (build(tensors=[tensor(shape=(2**32, 2**32))]), "shape"),
    (build(tensors=[tensor(shape=(2**62,) * 4)]), "shape"),
    (build(tensors=[tensor(shape=())]), "0 dimensions"),
    (build(tensors=[tensor(shape=(1,) * 5)]), "5 dimensions"),
    (build(tensors=[tensor(kind=999)]), "unknown type 999"),
    (build(tensors=[tensor(shape=(33, 4), kind=8)]), "33 weights in blocks of 32"),
    (build(tensors=[tensor(name=b"n" * 64)]), "name of 64 bytes"),
    (build(tensors=[tensor(name=b"")]), "name of 0 bytes"),
    (build(tensors=[tensor(offset=2**40)]), "announces"),
    (build(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 0))]), "alignment of 0"),
    (build(pairs=[pair(b"general.alignment", 4, struct.pack("<I", 33))]), "alignment of 33"),
    (build(pairs=[pair(b"general.alignment", 10, struct.pack("<Q", 32))]), "type 10, not uint32"),
    (build(tensors=[]), "a vocabulary without weights: the header announces 0 tensors"),
])
def test_a_lying_header_is_refused_by_what_it_says(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as error:
        check_gguf(write(tmp_path, content))
    assert "model.gguf" in str(error.value)


def test_huge_counts_cost_neither_time_nor_memory(tmp_path):
    """Arrays of as many empty strings as the file has room for."""
    path = write(tmp_path, build([pair(b"a", 9, struct.pack("<IQ", 8, 1 << 30))]))
    with path.open("r+b") as file:
        file.truncate(20 << 30)  # a hole: no space is taken
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(UserError, match="more than 4,194,304 elements"):
        check_gguf(path)
    assert time.process_time() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_file_of_ours_whose_weights_are_left_out_is_called_a_vocabulary(tmp_path):
    import gguf

    path = tmp_path / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="a vocabulary without weights"):
        Engine(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "model-F16.gguf"
    convert(BASE, out)
    return out.read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_crashes_or_hangs_the_check(tmp_path, whole, data):
    """Bits flipped, numbers replaced by extreme ones, the end cut: the check accepts or says a sentence."""
    head = 300_000  # the header, tensor entries included, is shorter
    content = bytearray(whole[: head + 8])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(4, 400), st.integers(4, head)))
        if data.draw(st.booleans()):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, HUGE, 2**64 - 1])))
    if data.draw(st.booleans()):
        path = write(tmp_path, bytes(content[: data.draw(st.integers(0, head))]))
    else:
        path = write(tmp_path, bytes(content))
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        check_gguf(path)
    except UserError as error:
        assert "model.gguf" in str(error)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_after_the_magic_crash_or_hang_the_check(tmp_path, tail):
    with pytest.raises(UserError):
        check_gguf(write(tmp_path, b"GGUF" + struct.pack("<I", 3) + tail))
