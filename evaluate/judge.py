"""A language model as judge: ratings by a versioned rubric, over an OpenAI-compatible endpoint or a GGUF in-process.

The deterministic score of a domain stays the default: a judge is another model's opinion, and how far it agrees with
people is itself measured (quadratic weighted kappa) where labels are given. Every verdict is kept in ``verdicts.jsonl``
as soon as it is there, under a key of all that decided it, and is never asked for twice.
"""

from __future__ import annotations

import csv
import ipaddress
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tsugiki.artifacts import digest, sha256_file, write_json, write_jsonl
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.paired import Item, compare_items, write_items
from tsugiki.evaluate.rubric import Rubric, read_verdict, requests
from tsugiki.intervals import MIN_CLUSTERS, cluster_weights, clustered_stderr, ratio_intervals
from tsugiki.progress import progress

GGUF_CHUNK = 16  # verdicts that a killed run repeats


@dataclass(frozen=True)
class Judge:
    """Who judges: ``endpoint`` and ``model``, or ``gguf``.

    Attributes:
        endpoint: base URL of an OpenAI-compatible server, ``https://…/v1``; a llama.cpp server is one.
        model: its name at the endpoint.
        gguf: a file, run in this process.
        workers: requests under way together.
        retries: of one request, after a rate limit, a server's error, a timeout or a lost connection; the waits grow
            from 0.5 to 8 s, or are what the server asks for.
        timeout: of one request, seconds.
        key_variable: environment variable of the API key; sent over https and to this machine only.
    """

    endpoint: str = ""
    model: str = ""
    gguf: Path | None = None
    workers: int = 4
    retries: int = 6
    timeout: float = 120.0
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        problems = []
        if bool(self.endpoint) == bool(self.gguf):
            problems.append("name either an endpoint (--endpoint URL --model NAME) or a file (--gguf FILE)")
        if self.endpoint:
            parts = urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                problems.append(f"{self.endpoint!r} is no address of a server; write https://host/v1")
            if parts.username or parts.password:
                problems.append("the address holds a password; give the key in the environment instead")
            if not self.model:
                problems.append("an endpoint needs the name of its model (--model NAME)")
        for name, low in (("workers", 1), ("retries", 0)):
            if getattr(self, name) < low:
                problems.append(f"{name} is {getattr(self, name)}, at least {low} is needed")
        if not self.timeout > 0:
            problems.append(f"timeout is {self.timeout} s, it must be above 0")
        raise_problems(problems, what="the judge")

    @property
    def local(self) -> bool:
        """On this machine, and so without a bill."""
        host = urlsplit(self.endpoint).hostname or ""
        try:
            return not self.endpoint or host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def identity(self) -> dict[str, str]:
        """What tells this judge from another, for the record and the cache."""
        if self.gguf:
            return {"gguf": Path(self.gguf).name, "sha256": sha256_file(self.gguf)}
        return {"endpoint": self.endpoint, "model": self.model}


# --- answers and labels ---------------------------------------------------------------------------------------------


def answer_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Name of a model to its file of answers; a run's folder stands for the answers of all its models.

    Raises:
        UserError: a file that is not there, a folder without answers, two files of one name.
    """
    found: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = list((path / "evaluate").glob("answers-*.jsonl")) or list(path.glob("answers-*.jsonl"))
            inside.sort(key=lambda p: (p.stem != "answers-base", p.stem != "answers-adapted", p.stem))
            if not inside:
                raise UserError("there are no answers here", where=str(path), hint="Run the stage `evaluate` first, or name a .jsonl file.")
            found += [(p.stem.removeprefix("answers-"), p) for p in inside]
        elif path.is_file():
            found.append((path.stem.removeprefix("answers-"), path))
        else:
            raise UserError("there is no such file", where=str(path), hint="Give a run's folder or a .jsonl of answers.")
    twice = [name for name, n in Counter(name for name, _ in found).items() if n > 1]
    if twice:
        raise UserError(f"two files of answers are named {twice[0]!r}", hint="Rename one: the name stands for its model.")
    return dict(found)


def read_answers(path: Path, rubric: Rubric) -> list[dict[str, Any]]:
    """Read a model's answers.

    One JSON object a line: ``{"id", "question", "answer", "reference"?, "document"?, "kind"?}``; for a two-turn
    rubric ``{"id", "turns": [first, second]}`` with the benchmark's question id.

    Raises:
        UserError: every row that is not so, with its line.
    """
    rows, problems, seen = [], [], {}
    wanted = ("question", "answer") if rubric.kind == "single" else ("turns",)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{where}: not JSON: {error}")
            continue
        if not isinstance(row, dict) or "id" not in row:
            problems.append(f"{where}: not an object with an id")
            continue
        row["id"] = str(row["id"])
        problems += [f"{where} ({key}): is missing" for key in wanted if row.get(key) is None]
        problems += [
            f"{where} ({key}): {row[key]!r} is not text" for key in ("question", "answer", "reference")
            if rubric.kind == "single" and row.get(key) is not None and not isinstance(row[key], str)
        ]  # fmt: skip
        if rubric.kind == "two-turn" and "turns" in row:
            turns = row["turns"]
            if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(t, str) for t in turns):
                problems.append(f"{where} (turns): two texts are needed")
            if row["id"] not in rubric.questions:
                problems.append(f"{where} (id): {rubric.name} has no question {row['id']!r}")
        if row["id"] in seen:
            problems.append(f"{where} (id): {row['id']!r} was on line {seen[row['id']]} already")
        seen[row["id"]] = number
        rows.append(row)
    if not rows and not problems:
        problems.append(f"{path.name}: it holds no answer")
    raise_problems(problems, what=str(path))
    return rows


def read_labels(path: Path) -> list[dict[str, Any]]:
    """People's ratings: ``id``, ``label`` (a whole number) and, with several models, ``model``; .jsonl or .csv.

    Raises:
        UserError: rows without id or whole label, or none at all.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"labels cannot be read: {error}", where=str(path)) from error
    labels, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            label = float(row["label"])
            if label != int(label):
                raise ValueError
            labels.append({"id": str(row["id"]), "label": int(label), "model": str(row.get("model") or "")})
        except (KeyError, TypeError, ValueError):
            problems.append(f"row {number}: needs an id and a label that is a whole number, has {str(row)[:80]}")
    if not rows:
        problems.append("no row")
    raise_problems(problems, what=str(path))
    return labels


# --- asking ---------------------------------------------------------------------------------------------------------


def judge_answers(
    answers: Mapping[str, Sequence[dict]],
    rubric: Rubric,
    judge: Judge,
    out: Path,
    *,
    labels: Sequence[dict] | None = None,
    prices: tuple[float, float] | None = None,
    agreed: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Have every answer rated, and say how the models compare and how the judge compares with people.

    Args:
        answers: model → its answers, as :func:`read_answers` returns them.
        labels: as :func:`read_labels` returns them.
        prices: of a million tokens read and of a million written, in any currency.
        agreed: the cost was agreed to; without it an endpoint on another machine is not asked anything.
        say: told the estimate and what is going on.

    Returns:
        what ``out/judge.json`` holds: ``rubric`` (with its hash), ``judge``, ``models`` (mean rating, interval and
        standard error by document, counts of ratings and of malformed verdicts, by kind, and a hash of the answers), ``paired`` (:func:`_pairs`, on the items where both
        have a rating), ``agreement``, ``usage`` and ``cost``. ``verdicts.jsonl`` and
        ``items-<model>.jsonl`` lie beside it.

    Raises:
        UserError: the cost was not agreed to; labels that belong to no model; the judge cannot be reached, refuses
            the key or the request. What was answered until then is kept: run again to go on.
    """
    asked = {model: requests(rubric, rows) for model, rows in answers.items()}
    people = _labels_by_model(labels, asked) if labels else {}
    who = judge.identity()
    for rows in asked.values():
        for r in rows:
            r["key"] = digest([who, rubric.hash, r["messages"], rubric.max_tokens])[:32]
    verdicts = _read_verdicts(out / "verdicts.jsonl")
    missing = list({r["key"]: r for rows in asked.values() for r in rows if r["key"] not in verdicts}.values())
    total = sum(map(len, asked.values()))
    say(f"{total:,} verdicts, {len(missing):,} to ask for")
    if missing:
        estimate = estimate_cost(missing, rubric, prices)
        if not judge.local:
            if not agreed:
                raise UserError(
                    f"{len(missing):,} requests would go to {urlsplit(judge.endpoint).hostname}. {estimate['sentence']}",
                    hint="Agree with --yes" + ("" if prices else "; --price-in and --price-out (of a million tokens) give the cost") + ".",
                )
            say(estimate["sentence"])
        out.mkdir(parents=True, exist_ok=True)
        with (out / "verdicts.jsonl").open("a", encoding="utf-8") as file, progress() as bar:
            task = bar.add_task("judge", total=len(missing), note="")

            def keep(request: dict, reply: dict) -> None:
                verdicts[request["key"]] = row = {"key": request["key"], "id": request["id"], **reply}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.advance(task)

            (_ask_gguf if judge.gguf else _ask_endpoint)(judge, rubric, missing, keep)
    found = _read_out(asked, verdicts, rubric, out, people)
    for row in found["models"]:
        row["answers"] = answers_digest(answers[row["model"]])
    result = {
        "rubric": {"name": rubric.name, "version": rubric.version, "hash": rubric.hash, "scale": list(rubric.scale)},
        "judge": {**who, "temperature": 0},
        **found,
        "usage": _usage([verdicts[k] for k in {r["key"] for rows in asked.values() for r in rows}], prices),
    }
    write_json(out / "judge.json", result)
    return result


def answers_digest(rows: Sequence[Mapping[str, Any]]) -> str:
    """What tells the answers that were rated from others: a hash of their ids and texts."""
    return digest([[str(row["id"]), row.get("answer"), row.get("turns")] for row in rows])[:16]


def estimate_tokens(text: str) -> int:
    """About how many tokens a text is: 1.1 a character outside ASCII (Japanese), 0.3 a character of ASCII."""
    wide = sum(ord(c) > 127 for c in text)
    return math.ceil(1.1 * wide + 0.3 * (len(text) - wide))


def estimate_cost(asked: Sequence[dict], rubric: Rubric, prices: tuple[float, float] | None) -> dict[str, Any]:
    """Tokens to be read (an estimate) and written (the limit), and at the prices of a million tokens their cost."""
    read = sum(estimate_tokens(m["content"]) + 4 for r in asked for m in r["messages"])
    written = len(asked) * rubric.max_tokens
    cost = (read * prices[0] + written * prices[1]) / 1e6 if prices else None
    sentence = f"About {read:,} tokens to read and at most {written:,} to write"
    sentence += f": about {cost:.2f} at most, at the prices given." if prices else "; without prices the cost is not known."
    return {"requests": len(asked), "read": read, "written": written, "cost": cost, "sentence": sentence}


def _read_verdicts(path: Path) -> dict[str, dict]:
    """The verdicts kept so far; a line that a kill has torn is asked again."""
    found = {}
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                row = json.loads(line)
                found[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
    return found


def _ask_endpoint(judge: Judge, rubric: Rubric, asked: Sequence[dict], keep: Callable[[dict, dict], None]) -> None:
    import openai

    safe = judge.local or urlsplit(judge.endpoint).scheme == "https"
    key = os.environ.get(judge.key_variable, "") if safe else ""
    if not key and not judge.local and safe:
        raise UserError(f"there is no API key in ${judge.key_variable}", hint="Set the variable; the key is never written to a file.")
    client = openai.OpenAI(base_url=judge.endpoint, api_key=key or "none", max_retries=judge.retries, timeout=judge.timeout)
    limit = {"name": "max_tokens"}

    def one(request: dict) -> dict:
        while True:
            name = limit["name"]
            try:
                reply = client.chat.completions.create(
                    model=judge.model, messages=request["messages"], temperature=0, **{name: rubric.max_tokens}
                )
                break
            except openai.BadRequestError as error:
                if name != "max_tokens" or "max_completion_tokens" not in str(error):
                    raise
                limit["name"] = "max_completion_tokens"  # newer models take no other
        if not reply.choices:
            raise openai.OpenAIError(f"the server's reply holds no answer: {str(reply)[:200]}")
        usage = reply.usage
        return {
            "text": reply.choices[0].message.content or "", "finished": reply.choices[0].finish_reason,
            "read": usage.prompt_tokens if usage else None, "written": usage.completion_tokens if usage else None,
        }  # fmt: skip

    done = 0
    with client, ThreadPoolExecutor(judge.workers) as pool:
        waiting = {pool.submit(one, r): r for r in asked}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    keep(waiting.pop(future), future.result())
                    done += 1
        except openai.OpenAIError as error:
            pool.shutdown(cancel_futures=True)
            for future, request in waiting.items():  # those that were under way were paid for
                if future.done() and not future.cancelled() and not future.exception():
                    keep(request, future.result())
                    done += 1
            raise UserError(
                f"the judge failed after {done:,} of {len(asked):,} verdicts: {_said(error)}",
                where=judge.endpoint, hint=_advice(error) + " What was answered is kept; run again to go on.",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _advice(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return "The key is not accepted."
    if status == 404:
        return "Is the address right (it usually ends in /v1), and the model's name?"
    if status == 400:
        return "The server refuses the request; the model must take a temperature of 0."
    if status == 429:
        return "The rate limit held on: fewer --workers, or later."
    return "Is the server up?"


def _ask_gguf(judge: Judge, rubric: Rubric, asked: Sequence[dict], keep: Callable[[dict, dict], None]) -> None:
    from tsugiki.evaluate.engine import Engine

    with Engine(judge.gguf, n_ctx=16384, n_seq_max=4, flash_attention=True) as engine:
        for start in range(0, len(asked), GGUF_CHUNK):
            part = asked[start : start + GGUF_CHUNK]
            for request, reply in zip(part, chat_replies(engine, [r["messages"] for r in part], rubric.max_tokens), strict=True):
                keep(request, reply)


def chat_replies(engine, chats: Sequence[list[dict[str, str]]], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[dict]:
    """Replies of a GGUF to conversations, through its own chat template.

    Returns:
        ``{"text", "finished", "read", "written"}`` each; ``finished`` is ``stop``, ``length`` or ``context``. A
        conversation that leaves no room in the context has an empty text and ``finished`` ``context``.
    """
    chats = [[{**m, "content": _plain(engine, m["content"])} for m in chat] for chat in chats]
    prompts = [engine.tokenize(_render(engine, chat), special=True) for chat in chats]
    fits = [i for i, p in enumerate(prompts) if len(p) < engine.context]
    stops = {t for t in (engine.eot, engine.eos) if t >= 0}
    made = engine.generate(
        [prompts[i] for i in fits], max_new_tokens=max_new_tokens, stop_ids=stops, temperature=temperature, seed=seed
    ) if fits else []  # fmt: skip
    replies = [{"text": "", "finished": "context", "read": len(p), "written": 0} for p in prompts]
    for i, g in zip(fits, made, strict=True):
        replies[i] = {"text": engine.detokenize(g.ids), "finished": g.finished, "read": len(prompts[i]), "written": len(g.ids)}
    return replies


def _plain(engine, text: str) -> str:
    """A text in which no special token is written: an answer that holds one must not end the conversation about it."""
    if engine.tokenize(text, special=True) == engine.tokenize(text, special=False):
        return text
    return text.replace("<", "<\u200b").replace("[", "[\u200b")  # a zero-width space


def _render(engine, messages: list[dict[str, str]]) -> str:
    from tsugiki.evaluate.chat import render

    try:
        return render(engine, messages)
    except UserError:
        if messages[0]["role"] != "system":
            raise
        # a template without a system role: its text comes first in the user's
        first, second, *rest = messages
        return render(engine, [{"role": "user", "content": f"{first['content']}\n\n{second['content']}"}, *rest])


# --- MT-Bench's answers ---------------------------------------------------------------------------------------------


def two_turn_answers(
    gguf: Path, rubric: Rubric, out: Path, *, sampled: bool = False, seed: int = 0, limit: int | None = None
) -> Path:
    """A GGUF's answers to the benchmark's two-turn questions; those already in the file are not made again.

    Args:
        out: folder; the file's name holds a hash of model, questions and settings.
        sampled: with the benchmark's temperature for each category; else greedy.
        limit: the first so many questions only.

    Returns:
        the file, ``answers-<name>-<hash>.jsonl``: ``{"id", "category", "turns", "finished", "temperature"}``.
    """
    from tsugiki.evaluate.engine import Engine

    ids = list(rubric.questions)[:limit]
    key = digest([sha256_file(gguf), rubric.questions, rubric.max_new_tokens, sampled, seed])[:8]
    path = out / f"answers-{gguf.stem}-{key}.jsonl"
    done = {row["id"]: row for row in _complete_rows(path)}
    todo = [i for i in ids if i not in done]
    if todo:
        out.mkdir(parents=True, exist_ok=True)
        with Engine(gguf, n_ctx=16384, n_seq_max=8, flash_attention=True) as engine, progress() as bar:
            task = bar.add_task("answers", total=len(ids), completed=len(ids) - len(todo), note=gguf.name)
            for i in todo:
                question = rubric.questions[i]
                temperature = rubric.temperatures.get(question["category"], 0.0) if sampled else 0.0
                chat, turns, finished = [], [], []
                for n, text in enumerate(question["turns"]):
                    chat.append({"role": "user", "content": text})
                    reply = chat_replies(engine, [chat], rubric.max_new_tokens, temperature=temperature, seed=hash_seed(seed, i, n))[0]
                    chat.append({"role": "assistant", "content": reply["text"]})
                    turns.append(reply["text"].strip())
                    finished.append(reply["finished"])
                done[i] = {"id": i, "category": question["category"], "turns": turns, "finished": finished, "temperature": temperature}
                write_jsonl(path, [done[k] for k in ids if k in done])
                bar.advance(task)
    return path


def hash_seed(seed: int, *parts: Any) -> int:
    """A seed of one answer's own, the same whatever was answered before it."""
    return int(digest([seed, *map(str, parts)])[:8], 16)


def _complete_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# --- reading the verdicts -------------------------------------------------------------------------------------------


def _read_out(
    asked: Mapping[str, Sequence[dict]], verdicts: Mapping[str, dict], rubric: Rubric, out: Path, people: Mapping[str, dict[str, int]]
) -> dict[str, Any]:
    models, items = [], {}
    for model, rows in asked.items():
        ratings, malformed = [], Counter()
        for r in rows:
            kept = verdicts[r["key"]]
            rating, why = read_verdict(kept["text"], rubric.prompts[r["prompt"]], rubric.scale)
            if rating is None:
                why = {"length": "cut off", "context": "did not fit the context"}.get(kept["finished"], why)
                malformed[why] += 1
            ratings.append(rating)
        items[model] = [
            Item(r["id"], r["document"], float(x) if x is not None else None, x is None) for r, x in zip(rows, ratings, strict=True)
        ]
        write_items(out / f"items-{model}.jsonl", items[model])
        kinds = sorted({r["kind"] for r in rows})
        pairs = list(zip(rows, ratings, strict=True))
        models.append({
            "model": model, **_mean(pairs), "malformed": dict(malformed),
            "counts": {str(k): v for k, v in sorted(Counter(x for x in ratings if x is not None).items())},
            "kinds": {k: _mean([p for p in pairs if p[0]["kind"] == k]) for k in kinds} if len(kinds) > 1 else {},
            "turns": {t: _mean([p for p in pairs if p[0]["id"].endswith(f"/{t}")]) for t in ("1", "2")} if rubric.kind == "two-turn" else {},
        })  # fmt: skip
    paired = []
    for first, model in _pairs(list(asked)):
        both = {i.id for i in items[first] if i.score is not None} & {i.id for i in items[model] if i.score is not None}
        if both:
            before, after = ([i for i in items[m] if i.id in both] for m in (first, model))
            paired.append({"from": first, "to": model, **compare_items(before, after, span=rubric.scale[1] - rubric.scale[0]), "left_out": len(asked[model]) - len(both)})
    agreement = [
        {"model": model, **agree({i.id: i.score for i in items[model]}, labels, rubric.scale, {i.id: i.document for i in items[model]})}
        for model, labels in people.items()
    ]
    return {"models": models, "paired": paired, "agreement": agreement}


def _pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """Which models are compared: of a run the adapted one with its base and each level with the adapted one, else all with the first."""
    if {"base", "adapted"} <= set(models):
        return [("base", "adapted"), *(("adapted", m) for m in models if m not in ("base", "adapted"))]
    return [(models[0], m) for m in models[1:]]


def _mean(pairs: Sequence[tuple[dict, int | None]]) -> dict[str, Any]:
    """Mean rating of the verdicts that are well formed, with its interval by document."""
    rated = [(r["document"], x) for r, x in pairs if x is not None]
    interval = None
    if rated:
        values = np.array([[x for _, x in rated]], float)
        interval = ratio_intervals(values, np.ones(len(rated)), [d for d, _ in rated])[0]
    return {
        "n": len(pairs), "rated": len(rated), "mean": sum(x for _, x in rated) / len(rated) if rated else None,
        "ci": list(interval) if interval else None, "stderr": clustered_stderr([x for _, x in rated], [d for d, _ in rated]) if rated else None,
    }  # fmt: skip


def _usage(verdicts: Iterable[dict], prices: tuple[float, float] | None) -> dict[str, Any]:
    rows = list(verdicts)
    read, written = (sum(r.get(k) or 0 for r in rows) for k in ("read", "written"))
    cost = (read * prices[0] + written * prices[1]) / 1e6 if prices else None
    return {"verdicts": len(rows), "read": read, "written": written, "cost": cost}


def _labels_by_model(labels: Sequence[dict], asked: Mapping[str, Sequence[dict]]) -> dict[str, dict[str, int]]:
    only = next(iter(asked)) if len(asked) == 1 else ""
    problems, found = [], {}
    for row in labels:
        model = row["model"] or only
        if model not in asked:
            problems.append(f"the label of {row['id']!r} is for {model!r}; the models are {', '.join(asked)}" if model
                            else f"the label of {row['id']!r} names no model, and there are {len(asked)}")
            continue
        found.setdefault(model, {})[row["id"]] = row["label"]
    for model, given in found.items():
        known = {r["id"] for r in asked[model]}
        problems += [f"{model} has no answer {i!r}" for i in given if i not in known]
    raise_problems(problems, what="labels")
    return found


def agree(
    ratings: Mapping[str, float | None], labels: Mapping[str, int], scale: tuple[int, int], documents: Mapping[str, str],
    *, resamples: int = 1000, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """How far a judge's ratings agree with labels: Cohen's kappa with quadratic weights (scikit-learn's).

    Args:
        ratings: id → rating, ``None`` where the verdict is malformed; those are left out and counted.
        labels: id → label.
        scale: lowest and highest rating.
        documents: id → document; the interval draws documents again.

    Returns:
        ``n``, ``malformed``, ``kappa`` and its 95 % ``ci`` (``None`` with ``why`` where undefined), ``exact`` (share of
        equal ratings), ``bias`` (mean rating − mean label).

    Raises:
        UserError: a label outside the scale.
    """
    from sklearn.metrics import cohen_kappa_score

    raise_problems([f"{i!r}: {v} is outside {scale[0]} to {scale[1]}" for i, v in labels.items() if not scale[0] <= v <= scale[1]], what="labels")
    ids = [i for i in labels if ratings[i] is not None]
    found: dict[str, Any] = {"n": len(ids), "malformed": len(labels) - len(ids), "kappa": None, "ci": None, "exact": None, "bias": None, "why": ""}
    if not ids:
        return {**found, "why": "no labelled answer has a rating"}
    a, b = (np.array([int(source[i]) for i in ids]) for source in (ratings, labels))
    found |= {"exact": float((a == b).mean()), "bias": float((a - b).mean())}
    if len({*a, *b}) < 2:
        return {**found, "why": "all ratings and labels are the same, so chance alone explains them"}

    def kappa(weights: np.ndarray | None) -> float:
        return float(cohen_kappa_score(a, b, labels=list(range(scale[0], scale[1] + 1)), weights="quadratic", sample_weight=weights))

    found["kappa"] = kappa(None)
    names, group = np.unique([documents[i] for i in ids], return_inverse=True)
    if len(names) < MIN_CLUSTERS:
        return {**found, "why": f"{len(names)} documents are too few for an interval; at least {MIN_CLUSTERS} are needed"}
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = [kappa(row[group]) for block in cluster_weights(len(names), resamples, seed) for row in block]
    usable = [d for d in draws if math.isfinite(d)]
    if len(usable) >= 0.9 * len(draws):
        found["ci"] = [float(x) for x in np.quantile(usable, [0.025, 0.975])]
    else:
        found["why"] = "over a tenth of the resamples have no kappa"
    return found
