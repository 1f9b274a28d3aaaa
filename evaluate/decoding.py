"""Many requests through one llama.cpp context: shared prefixes are decoded once, many sequences go in one batch.

One walk over the prefix tree serves log-likelihoods and generation. An answer under way is a node whose segment
grows by a token a step. A batch holds one token of each answer under way, then what is ready of the prompts, deepest
first. A request is admitted when sequences and KV cells for all it may ever need are free, so memory cannot overflow
half way; cells are given back when the last request below a node is finished.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.prefixes import Node, prefix_tree, visit

if TYPE_CHECKING:
    from tsugiki.evaluate.engine import Engine


@dataclass(frozen=True)
class Likelihood:
    """One continuation's likelihood.

    Attributes:
        logprob: nats, summed over the continuation's tokens.
        greedy: every token of the continuation is the most probable one (the lowest id among equals).
        truncated: tokens of the context that were cut from its left.
    """

    logprob: float
    greedy: bool
    truncated: int = 0


@dataclass(frozen=True)
class Generation:
    """One generated answer.

    Attributes:
        ids: the generated ids, without the id that stopped it; those of a stop string are among them.
        finished: ``stop`` (a stop id or a stop string came), ``length`` (``max_new_tokens`` reached) or ``context``
            (no room left).
        seconds: from its admission to the batch until its last token; it shares that time with its neighbours.
        text: the ids' bytes as text, cut before the stop string; special tokens are dropped, bytes that are no
            UTF-8 become U+FFFD.
        truncated: tokens of the prompt that were cut from its left.
        margins: for each picked id, that of a stop included, its lead on the runner-up in nats; empty where the
            answer was sampled. Two runs that batch otherwise may part where the lead is as small as their rounding.
    """

    ids: list[int]
    finished: str
    seconds: float
    text: str = ""
    truncated: int = 0
    margins: list[float] = field(default_factory=list, repr=False)

    def ties(self, within: float = 1e-2) -> int:
        """Picks whose lead on the runner-up was less than ``within`` nats."""
        return sum(margin < within for margin in self.margins)


class Walk:
    """A walk over a prefix tree: what is admitted, what is ready, what the next batch holds.

    Args:
        engine: where it decodes; its memory is cleared.
        root, leaves: the tree, and each request's last node.
        extra: cells that each request needs beyond its prompt's.
        width: requests under way together.
        flags: for a node of a prompt, int8, one a token: whether its logits are wanted.
    """

    def __init__(self, engine: Engine, root: Node, leaves: Sequence[Node], extra: Sequence[int], width: int,
                 flags: Callable[[Node], np.ndarray]):
        self.engine, self.root, self.leaves, self.extra, self.flags = engine, root, leaves, extra, flags
        self.waiting = deque(i for node in visit(root) for i in node.ends)
        self.free = list(range(engine.sequences))[::-1]
        self.width, self.reserved, self.unfed = width, 0, 0
        self.active: dict[int, float] = {}  # requests under way, and when they were admitted
        self.finished: set[int] = set()
        self.ready: deque[Node] = deque()  # segments of prompts whose parent is decoded
        self.growing: list[Node] = []  # answers under way
        engine.clear()

    def admit(self) -> None:
        """Give memory to the requests that come next, as long as there is work for them in the next two batches."""
        while self.waiting and len(self.active) < self.width and self.unfed < 2 * self.engine.batch:
            request = self.waiting[0]
            if request not in self.finished:  # an answer may be finished by its prompt's last logits
                if not self._reserve(request):
                    if not self.active:
                        raise RuntimeError(f"request {request} does not fit into an empty memory")
                    return
                self.active[request] = time.perf_counter()
            self.waiting.popleft()

    def _reserve(self, request: int) -> bool:
        path, node = [], self.leaves[request]
        while node.seq < 0 and node.parent is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        needs = [self.extra[request] if n.growing else len(n.tokens) for n in path]
        # the last child takes its parent's sequence over; any other child needs one of its own
        steals = [n.parent is not self.root and n.parent.unadmitted == 1 for n in path]
        if self.reserved + sum(needs) > self.engine.cells or len(path) - sum(steals) > len(self.free):
            return False
        for node, cells, steal in zip(path, needs, steals, strict=True):
            parent = node.parent
            node.seq = parent.seq if steal else self.free.pop()
            node.owns, parent.owns = True, parent.owns and not steal
            node.cells = cells
            self.reserved += cells
            self.unfed += 0 if node.growing else len(node.tokens)
            parent.unadmitted -= 1
            if parent is self.root:
                self.ready.append(node)
            elif parent.fed == len(parent.tokens):
                self._follow(node)
        return True

    def _follow(self, node: Node) -> None:
        """A node's parent is decoded: the node goes on from there, before what else is ready."""
        if node.seq != node.parent.seq:
            llama_cpp.llama_memory_seq_cp(self.engine.memory, node.parent.seq, node.seq, -1, -1)
        if node.growing:
            self.growing.append(node)
        else:
            self.ready.appendleft(node)

    def step(self) -> tuple[list[tuple[Node, int]], np.ndarray]:
        """Decode a batch; the ``(node, offset)`` of each row, and the rows: a view of logits, float32 ``(R, V)``."""
        if self.engine.separate:  # llama.cpp decodes neighbours together whose sequences are consecutive
            self.growing.sort(key=lambda node: node.seq)
        token = [node.tokens[-1] for node in self.growing]
        pos = [node.end - 1 for node in self.growing]
        seq = [node.seq for node in self.growing]
        flag = [1] * len(token)
        rows = [(node, len(node.tokens) - 1) for node in self.growing]
        done = []
        while self.ready and len(token) < self.engine.batch:
            node = self.ready[0]
            wanted = self.flags(node)[node.fed : node.fed + self.engine.batch - len(token)]
            places = np.flatnonzero(wanted)
            if len(rows) + len(places) > self.engine.logit_rows:
                places = places[: self.engine.logit_rows - len(rows)]
                wanted = wanted[: places[-1] + 1 if len(places) else 0]
            n = len(wanted)
            token += node.tokens[node.fed : node.fed + n]
            pos += range(node.start + node.fed, node.start + node.fed + n)
            seq += [node.seq] * n
            flag += wanted.tolist()
            rows += [(node, node.fed + int(place)) for place in places]
            node.fed += n
            self.unfed -= n
            if node.fed < len(node.tokens):
                break
            done.append(self.ready.popleft())
        logits = self.engine.decode(token, pos, seq, flag)
        for node in reversed(done):
            for child in reversed(node.children):
                if child.seq >= 0:
                    self._follow(child)
        return rows, logits

    def finish(self, request: int) -> float:
        """A request is finished: give back what nobody needs any more. Returns the seconds since its admission."""
        node = self.leaves[request]
        if node.growing:
            if node.seq < 0:
                node.parent.unadmitted -= 1
            else:
                self.growing.remove(node)
        self.finished.add(request)
        while node is not None:
            node.left -= 1
            if not node.left and node.seq >= 0:
                self.reserved -= node.cells
                if node.owns:
                    llama_cpp.llama_memory_seq_rm(self.engine.memory, node.seq, -1, -1)
                    self.free.append(node.seq)
            node = node.parent
        started = self.active.pop(request, None)
        return time.perf_counter() - started if started else 0.0


# --- log-likelihoods --------------------------------------------------------------------------------------------


def loglikelihood(
    engine: Engine,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    truncate: str = "error",
    share: bool = True,
    on_done: Callable[[int], None] | None = None,
    on_result: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """See :meth:`tsugiki.evaluate.engine.Engine.loglikelihood`."""
    problems = [f"request {i} has an empty {what}" for i, request in enumerate(requests)
                for what, ids in zip(("context", "continuation"), request, strict=True) if not ids]
    raise_problems(problems, what="requests without text", hint="Begin an empty context with BOS, or EOS.")
    # the last token of the continuation is predicted, not decoded
    cuts = [_cut(engine, f"request {i}", len(c) + len(a) - 1, len(c), engine.context, truncate)
            for i, (c, a) in enumerate(requests)]
    paths = [[*context[cut:], *answer[:-1]] for (context, answer), cut in zip(requests, cuts, strict=True)]
    for i, (path, (_, answer)) in enumerate(zip(paths, requests, strict=True)):
        engine.check_ids(f"request {i}", path)
        engine.check_ids(f"request {i}", answer[-1:])
    root, leaves = prefix_tree(paths, share=share and not engine.separate)
    marks: dict[Node, dict[int, list[tuple[int, int, bool]]]] = {}
    for i, (node, (_, answer)) in enumerate(zip(leaves, requests, strict=True)):
        at = len(paths[i])
        for k in range(len(answer) - 1, -1, -1):
            at -= 1
            while at < node.start:
                node = node.parent
            marks.setdefault(node, {}).setdefault(at - node.start, []).append((i, answer[k], k == len(answer) - 1))

    def flags(node: Node) -> np.ndarray:
        wanted = np.zeros(len(node.tokens), np.int8)
        wanted[list(marks.get(node, ()))] = 1
        return wanted

    _reserve(engine, root, paths, [0] * len(paths), engine.sequences)
    walk = Walk(engine, root, leaves, [0] * len(paths), engine.sequences, flags)
    sums, greedy, results = np.zeros(len(requests)), np.ones(len(requests), bool), [None] * len(requests)
    while len(walk.finished) < len(requests):
        walk.admit()
        rows, logits = walk.step()
        if not rows:
            continue
        top, total = logits.argmax(axis=1), log_sum_exp(logits)
        if not np.isfinite(total).all():
            raise UserError("the model's logits are not finite numbers", where=str(engine.path),
                            hint="The file is damaged, or its weights have overflowed.")
        ended = []
        for row, (node, offset) in enumerate(rows):
            for request, target, last in marks[node][offset]:
                sums[request] += logits[row, target] - total[row]
                greedy[request] &= top[row] == target
                if last:
                    ended.append(request)
        for request in ended:
            walk.finish(request)
            results[request] = Likelihood(float(sums[request]), bool(greedy[request]), cuts[request])
            if on_result:
                on_result(request, results[request])
            if on_done:
                on_done(len(walk.finished))
    return results


def _reserve(engine: Engine, root: Node, paths: Sequence[list[int]], extra: Sequence[int], width: int) -> None:
    """Ask for the cells of ``width`` requests beside the longest, or of all if they need less."""
    nodes, total = [root], sum(extra)
    for node in nodes:
        nodes += node.children
        total += len(node.tokens)
    needs = [len(path) + more for path, more in zip(paths, extra, strict=True)]
    longest = max(needs, default=1)
    own = max((len(n.tokens) + (extra[n.ends[0]] if n.growing else 0) for n in nodes if not n.children), default=0)
    engine.reserve(longest, min(total, longest + width * own))


def _cut(engine: Engine, name: str, tokens: int, context: int, room: int, truncate: str) -> int:
    """How many of a request's context tokens must go, so that its tokens fit the room."""
    if truncate not in ("error", "left"):
        raise UserError(f"truncate is {truncate!r}, not 'error' or 'left'")
    over = max(0, tokens - room)
    if over and (truncate == "error" or over >= context):
        raise UserError(
            f"{name} has {tokens} tokens; the context holds {room}"
            + (f", and {context} of them are its context" if truncate == "left" else ""),
            where=str(engine.path),
            hint="Use fewer shots, truncate='left', or a larger n_ctx where the model allows it.",
        )
    return over


# --- generation -------------------------------------------------------------------------------------------------


def generate(
    engine: Engine,
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
    """See :meth:`tsugiki.evaluate.engine.Engine.generate`."""
    n = len(prompts)
    if empty := [i for i, p in enumerate(prompts) if not p]:
        raise UserError(f"prompt {empty[0]} is empty ({len(empty)} of {n} are)")
    limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) != n or min(limits, default=1) < 1:
        raise UserError(f"{n} prompts, {len(limits)} limits of new tokens, the least {min(limits, default=1)}; "
                        "each prompt needs one of at least 1")
    # truncation leaves room for the whole answer; without it an answer may end at the end of the context
    cuts = [_cut(engine, f"prompt {i}", len(p) + (limit if truncate == "left" else 1), len(p), engine.context, truncate)
            for i, (p, limit) in enumerate(zip(prompts, limits, strict=True))]
    paths = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
    for i, path in enumerate(paths):
        engine.check_ids(f"prompt {i}", path)
    stops = frozenset(stop_ids)
    enders = [_Ender(engine, stops, strings) for strings in _per_prompt(stop_strings, n)]
    extra = [min(limit - 1, engine.context - len(path)) for limit, path in zip(limits, paths, strict=True)]

    root, ends = prefix_tree(paths, share=share and not engine.separate)
    leaves = []
    for i, node in enumerate(ends):
        node.ends.remove(i)
        leaves.append(Node([], node.end, node, ends=[i], growing=True))
        node.children.append(leaves[-1])

    def flags(node: Node) -> np.ndarray:
        wanted = np.zeros(len(node.tokens), np.int8)
        wanted[-1] = any(child.growing for child in node.children)
        return wanted

    # in use on average: a prompt's own part, and half of an answer; one that may stop is taken as a quarter of its limit
    own = [2 * len(leaf.parent.tokens) * (len(leaf.parent.children) == 1)
           + (more // 4 if stops or strings else more)
           for leaf, more, strings in zip(leaves, extra, _per_prompt(stop_strings, n), strict=True)]
    width = engine.width(max(1, sum(own) // max(1, n)))
    _reserve(engine, root, paths, extra, width)
    width = engine.last_width = min(width, engine.batch, engine.logit_rows)
    walk = Walk(engine, root, leaves, extra, width, flags)
    rngs = [np.random.default_rng((seed, i)) for i in numbers or range(n)] if temperature > 0 else None
    margins, results = [[] for _ in prompts], [None] * n
    while len(walk.finished) < n:
        walk.admit()
        rows, logits = walk.step()
        # an answer's own row, or that of a prompt's end, from which one or more answers begin
        answers = [(row, leaf) for row, (node, _) in enumerate(rows)
                   for leaf in ((node,) if node.growing else [c for c in node.children if c.growing])]
        if rngs:
            picked = sample(logits[[row for row, _ in answers]] if len(answers) > len(rows) else logits,
                            temperature, top_p, [rngs[leaf.ends[0]] for _, leaf in answers])
        else:
            best, lead = greedy(logits)
            picked = [best[row] for row, _ in answers]
        for (row, leaf), token in zip(answers, picked, strict=True):
            i = leaf.ends[0]
            if not rngs:
                margins[i].append(lead[row])
            finished = enders[i].add(token)
            if finished != "id":
                leaf.tokens.append(token)
                if not finished and len(leaf.tokens) == limits[i]:
                    finished = "length"
                elif not finished and leaf.end > engine.context:
                    finished = "context"
            if finished:
                seconds = walk.finish(i)
                text = enders[i].text(leaf.tokens)
                results[i] = Generation(leaf.tokens, "stop" if finished == "id" else finished, seconds, text,
                                        cuts[i], margins[i])
                if on_result:
                    on_result(i, results[i])
                if on_done:
                    on_done(len(walk.finished))
    return results


def _per_prompt(stop_strings: Sequence, n: int) -> list[tuple[str, ...]]:
    if isinstance(stop_strings, str):
        raise UserError(f"stop_strings is the text {stop_strings!r}, not a list of texts")
    if all(isinstance(s, str) for s in stop_strings):
        return [tuple(stop_strings)] * n
    if len(stop_strings) != n:
        raise UserError(f"{n} prompts and {len(stop_strings)} lists of stop strings")
    return [tuple(strings) for strings in stop_strings]


class _Ender:
    """Says when one answer ends: at a stop id, or where its bytes hold a stop string, over tokens' borders."""

    def __init__(self, engine: Engine, stops: frozenset[int], strings: tuple[str, ...]):
        self.engine, self.stops = engine, stops
        specials = {s: token for s in strings if (token := engine.special_id(s)) is not None}
        if specials:  # special tokens have no text in an answer
            self.stops = stops | set(specials.values())
        # UTF-8 cannot match in the middle of a character
        self.strings = [s.encode() for s in strings if s and s not in specials]
        self.longest = max(map(len, self.strings), default=0)
        self.bytes, self.cut = bytearray(), None

    def add(self, token: int) -> str:
        """``id`` for a stop id, ``stop`` once a stop string is complete, else nothing."""
        if token in self.stops:
            return "id"
        if not self.strings:
            return ""
        start = max(0, len(self.bytes) - self.longest + 1)
        self.bytes += self.engine.piece(token)
        places = [place for s in self.strings if (place := self.bytes.find(s, start)) >= 0]
        if places:
            self.cut = min(places)
        return "stop" if places else ""

    def text(self, ids: list[int]) -> str:
        if not self.strings:
            return self.engine.detokenize(ids)
        return bytes(self.bytes[: self.cut]).decode("utf-8", "replace")


def greedy(logits: np.ndarray) -> tuple[list[int], list[float]]:
    """Most probable ids (the lowest among equals) and their leads on the runners-up, nats; ``logits`` is changed."""
    rows = np.arange(len(logits))
    top = logits.argmax(axis=1)
    best = logits[rows, top]
    logits[rows, top] = -np.inf
    return top.tolist(), (best - logits.max(axis=1)).tolist()


def sample(logits: np.ndarray, temperature: float, top_p: float, rngs: Sequence[np.random.Generator]) -> list[int]:
    """Draw an id a row, each with its own generator.

    Args:
        logits: float32 ``(R, V)``.
        temperature: the logits' divisor, above 0.
        top_p: draw among the most probable ids whose probabilities sum to at least this (Holtzman et al. 2020, §3.1).
    """
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature))
    if top_p < 1:
        for row in weights:
            order = np.argsort(-row, kind="stable")
            mass = row[order].cumsum(dtype=np.float64)
            row[order[np.searchsorted(mass, top_p * mass[-1]) + 1 :]] = 0
    # one uniform number in (0, 1] a row, looked up in the cumulative weights: a token of weight 0 is never drawn
    total = weights.cumsum(axis=1, dtype=np.float64)
    return [int(row.searchsorted((1 - rng.random()) * row[-1])) for row, rng in zip(total, rngs, strict=True)]


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """``log Σ exp`` over the last axis of float32 ``(R, V)``, float64 ``(R,)``: terms in float32, sum in float64."""
    top = logits.max(axis=1, keepdims=True)
    return top[:, 0].astype(np.float64) + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))
