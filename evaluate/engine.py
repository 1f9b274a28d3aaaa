"""The one place that runs a GGUF: token ids in; logits, likelihoods, answers and speed out.

llama.cpp in this process, through llama-cpp-python's low-level interface. Native code may abort the process on a
hostile file: :func:`check_gguf` refuses what it can before, and whoever runs files of unknown origin runs the
engine in a child process (:mod:`tsugiki.quantize.check` does).
"""

from __future__ import annotations

import codecs
import ctypes
import hashlib
import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.samples import EncodedSample

LOGIT_BYTES = 64 << 20  # of float32 logits that one decode call may return: 2,700 rows of a vocabulary of 6,144
BATCH = 256  # tokens in one decode call: attention in a unified cache grows with the neighbours in a batch

# --- the file, before native code sees it -----------------------------------------------------------------------

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's plain value types
_STRING, _ARRAY = 8, 9


class _Reader:
    """Walks over the header; every step that would leave the file is an error."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def skip(self, n: int) -> int:
        start, self.at = self.at, self.at + n
        if self.at > len(self.data):
            raise EOFError
        return start

    def number(self, form: str = "<Q") -> int:
        start = self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def string(self) -> bytes:
        n = self.number()
        start = self.skip(n)
        return self.data[start : start + n]

    def value(self, kind: int, depth: int = 0) -> int:
        """Skip one value; return a small number's value (the alignment is one), else 0."""
        if kind == _STRING:
            self.skip(self.number())
        elif kind == _ARRAY and depth < 2:
            inner, n = self.number("<I"), self.number()
            if inner in _SIZES:
                self.skip(n * _SIZES[inner])
            else:
                for _ in range(n):
                    self.value(inner, depth + 1)
        elif kind == 4:
            return self.number("<I")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"a value of the unknown type {kind}")
        return 0


def check_gguf(path: Path | str) -> None:
    """Refuse a file that is no whole GGUF, reading its header alone (0.2 s for a vocabulary of 150,000).

    Raises:
        UserError: the file is missing, empty, not a GGUF, damaged, or shorter than its header says.
    """
    path = Path(path)
    again = "Make or copy the file again."
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), hint="Give the path of a .gguf file.")
    size = path.stat().st_size
    if size < 24:
        raise UserError(f"not a GGUF file: {size} bytes, a header alone has 24", where=str(path), hint=again)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise UserError(
                f"not a GGUF file: it begins with {data[:4]!r}, not b'GGUF'",
                where=str(path),
                hint="Convert a Hugging Face folder first: tsugiki quantize convert.",
            )
        reader = _Reader(data)
        reader.at = 4
        version = reader.number("<I")
        if version not in (2, 3):
            raise UserError(f"GGUF version {version}; versions 2 and 3 are known", where=str(path), hint=again)
        try:
            end = _announced_size(reader)
        except EOFError:
            raise UserError(
                f"truncated or damaged: the header runs past the end of the file at {size:,} bytes",
                where=str(path),
                hint=again,
            ) from None
        except ValueError as error:
            raise UserError(f"damaged: the header holds {error}", where=str(path), hint=again) from None
    if end > size:
        raise UserError(
            f"truncated: the header announces {end:,} bytes, the file has {size:,}", where=str(path), hint=again
        )


def _announced_size(reader: _Reader) -> int:
    """Bytes of a whole file: where its last tensor ends."""
    tensors, pairs, alignment = reader.number(), reader.number(), 32
    for _ in range(pairs):
        key = reader.string()
        value = reader.value(reader.number("<I"))
        if key == b"general.alignment":
            alignment = value
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment}, not a power of two")
    end = 0
    for _ in range(tensors):
        name = reader.string()
        dimensions = reader.number("<I")
        if dimensions > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions: {name[:40]!r}")
        shape = [reader.number() for _ in range(dimensions)]
        kind, offset = reader.number("<I"), reader.number()
        if kind not in GGML_QUANT_SIZES:
            raise ValueError(f"a tensor of the unknown type {kind}: {name[:40]!r}")
        block, nbytes = GGML_QUANT_SIZES[kind]
        count = 1
        for n in shape:
            count *= n
        end = max(end, offset + count // block * nbytes)
    return -(-reader.at // alignment) * alignment + end


# --- the engine -------------------------------------------------------------------------------------------------

_complaints: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data) -> None:
    """Keep llama.cpp's last errors instead of printing everything."""
    if level == 3:
        _complaints.append(text.decode("utf-8", "replace").strip())


_started = False


def _start() -> None:
    # importing llama_cpp installed a callback that prints; the backend is initialised once a process
    global _started
    if not _started:
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        _started = True


def thread_count(path: Path | str) -> int:
    """CPU threads for a model file: one for each 64 MB begun, at most 16 and at most the cores.

    Threads meet at a barrier after every operation. With matrices of a few hundred rows that costs more than it
    gains, and on a busy machine it stalls: a 9M-parameter model on two busy cores scored in 2 s with one thread
    and in 8 to 22 s with two.
    """
    return min(cpu_count(), 16, 1 + Path(path).stat().st_size // 64_000_000)


@dataclass(frozen=True)
class Generation:
    """One generated answer.

    Attributes:
        ids: the generated ids, without the id that stopped it.
        finished: ``stop`` (a stop id came), ``length`` (``max_new_tokens`` reached) or ``context`` (no room left).
        seconds: from its admission to the batch until its last token; it shares that time with its neighbours.
    """

    ids: list[int]
    finished: str
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Single-stream speed, tokens per second."""

    prompt_tok_s: float
    gen_tok_s: float


class Engine:
    """One open GGUF, as a context manager: it owns native memory.

    Args:
        path: the file.
        n_ctx: cells of the KV memory, shared by all sequences of a batch; one sequence may use all of them, up to
            the length that the model was trained for.
        n_seq_max: sequences decoded together.
        separate: give each sequence ``n_ctx / n_seq_max`` cells of its own. Attention then reads one sequence's
            cells, not everybody's: for many sequences of one length, twice as fast at 32 of 200 tokens.
        n_threads: CPU threads; ``None`` takes :func:`thread_count`.
        n_gpu_layers: layers on the GPU (all: −1); it has no effect on a CPU build.
        flash_attention: let llama.cpp choose its fused attention, as its own programs do. On a CPU it sums in
            half precision, in one way for few tokens and in another for many, so that a sample's likelihood
            depends on its batch (seen: 5e-3 nats, against 8e-4 without): off for scores, on for speed.
        type_k, type_v: ggml's type numbers of the cached keys and values (``None``: F16); quantized values need
            ``flash_attention``.

    Attributes:
        vocab_size: ``V``, the rows of the logits.
        context: the most tokens of one sequence.
        bos, eos, eot: special ids; −1 where the file names none.
        metadata: the file's plain key-value pairs, as text.
        load_seconds: opening the file and the context.

    Raises:
        UserError: the file is missing, broken or not supported by this llama.cpp, with llama.cpp's reason.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_ctx: int = 4096,
        n_seq_max: int = 16,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        flash_attention: bool = False,
        separate: bool = False,
        type_k: int | None = None,
        type_v: int | None = None,
    ):
        self._model = self._context = self._batch = None
        self.path = Path(path)
        check_gguf(self.path)
        _start()
        started = time.perf_counter()
        threads = n_threads or thread_count(self.path)
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = n_gpu_layers
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            # seen: quantized weights repacked for AMX tiles crash llama_decode on a virtual Sapphire Rapids
            model_params.use_extra_bufts = False
        _complaints.clear()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), model_params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load it: {_reason()}", where=str(self.path))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = n_ctx, n_seq_max
        params.n_batch = params.n_ubatch = min(BATCH, n_ctx)
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = not separate  # unified: the sequences share the cells, whatever their lengths
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise UserError(f"llama.cpp cannot make a context of {n_ctx} tokens: {_reason()}", where=str(self.path))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._room = llama_cpp.llama_n_ctx(self._context)
        self._n_seq_max, self._n_batch = n_seq_max, params.n_batch
        longest = llama_cpp.llama_n_ctx_seq(self._context)
        self.context = min(longest, llama_cpp.llama_model_n_ctx_train(self._model) or longest)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.bos = llama_cpp.llama_vocab_bos(self._vocab)
        self.eos = llama_cpp.llama_vocab_eos(self._vocab)
        self.eot = llama_cpp.llama_vocab_eot(self._vocab)
        self._make_batch()
        self.load_seconds = time.perf_counter() - started

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Free the native memory; logits handed out as views are gone after it."""
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def clear(self) -> None:
        """Forget every decoded token."""
        llama_cpp.llama_memory_clear(self._memory, False)

    @property
    def metadata(self) -> dict[str, str]:
        pairs = {}
        for i in range(llama_cpp.llama_model_meta_count(self._model)):
            key = self._text(llama_cpp.llama_model_meta_key_by_index, i)
            pairs[key] = self._text(llama_cpp.llama_model_meta_val_str_by_index, i)
        return pairs

    def _text(self, function: Callable, index: int) -> str:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = function(self._model, index, buffer, size)
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    # --- decoding -----------------------------------------------------------------------------------------------

    def _make_batch(self) -> None:
        # the arrays of llama.cpp's batch are ours, so that a batch is filled by slices, not token by token
        n = self._n_batch
        self._token, self._pos, self._seq = (np.zeros(n, np.int32) for _ in range(3))
        self._flag, self._ones = np.zeros(n, np.int8), np.ones(n, np.int32)
        self._seq_pointers = (self._seq.ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        kinds = dict(llama_cpp.llama_batch._fields_)

        def pointer(name: str, array: np.ndarray):
            return ctypes.cast(array.ctypes.data, kinds[name])

        self._batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=pointer("token", self._token),
            pos=pointer("pos", self._pos),
            n_seq_id=pointer("n_seq_id", self._ones),
            seq_id=pointer("seq_id", self._seq_pointers),
            logits=pointer("logits", self._flag),
        )

    def _decode(self, token, pos, seq, flag) -> np.ndarray:
        """Decode up to a batch of tokens; a view ``(flagged, V)`` of the logits, valid until the next call."""
        n = len(token)
        self._token[:n], self._pos[:n], self._seq[:n], self._flag[:n] = token, pos, seq, flag
        self._batch.n_tokens = n
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {n} tokens of {self.path.name}: {_reason()}")
        rows = int(self._flag[:n].sum())
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (rows, self.vocab_size))

    def _check(self, what: Sequence[tuple[str, list[int]]]) -> None:
        """Refuse ids outside the vocabulary and sequences longer than the context."""
        for name, ids in what:
            if len(ids) > self.context:
                raise UserError(
                    f"{name} has {len(ids)} tokens; the context holds {self.context}",
                    where=str(self.path),
                    hint="Raise n_ctx where the model allows it, or drop over-long samples.",
                )
            if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise UserError(
                    f"{name} holds the id {wrong}; the vocabulary has {self.vocab_size}",
                    where=str(self.path),
                    hint="The ids come from another tokenizer: encode the samples with this model's own.",
                )

    # --- likelihoods --------------------------------------------------------------------------------------------

    def logit_blocks(self, samples: Sequence[EncodedSample]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode samples many at a time; yield the logits that predict their completion tokens, block by block.

        Yields:
            ``rows`` int64 ``(R, 3)``: the sample's index, the position in its completion, the token to predict;
            ``logits`` float32 ``(R, V)``: a view of native memory, valid until the next block is asked for. Rows
            come in input order, samples may straddle blocks; ``R · V · 4`` is at most ``LOGIT_BYTES`` (or one row).
            Engines with equal settings and vocabulary yield equal ``rows``: they can be read in lock-step.

        Raises:
            UserError: a sample without prompt, longer than the context, or with ids outside the vocabulary.
        """
        for s in samples:
            if not s.prompt_ids or not s.completion_ids:
                raise UserError(f"sample {s.id!r} has {len(s.prompt_ids)} prompt and {len(s.completion_ids)} "
                                "completion tokens; each needs at least 1")
        self._check([(f"sample {s.id!r}", s.ids) for s in samples])
        for group in self._groups(samples):
            self.clear()
            token, pos, seq, flag, rows = [], [], [], [], []
            for slot, index in enumerate(group):
                s = samples[index]
                n, first = len(s.ids) - 1, len(s.prompt_ids) - 1
                token += s.ids[:-1]
                pos += range(n)
                seq += [slot] * n
                flag += [0] * first + [1] * (n - first)
                rows += [(index, c, t) for c, t in enumerate(s.completion_ids)]
            seen = np.cumsum(flag)
            most = max(1, LOGIT_BYTES // (4 * self.vocab_size))
            start = done = 0
            while start < len(token):
                end = min(start + self._n_batch, int(np.searchsorted(seen, done + most, "right")))
                part = slice(start, end)
                logits = self._decode(token[part], pos[part], seq[part], flag[part])
                if len(logits):
                    yield np.array(rows[done : done + len(logits)]), logits
                start, done = end, done + len(logits)

    def _groups(self, samples: Sequence[EncodedSample]) -> Iterator[list[int]]:
        """Consecutive samples that fill one batch; attention costs what the cells in use cost, so no more."""
        group: list[int] = []
        tokens = 0
        for i, s in enumerate(samples):
            n = len(s.ids) - 1
            if group and (len(group) == self._n_seq_max or tokens + n > self._n_batch):
                yield group
                group, tokens = [], 0
            group.append(i)
            tokens += n
        if group:
            yield group

    def completion_logits(self, samples: Sequence[EncodedSample]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ``(index, logits)`` in input order: float32 ``(C, V)``, row ``c`` predicts completion token ``c``.

        One sample's logits are in memory at a time. Raises as :meth:`logit_blocks`.
        """
        held: list[np.ndarray] = []
        for rows, logits in self.logit_blocks(samples):
            starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
            for a, b in zip(starts, [*starts[1:], len(rows)], strict=True):
                index = int(rows[a, 0])
                held.append(logits[a:b].copy())
                if rows[b - 1, 1] == len(samples[index].completion_ids) - 1:
                    yield index, np.concatenate(held)
                    held = []

    def completion_nll(self, samples: Sequence[EncodedSample]) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood of each completion, end-of-turn token included.

        Returns:
            ``nll`` float64 ``(N,)``, nats summed over a sample's completion tokens, and ``tokens`` int64 ``(N,)``.
            Raises as :meth:`logit_blocks`.
        """
        nll, tokens = np.zeros(len(samples)), np.zeros(len(samples), np.int64)
        for rows, logits in self.logit_blocks(samples):
            np.add.at(nll, rows[:, 0], token_nll(logits, rows[:, 2]))
            np.add.at(tokens, rows[:, 0], 1)
        return nll, tokens

    # --- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        stop_ids: Iterable[int],
        temperature: float = 0.0,
        seed: int = 0,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Answer prompts, several at a time; a finished answer's place goes to the next prompt at once.

        Args:
            prompts: token ids, at least one each.
            stop_ids: ids that end an answer (the end-of-turn token).
            temperature: 0 takes the most probable token (the lowest id among equals); above, samples are drawn
                by a generator of each prompt's own, seeded with ``(seed, index)``.
            on_done: called with the prompt's index when its answer is finished.

        Returns:
            One :class:`Generation` a prompt, in input order.

        Raises:
            UserError: an empty prompt, or one that leaves no room for a token in the context.
        """
        self._check([(f"prompt {i}", [*p, 0]) for i, p in enumerate(prompts)])
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise UserError(f"prompt {empty[0]} is empty ({len(empty)} of {len(prompts)} are)")
        self.clear()
        stops, results = frozenset(stop_ids), [None] * len(prompts)
        waiting = deque(range(len(prompts)))
        free, active, reserved = list(range(self._n_seq_max))[::-1], [], 0
        while waiting or active:
            while waiting and free:
                prompt = prompts[waiting[0]]
                cells = min(len(prompt) + max_new_tokens, self.context)
                if reserved + cells > self._room:
                    break
                index = waiting.popleft()
                rng = np.random.default_rng((seed, index)) if temperature > 0 else None
                active.append(_Slot(index, free.pop(), cells, list(prompt), rng))
                reserved += cells
            token, pos, seq, flag, ready = [], [], [], [], []
            # answers under way first: one token each; the rest of the batch goes to prompts
            for slot in sorted(active, key=lambda a: len(a.feed) > 1):
                n = min(len(slot.feed), self._n_batch - len(token))
                if not n:
                    break
                token += slot.feed[:n]
                pos += range(slot.done, slot.done + n)
                seq += [slot.seq] * n
                del slot.feed[:n]
                slot.done += n
                flag += [0] * (n - 1) + [int(not slot.feed)]
                if not slot.feed:
                    ready.append(slot)
            logits = self._decode(token, pos, seq, flag)
            for slot, picked in zip(ready, _pick(logits, temperature, [s.rng for s in ready]), strict=True):
                finished = ""
                if picked in stops:
                    finished = "stop"
                else:
                    slot.ids.append(picked)
                    slot.feed.append(picked)
                    if len(slot.ids) == max_new_tokens:
                        finished = "length"
                    elif slot.done >= self.context:
                        finished = "context"
                if finished:
                    results[slot.index] = Generation(slot.ids, finished, time.perf_counter() - slot.started)
                    llama_cpp.llama_memory_seq_rm(self._memory, slot.seq, -1, -1)
                    active.remove(slot)
                    free.append(slot.seq)
                    reserved -= slot.cells
                    if on_done:
                        on_done(slot.index)
        return results

    def stream(
        self,
        prompt: list[int],
        *,
        max_new_tokens: int,
        stop_ids: Iterable[int],
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Generate one answer, id by id, until a stop id, ``max_new_tokens`` or the end of the context.

        Raises as :meth:`generate`.
        """
        if not prompt:
            raise UserError("the prompt is empty")
        self._check([("the prompt", [*prompt, 0])])
        self.clear()
        stops, rng = frozenset(stop_ids), np.random.default_rng((seed, 0))
        feed, done = list(prompt), 0
        for _ in range(min(max_new_tokens, self.context - len(prompt))):
            for start in range(0, len(feed), self._n_batch):
                part = feed[start : start + self._n_batch]
                last = start + len(part) == len(feed)
                flag = [0] * (len(part) - 1) + [int(last)]
                logits = self._decode(part, range(done, done + len(part)), 0, flag)
                done += len(part)
            picked = _pick(logits, temperature, [rng])[0]
            if picked in stops:
                return
            yield picked
            feed = [picked]

    def speed(self, *, prompt_tokens: int = 256, gen_tokens: int = 64, repeats: int = 3) -> Speed:
        """Single-stream speed as llama-bench measures it: random ids, an empty memory, a warm-up, then timed.

        Prompt speed is the decoding of ``prompt_tokens`` ids with the last one's logits; generation speed the
        decoding of ``gen_tokens`` ids one by one. Both are tokens over seconds, summed over
        the repeats (fewer than asked for once they have taken 10 s).
        """
        prompt_tokens, gen_tokens = min(prompt_tokens, self.context), min(gen_tokens, self.context)
        ids = np.random.default_rng(0).integers(0, self.vocab_size, max(prompt_tokens, gen_tokens))

        def run(n: int, step: int) -> float:
            self.clear()
            started = time.perf_counter()
            for start in range(0, n, step):
                part = ids[start : min(start + step, n)]
                flag = np.zeros(len(part), np.int8)
                flag[-1] = start + step >= n or step == 1
                self._decode(part, np.arange(start, start + len(part)), 0, flag)
            return time.perf_counter() - started

        def rate(n: int, step: int) -> float:
            times = []
            while len(times) < repeats and sum(times) < 10:
                times.append(run(n, step))
            return len(times) * n / sum(times)

        run(prompt_tokens, self._n_batch)
        prompt = rate(prompt_tokens, self._n_batch)
        run(min(gen_tokens, 8), 1)
        return Speed(prompt, rate(gen_tokens, 1))

    # --- text ---------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        """Ids of a text by llama.cpp's tokenizer.

        Args:
            special: special tokens written in the text (``<|eot_id|>``) become their ids, as in a chat template.
            add_bos: add what the file asks for at the start; a rendered chat template brings its own.
        """
        data = text.encode("utf-8")
        size = len(data) + 8
        while True:
            ids = (llama_cpp.llama_token * size)()
            n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, size, add_bos, special)
            if n >= 0:
                return list(ids[:n])
            size = -n

    def vocab_digest(self) -> str:
        """SHA-256 over the texts of all tokens: equal for files that share a vocabulary."""
        digest = hashlib.sha256()
        for token in range(self.vocab_size):
            digest.update(llama_cpp.llama_vocab_get_text(self._vocab, token) + b"\0")
        return digest.hexdigest()

    def piece(self, token: int) -> bytes:
        """The bytes of one token, perhaps a part of a character; nothing for a special token."""
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are dropped, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def stream_text(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, each character once all its bytes are there."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(self.piece(token)):
                yield text
        if text := decoder.decode(b"", True):
            yield text


@dataclass
class _Slot:
    """One answer under way: ``feed`` holds the ids still to decode, ``done`` counts the decoded ones."""

    index: int
    seq: int
    cells: int
    feed: list[int]
    rng: np.random.Generator | None
    done: int = 0

    def __post_init__(self):
        self.ids: list[int] = []
        self.started = time.perf_counter()


def _pick(logits: np.ndarray, temperature: float, rngs: list) -> list[int]:
    if temperature <= 0:
        return logits.argmax(axis=1).tolist()
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature))
    # one uniform number in (0, 1] a row, looked up in the cumulative weights: a token of weight 0 is never drawn
    total = weights.cumsum(axis=1, dtype=np.float64)
    return [int(row.searchsorted((1 - rng.random()) * row[-1])) for row, rng in zip(total, rngs, strict=True)]


def _reason() -> str:
    return "; ".join(_complaints) or "no reason given"


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """``log Σ exp`` over the last axis of float32 ``(R, V)``, float64 ``(R,)``: terms in float32, sum in float64."""
    top = logits.max(axis=1, keepdims=True)
    return top[:, 0].astype(np.float64) + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``−log softmax(logits)[target]``, nats, float64 ``(R,)``, of float32 logits ``(R, V)``."""
    return log_sum_exp(logits) - logits[np.arange(len(targets)), targets]
