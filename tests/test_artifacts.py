"""A file is whole or absent, and its hash tells whether it changed."""

import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.artifacts import (
    atomic_path,
    digest,
    read_json,
    read_jsonl,
    refusal,
    sha256_file,
    sha256_tree,
    write_json,
    write_jsonl,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=12,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
        assert temporary.parent == tmp_path / "new"  # one file system: the renaming is atomic
    assert (tmp_path / "new" / "a.txt").read_text() == "whole"
    assert names(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_leaves_the_old_folder(tmp_path):
    for text, fails in (("old", False), ("half", True)):
        try:
            with atomic_path(tmp_path / "folder") as temporary:
                temporary.mkdir()
                write_text(temporary / text, text)
                if fails:
                    raise ValueError
        except ValueError:
            assert fails
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            write_text(temporary / name, name)
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["second"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    code = (
        "import sys\nfrom tsugiki.artifacts import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p, p.open('w') as f:\n"
        "    f.write('half')\n    f.flush()\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout.readline() == b"ready\n"
        os.kill(writer.pid, signal.SIGKILL)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(names(tmp_path)) == 2  # what it had written is still there …
    with atomic_path(tmp_path / "other.txt") as p:
        p.write_text("")
    assert len(names(tmp_path)) == 3
    with atomic_path(tmp_path / "a.txt") as p, atomic_path(tmp_path / "[a].txt") as q:
        p.write_text("new")
        q.write_text("")
    assert names(tmp_path) == ["[a].txt", "a.txt", "other.txt"]  # … until the file is written again


def test_a_living_writers_file_is_left_alone(tmp_path):
    code = (
        "import sys\nfrom tsugiki.artifacts import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p:\n    p.write_text('other')\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path / "a.txt")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"ready\n"
        write_text(tmp_path / "a.txt", "own")
        assert (tmp_path / "a.txt").read_text() == "own" and len(names(tmp_path)) == 2
        writer.stdin.close()
        assert writer.wait() == 0
    assert (tmp_path / "a.txt").read_text() == "other" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_and_a_forbidden_place_are_the_users_to_mend(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    def refused(write, name):
        code = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, code[1]))
        try:
            with pytest.raises(Exception) as error, atomic_path(tmp_path / name) as temporary:
                write(temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, code)
        return str(refusal(error.value))

    for name, write in (("bytes", lambda p: p.write_bytes(bytes(9999))), ("rust", lambda p: save_file({"a": np.zeros(9999)}, p)),
                        ("numpy", lambda p: np.zeros(9999).tofile(p))):
        assert "Free some space" in refused(write, name)
    assert f"{tmp_path / 'bytes'}: File too large" in refused(lambda p: p.write_bytes(bytes(9999)), "bytes")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        write_text(tmp_path / "file" / "a.txt", "")
    assert "who may read and write" in str(refusal(error.value))
    assert refusal(ValueError("x")) is None and refusal(FileNotFoundError(2, "no such file", str(tmp_path / "a"))) is None


@given(value=JSON)
@settings(deadline=None)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value
    write_jsonl(path, [value, value])
    assert read_jsonl(path) == [value, value]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_not_are_refused_and_the_old_file_kept(tmp_path, number):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"nll": number})
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "a.json", [1, number])
    assert read_json(tmp_path / "a.json") == 1


def test_japanese_is_written_as_such(tmp_path):
    write_json(tmp_path / "a.json", "接ぎ木")
    assert "接ぎ木" in (tmp_path / "a.json").read_bytes().decode("utf-8")


def test_hashes_are_sha256(tmp_path):
    content = b"\0abc" * 700_000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == sha256_tree(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_nothing_has_no_hash(tmp_path):
    with pytest.raises(FileNotFoundError):
        sha256_tree(tmp_path / "absent")


def test_a_tree_changes_with_a_name_a_byte_or_a_file(tmp_path):
    write_text(tmp_path / "t" / "sub" / "a", "1")
    seen = [sha256_tree(tmp_path / "t")]
    write_text(tmp_path / "t" / "sub" / "a", "2")
    seen.append(sha256_tree(tmp_path / "t"))
    (tmp_path / "t" / "sub" / "a").rename(tmp_path / "t" / "sub" / "b")
    seen.append(sha256_tree(tmp_path / "t"))
    write_text(tmp_path / "t" / "c", "")
    seen.append(sha256_tree(tmp_path / "t"))
    assert len(set(seen)) == 4
    (tmp_path / "t").rename(tmp_path / "moved")
    assert sha256_tree(tmp_path / "moved") == seen[-1]


@given(value=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(), min_size=2))
@settings(deadline=None)
def test_a_digest_does_not_know_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))
    assert digest(value) != digest(list(value.items()))
    assert digest(value) == digest(json.loads(json.dumps(value)))
