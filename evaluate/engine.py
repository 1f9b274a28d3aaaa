"""The one place that runs a GGUF: token ids in; logits, likelihoods, answers and speed out.

llama.cpp in this process, through llama-cpp-python's low-level interface. Native code may abort the process on a
hostile file: :func:`check_gguf` refuses what it can before, and whoever runs files of unknown origin runs the
engine in a child process (:mod:`tsugiki.quantize.check` does).
"""

from __future__ import annotations

import codecs
import ctypes
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np

from tsugiki.errors import UserError
from tsugiki.evaluate import decoding
from tsugiki.evaluate.decoding import Generation, Likelihood, log_sum_exp
from tsugiki.evaluate.gguf_file import check_gguf
from tsugiki.evaluate.tiles import tiles_pay, tiles_work
from tsugiki.machine import cpu_count
from tsugiki.samples import EncodedSample

__all__ = ["BATCH", "Engine", "Generation", "Likelihood", "Speed", "check_gguf", "log_sum_exp", "thread_count", "token_nll"]

LOGIT_BYTES = 64 << 20  # of float32 logits that one decode call may return: 2,700 rows of a vocabulary of 6,144
CELLS = 4096  # of KV memory at least, where the engine chooses
SPARE = 64  # sequences for prefixes beside the requests under way, and for short continuations of one batch
WIDEST = 64  # answers under way together, where the engine chooses
KV_BYTES = 2 << 30  # of KV memory at most for more than one sequence, where the engine chooses
BATCH = 256  # tokens in one decode call: attention in a unified cache grows with the neighbours in a batch
GPU_BATCH = 1024  # the same where the layers are on a GPU, which needs more to be busy

# --- the engine -------------------------------------------------------------------------------------------------

_complaints: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data) -> None:
    """Keep llama.cpp's last errors instead of printing everything."""
    if level == 3:
        _complaints.append(text.decode("utf-8", "replace").strip())


_opening = threading.Lock()  # llama.cpp describes its system in one static string and registers its devices once


@cache
def _start() -> bool:
    """Prepare llama.cpp once a process; whether its build has an AMX path."""
    # importing llama_cpp installed a callback that prints
    llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


def thread_count(path: Path | str) -> int:
    """CPU threads for a model file: one for each 64 MB begun, at most 16 and at most the cores.

    Threads meet at a barrier after every operation. With matrices of a few hundred rows that costs more than it
    gains, and on a busy machine it stalls: a 9M-parameter model on two busy cores scored in 2 s with one thread
    and in 8 to 22 s with two.
    """
    return min(cpu_count(), 16, 1 + Path(path).stat().st_size // 64_000_000)


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
            the length that the model was trained for. ``None``: as many as a call's requests need, at least
            4,096, for more than one sequence at most ``KV_BYTES``.
        n_seq_max: sequences decoded together. ``None``: :meth:`width` of each call's answers.
        separate: give each sequence ``n_ctx / n_seq_max`` cells of its own. Attention then reads one sequence's
            cells, not everybody's: for many sequences of one length, twice as fast at 32 of 200 tokens.
        n_threads: CPU threads; ``None`` takes :func:`thread_count`.
        n_gpu_layers: layers on the GPU (all: −1). ``None``: all, where llama.cpp was built for a GPU.
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
        load_seconds: opening the file, and the context where ``n_ctx`` is given.
        decoded_tokens: tokens decoded since the engine was opened.
        last_width: answers that the last call of :meth:`generate` had under way together.

    Raises:
        UserError: the file is missing, broken or not supported by this llama.cpp, with llama.cpp's reason.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_ctx: int | None = None,
        n_seq_max: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | None = None,
        flash_attention: bool = False,
        separate: bool = False,
        type_k: int | None = None,
        type_v: int | None = None,
    ):
        self._model = self._context = self._batch = None
        self.path = Path(path)
        kinds = check_gguf(self.path)
        with _opening:
            amx = _start()
        started = time.perf_counter()
        able = llama_cpp.llama_supports_gpu_offload()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = (-1 if able else 0) if n_gpu_layers is None else n_gpu_layers
        self.offload = able and model_params.n_gpu_layers != 0
        if amx and not (tiles_work() and tiles_pay(kinds.values()) and not self.offload):
            model_params.use_extra_bufts = False
        _complaints.clear()
        with _opening:
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), model_params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load it: {_reason()}", where=str(self.path))
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.bos = llama_cpp.llama_vocab_bos(self._vocab)
        self.eos = llama_cpp.llama_vocab_eos(self._vocab)
        self.eot = llama_cpp.llama_vocab_eot(self._vocab)
        self.separate, self.decoded_tokens, self.last_width = separate, 0, 0
        self._pieces: dict[int, bytes] = {}
        self._width, self._grows = n_seq_max, n_ctx is None
        # a unified memory holds prefixes as sequences beside those under way; the number costs it nothing, but a
        # recurrent layer keeps a state for each
        recurrent = llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model)
        self._n_seq_max = n_seq_max = n_seq_max or (16 if separate or recurrent else WIDEST)
        spare = 0 if separate else SPARE // 4 if recurrent else SPARE
        self.sequences = min(llama_cpp.llama_max_parallel_sequences(), n_seq_max + spare)
        trained = llama_cpp.llama_model_n_ctx_train(self._model)
        params = self._params = llama_cpp.llama_context_default_params()
        params.n_seq_max = self.sequences
        params.n_threads = params.n_threads_batch = n_threads or thread_count(self.path)
        params.kv_unified = not separate  # unified: the sequences share the cells, whatever their lengths
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO if flash_attention else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.no_perf = True
        if type_k is not None:
            params.type_k = type_k
        if type_v is not None:
            params.type_v = type_v
        if n_ctx is None:
            self.context = trained or CELLS
        else:
            self._open_context(n_ctx)
            longest = llama_cpp.llama_n_ctx_seq(self._context)
            self.context = min(longest, trained or longest)
        self.load_seconds = time.perf_counter() - started

    def _open_context(self, n_ctx: int) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        self._params.n_ctx = n_ctx = -(-n_ctx // 256) * 256  # as llama.cpp would
        # it aborts where a batch may have fewer rows of logits than there are sequences
        batch = max(GPU_BATCH if self.offload else BATCH, self.sequences)
        self._params.n_batch = self._params.n_ubatch = min(batch, n_ctx)
        self._context = llama_cpp.llama_init_from_model(self._model, self._params)
        if not self._context:
            self.close()
            raise UserError(f"llama.cpp cannot make a context of {n_ctx} tokens: {_reason()}", where=str(self.path))
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._room = llama_cpp.llama_n_ctx(self._context)
        self._n_batch = self._params.n_batch
        self._make_batch()

    def reserve(self, each: int, most: int | None = None) -> None:
        """Make room, where ``n_ctx`` left it to the engine.

        Args:
            each: cells that one sequence needs at most.
            most: cells that all sequences could use together; they get no more than ``KV_BYTES``.
        """
        if not self._grows:
            return
        if self.separate:
            cells = -(-each // 256) * 256 * self._n_seq_max
        else:
            cells = max(each, min(max(most or 0, CELLS), KV_BYTES // self._cell_bytes()))
        if not self._context or cells > self._room:
            self._open_context(cells)

    def width(self, cells: int) -> int:
        """Answers to generate together, when each will have about ``cells`` cells of its own.

        A step of ``W`` answers takes ``F + W·(c + a·W·cells/2)``: reading the weights, ``F``, is shared, while in a
        unified memory each answer's attention passes over the cells of all. ``F`` grows with the file's bytes and
        ``a`` with layers × embedding; the rate is best at ``W = sqrt(2F / (a·cells))``. The constant 1.15 is the
        geometric mean of two measurements on a CPU, 0.56 on the bundled tiny-llama at F16 (tokens a CPU second at
        width 1, 4, 8, 16, 32, 200 tokens each: 1,130, 3,210, 2,630, 1,810, 1,180) and 2.3 on 0.4B parameters at
        Q4_K_M; the curve is flat around its top. A GPU has room for more: ``WIDEST``.
        """
        if self._width or self.separate or self.offload:
            return self._n_seq_max
        model = self._model
        size = llama_cpp.llama_model_n_layer(model) * llama_cpp.llama_model_n_embd(model)
        best = (1.15 * llama_cpp.llama_model_size(model) / max(1, size * cells)) ** 0.5
        return int(min(max(best, 4), self._n_seq_max))

    def _cell_bytes(self) -> int:
        """Bytes of one cell, keys and values of all layers; F32 is assumed."""
        model = self._model
        heads = llama_cpp.llama_model_n_head_kv(model) / max(1, llama_cpp.llama_model_n_head(model))
        return max(1, int(8 * heads * llama_cpp.llama_model_n_embd(model) * llama_cpp.llama_model_n_layer(model)))

    @property
    def settings(self) -> dict[str, int]:
        """What results depend on beside the file and the request, as far as rounding goes."""
        params = self._params
        return {"context": self.context, "type_k": params.type_k, "type_v": params.type_v,
                "flash_attention": params.flash_attn_type, "gpu": int(self.offload)}

    @property
    def memory(self) -> int:
        """llama.cpp's handle of the KV memory."""
        return self._memory

    @property
    def cells(self) -> int:
        """Cells of the KV memory."""
        return self._room

    @property
    def batch(self) -> int:
        """Tokens that one decode call may take."""
        return self._n_batch

    @property
    def logit_rows(self) -> int:
        """Rows of logits that one decode call may return."""
        return max(1, LOGIT_BYTES // (4 * self.vocab_size))

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
        if self._context:
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

    def decode(self, token, pos, seq, flag) -> np.ndarray:
        """Decode up to a batch of tokens; a view ``(flagged, V)`` of the logits, valid until the next call."""
        n = len(token)
        self._token[:n], self._pos[:n], self._seq[:n], self._flag[:n] = token, pos, seq, flag
        self._batch.n_tokens = n
        self.decoded_tokens += n
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {n} tokens of {self.path.name}: {_reason()}")
        rows = int(self._flag[:n].sum())
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (rows, self.vocab_size))

    def check_length(self, name: str, tokens: int) -> None:
        """Refuse a sequence longer than the context."""
        if tokens > self.context:
            raise UserError(
                f"{name} has {tokens} tokens; the context holds {self.context}",
                where=str(self.path),
                hint="Raise n_ctx where the model allows it, or drop over-long samples.",
            )

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        """Refuse ids outside the vocabulary."""
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
            self.check_length(f"sample {s.id!r}", len(s.ids))
            self.check_ids(f"sample {s.id!r}", s.ids)
        longest = max((len(s.ids) for s in samples), default=1)
        self.reserve(longest, max(longest, BATCH))
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
            most = self.logit_rows
            start = done = 0
            while start < len(token):
                end = min(start + self._n_batch, int(np.searchsorted(seen, done + most, "right")))
                part = slice(start, end)
                logits = self.decode(token[part], pos[part], seq[part], flag[part])
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

    def loglikelihood(
        self,
        requests: Sequence[tuple[list[int], list[int]]],
        *,
        truncate: str = "error",
        share: bool = True,
        on_done: Callable[[int], None] | None = None,
        on_result: Callable[[int, Likelihood], None] | None = None,
    ) -> list[Likelihood]:
        """Log-likelihoods of continuations; what the requests' tokens share is decoded once.

        Sharing changes a result by llama.cpp's rounding, which depends on what else is in a batch and where in the
        memory a token lies. Against one request at a time, 100 requests of 5.6 tokens behind four shots on tiny-llama:
        in float32 (weights and cells) 6e-6 nats at most. Within 1e-3 nats lie 81 % for the F16 file (mean 6e-4, largest
        5e-3), whose activations are rounded to 16 bits before each product, and 92 % for Q4_K_M (6e-4, 2e-2), where it
        is 8 bits. F32 cells or llama.cpp's fused attention do not mend that (87 to 96 %).

        Args:
            requests: ``(context, continuation)`` ids, at least one each: an empty context needs BOS or EOS.
            truncate: ``error``, or ``left`` to cut an over-long context from its left; the cut is counted.
            share: ``False`` decodes each request for itself.
            on_done: called with the number of finished requests.
            on_result: called with a request's index and its result as soon as it is there.

        Returns:
            One :class:`Likelihood` a request, in input order.

        Raises:
            UserError: an empty context or continuation, a request longer than the context, ids outside the
                vocabulary, logits that are not finite.
        """
        return decoding.loglikelihood(self, requests, truncate=truncate, share=share, on_done=on_done,
                                      on_result=on_result)

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Iterable[int],
        stop_strings: Sequence[str] | Sequence[Sequence[str]] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        truncate: str = "error",
        share: bool = True,
        on_done: Callable[[int], None] | None = None,
        on_result: Callable[[int, Generation], None] | None = None,
    ) -> list[Generation]:
        """Answer prompts, several at a time; a finished answer's place goes to the next prompt at once.

        Args:
            prompts: token ids, at least one each; what they share is decoded once.
            max_new_tokens: the longest answer, for all prompts or one by one.
            stop_ids: ids that end an answer (the end-of-turn token).
            stop_strings: texts that end an answer, for all prompts or one list a prompt. They may straddle tokens;
                one that is a special token's text ends the answer at that token.
            temperature: 0 takes the most probable token (the lowest id among equals); above, samples are drawn
                by a generator of each prompt's own, seeded with ``(seed, index)``.
            numbers: the prompts' indices in the seed, where these prompts are a part of others.
            top_p: the probability that sampling keeps, from the most probable id down.
            truncate: ``error``, or ``left`` to cut an over-long prompt from its left, so that the whole answer
                has room; the cut is counted.
            share: ``False`` decodes each prompt for itself.
            on_done: called with the number of finished answers.
            on_result: called with a prompt's index and its answer as soon as it is there.

        Returns:
            One :class:`Generation` a prompt, in input order.

        Raises:
            UserError: an empty prompt, one that leaves no room for a token in the context, ids outside the
                vocabulary.
        """
        return decoding.generate(
            self, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, stop_strings=stop_strings,
            temperature=temperature, top_p=top_p, seed=seed, numbers=numbers, truncate=truncate, share=share, on_done=on_done,
            on_result=on_result,
        )

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
        self.check_length("the prompt", len(prompt) + 1)
        self.check_ids("the prompt", prompt)
        self.reserve(min(len(prompt) + max_new_tokens, self.context))
        self.clear()
        stops, rng = frozenset(stop_ids), np.random.default_rng((seed, 0))
        feed, done = list(prompt), 0
        for _ in range(min(max_new_tokens, self.context - len(prompt))):
            for start in range(0, len(feed), self._n_batch):
                part = feed[start : start + self._n_batch]
                last = start + len(part) == len(feed)
                flag = [0] * (len(part) - 1) + [int(last)]
                logits = self.decode(part, range(done, done + len(part)), 0, flag)
                done += len(part)
            picked = decoding.sample(logits, temperature, 1.0, [rng])[0] if temperature > 0 else int(logits[0].argmax())
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
        self.reserve(max(prompt_tokens, gen_tokens))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, max(prompt_tokens, gen_tokens))

        def run(n: int, step: int) -> float:
            self.clear()
            started = time.perf_counter()
            for start in range(0, n, step):
                part = ids[start : min(start + step, n)]
                flag = np.zeros(len(part), np.int8)
                flag[-1] = start + step >= n or step == 1
                self.decode(part, np.arange(start, start + len(part)), 0, flag)
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
        if (known := self._pieces.get(token)) is not None:
            return known
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return self._pieces.setdefault(token, buffer.raw[:n])
            size = -n

    def special_id(self, text: str) -> int | None:
        """The id of the special token whose text this is, or ``None``."""
        ids = self.tokenize(text) if text else []
        return ids[0] if len(ids) == 1 and llama_cpp.llama_vocab_is_control(self._vocab, ids[0]) else None

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


def _reason() -> str:
    return "; ".join(_complaints) or "no reason given"


def token_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``−log softmax(logits)[target]``, nats, float64 ``(R,)``, of float32 logits ``(R, V)``."""
    return log_sum_exp(logits) - logits[np.arange(len(targets)), targets]
