"""Files that are whole or absent, and the hashes that tell whether they changed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tsugiki.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO}
# Process numbers mean something on one machine only; folders may be shared.
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` when the block ends without an error.

    A file or a directory may be written there. On an error the temporary path is removed and what was at
    ``path`` before stays as it was; so are temporary paths for ``path`` whose process was killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_HOST}-*.tmp"):
        number = left.name.rpartition("-")[2].removesuffix(".tmp")
        if left == temporary or (number.isdigit() and not _alive(int(number))):
            _remove(left)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(path)  # a failed write names no file
        raise
    finally:
        _remove(temporary)


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def refusal(error: Exception) -> UserError | None:
    """What to tell the user of an error that a full disk or a place without permission made; ``None`` for all others.

    Libraries in Rust (safetensors, tokenizers) raise exceptions of their own with ``(os error 28)`` in the text, and
    numpy's ``tofile`` an ``OSError`` without a number.
    """
    text = " ".join(map(str, error.args))  # with a file name, str() of an OSError leaves out what it says
    named = re.search(r"\(os error (\d+)\)", text)
    number = getattr(error, "errno", None) or (named and int(named[1]))
    if number is None and isinstance(error, OSError) and re.search(r"requested and \d+ written", text):
        number = errno.ENOSPC
    if "No usable temporary directory" in text:
        return UserError("there is no folder for temporary files that can be written", hint="Free some space, or set TMPDIR to a folder that can.")
    # a name that a file was to have, in place of its temporary one
    place = re.sub(r"(^|/)\.([^/]+)\.[0-9a-f]{6}-\d+\.tmp(?=/|$)", r"\1\2", str(getattr(error, "filename", None) or "")) or None
    if number in _FULL:
        return UserError(os.strerror(number), where=place, hint="Free some space, or write to another place. Nothing half-written was kept.")
    if number in _NO_PLACE or (number == errno.ENOENT and place and not Path(place).parent.exists()):
        return UserError(os.strerror(number), where=place, hint="Check that the place exists and who may read and write it.")
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, atomically; a NaN or an infinity raises ``ValueError``."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_jsonl(path: Path | str, rows: Any) -> None:
    """Write an iterable of JSON values, one a line, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_jsonl(path: Path | str) -> list[Any]:
    """Read a JSON Lines file that this kit wrote."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_tree(path: Path | str) -> str:
    """SHA-256 over the relative names and bytes of all files below a folder (or of one file).

    Raises:
        FileNotFoundError: there is nothing at ``path``.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return digest([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), hexadecimal."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
