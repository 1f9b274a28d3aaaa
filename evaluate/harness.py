"""A GGUF as a model of lm-eval: every task of the harness runs on the file that ships.

``tsugiki evaluate run`` uses it for the suites. lm-eval's own command line finds it too; lm-eval 0.4.13 has no plugin
mechanism for models, so this module calls it after registering the name ``tsugiki-gguf``::

    python -P -m tsugiki.evaluate.harness run --model tsugiki-gguf --model_args path=model.gguf --tasks arc_easy

(``-P``: without it our folder ``evaluate`` hides the library of that name, which lm-eval imports.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from tsugiki.errors import UserError
from tsugiki.evaluate.cache import cached_generate, cached_loglikelihood
from tsugiki.evaluate.chat import render
from tsugiki.evaluate.engine import Engine
from tsugiki.evaluate.suites import TASKS, task_files
from tsugiki.progress import progress
from tsugiki.tokenizers import load_tokenizer

BOS_POLICIES = ("never", "model")
# Generation options of other backends that may stand in a task's YAML, with the values that change nothing.
_NEUTRAL = {"num_beams": (1,), "repetition_penalty": (1, 1.0), "top_k": (0, -1, None), "min_p": (0, None), "use_cache": (True, False)}
_OURS = {"until", "do_sample", "temperature", "top_p", "max_gen_toks", "max_length", "seed"}


class TsugikiGGUF(TemplateLM):
    """A GGUF in llama.cpp, in this process, behind lm-eval's interface.

    Token ids are the contract: where the base's Hugging Face tokenizer is given, texts are encoded by it, so that
    every file made from that base is asked the same ids; otherwise by llama.cpp's own, as in use.

    Args:
        path: the file.
        tokenizer: folder (or hub id) of the base whose tokenizer encodes and decodes; None: the file's own.
        max_length: tokens of context; None: as many as the model was trained for (memory for what is needed).
        max_gen_toks: answer tokens where a task names no number (256, as lm-eval's other models).
        truncate: ``error`` refuses a prompt that does not fit the context, ``left`` cuts its beginning and counts it.
        add_bos_token: True or False for every task; None follows the task's own policy (``metadata: bos`` in its YAML:
            ``never``, or ``model`` for what the file's add_bos flag says), and the file's flag where it has none.
        bos_policies: task name → policy, beside those of the bundled tasks.
        n_gpu_layers: layers on the GPU; None: all, where llama.cpp was built for one.
        n_seq_max: sequences decoded together; None leaves it to the engine.
        n_threads: CPU threads; None leaves it to the engine.
        cache: file in which finished requests are kept, so that a run that was killed goes on; None keeps none.
        batch_size, max_batch_size, device: lm-eval's command line passes them; the engine chooses for itself.

    Attributes:
        truncated: (task, document) whose answer was ended by its limit or the context, or whose prompt was cut.
        cut: (task, document) whose prompt was cut.
        ties: (task, document) → picks of its greedy answer whose lead on the runner-up was below 0.01 nats: there, another
            machine or another batch may answer otherwise. Sampled answers have none.

    Raises:
        UserError: a file that cannot be opened, a tokenizer with other ids, an unknown option.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        truncate: str = "error",
        add_bos_token: bool | None = None,
        bos_policies: Mapping[str, str] | None = None,
        n_gpu_layers: int | None = None,
        n_seq_max: int | None = None,
        n_threads: int | None = None,
        cache: str | Path | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        if truncate not in ("error", "left"):
            raise UserError(f"truncate is error or left, not {truncate!r}")
        numbers = {"n_gpu_layers": n_gpu_layers, "n_seq_max": n_seq_max, "n_threads": n_threads}
        self.engine = Engine(path, **{name: int(value) for name, value in numbers.items() if value is not None})
        if max_length is not None:  # of one sequence; the memory for many is the engine's affair
            self.engine.context = min(self.engine.context, int(max_length))
        self.path, self.truncate, self.max_gen_toks = Path(path), truncate, int(max_gen_toks)
        self.adds_bos = self.engine.bos >= 0 and self.engine.bos in self.engine.tokenize("", add_bos=True)
        self.tokenizer = _load_tokenizer(tokenizer, self.engine) if tokenizer else None
        self.tokenizer_source = str(tokenizer) if tokenizer else "llama.cpp"
        self.add_bos_token = add_bos_token
        self.bos_policies = dict(bos_policies or {})
        self.cache = Path(cache) if cache else None
        self.truncated: dict[tuple[str | None, int | None], bool] = {}
        self.cut: set[tuple[str | None, int | None]] = set()
        self.ties: dict[tuple[str | None, int | None], int] = {}
        self._bos = self.adds_bos  # the policy of the request being encoded
        self._ids = lru_cache(maxsize=64)(self._encode)  # the options of a question share their context

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> TsugikiGGUF:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- what lm-eval asks about the model ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.engine.eos if self.engine.eos >= 0 else self.engine.eot

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: BOS, else EOS, as lm-eval's Hugging Face class has it."""
        return self.engine.bos if self.engine.bos >= 0 else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self.engine.context

    @property
    def tokenizer_name(self) -> str:
        return f"{self.path.stem}-{self.engine.vocab_digest()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.engine.metadata.get("tokenizer.chat_template", "") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The file's own template; without a generation prompt the text ends with the last message's content."""
        text = render(self.engine, chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        at = text.rfind(last)
        if at < 0:
            raise UserError("the chat template changes the text that the answer begins with", where=str(self.path))
        return text[: at + len(last)]

    def get_model_info(self) -> dict:
        """For the results file: what the file is and who encoded."""
        meta = self.engine.metadata
        return {
            "model_path": str(self.path), "model_bytes": self.path.stat().st_size, "model_tokenizer": self.tokenizer_source,
            "model_name": meta.get("general.name", ""), "model_architecture": meta.get("general.architecture", ""),
            "max_length": self.max_length,
        }  # fmt: skip

    # --- text to ids --------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids without BOS; special tokens written in the text become their ids."""
        if self.tokenizer is not None:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return tuple(self.engine.tokenize(text))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; None adds BOS where the policy of the request says so and the text does not begin with it."""
        ids = list(self._ids(string))
        with_bos = self._bos if add_special_tokens is None else add_special_tokens
        if with_bos and self.engine.bos >= 0 and ids[:1] != [self.engine.bos]:
            ids.insert(0, self.engine.bos)
        return ids

    def policy(self, task: str | None) -> bool:
        """Whether a task's prompts get BOS."""
        if self.add_bos_token is not None:
            return bool(self.add_bos_token)
        policy = self.bos_policies.get(task or "") or bundled_bos_policies().get(task or "", "model")
        return self.adds_bos if policy == "model" else False

    def _with_policy(self, requests: Sequence[Instance], encode: Callable) -> list:
        found = []
        for request in requests:
            self._bos = self.policy(request.task_name)
            found.append(encode(*request.args))
        self._bos = self.adds_bos
        return found

    # --- likelihoods --------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Summed natural log-probability of each continuation, and whether it is the greedy one."""

        def encode(context: str, continuation: str) -> tuple:
            return ((context, continuation), *self._pair(context, continuation))

        return self._scored(self._with_policy(requests, encode), [_key(r) for r in requests], disable_tqdm)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's split: the whole is encoded, the context's length taken off; an empty context is the prefix token."""
        if context.strip():
            head, tail = self._encode_pair(context, continuation)
        else:
            head, tail = [self.prefix_token_id], self.tok_encode(context + continuation, add_special_tokens=False)
            if tail[:1] == head:
                tail = tail[1:]
        if not tail:
            raise UserError(
                f"the continuation {continuation!r} adds no token to {context[-40:]!r}", where=self.path.name,
                hint="An option must not be empty or merge into the prompt: look at target_delimiter and doc_to_choice.",
            )
        return head, tail

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        return self._scored(requests, [(None, None)] * len(requests), disable_tqdm)

    def _scored(self, requests: Sequence[tuple], keys: Sequence[tuple], quiet: bool) -> list[tuple[float, bool]]:
        pairs = [(list(head), list(tail)) for _, head, tail in requests]
        with progress() as bar:
            shown = bar.add_task("likelihoods", total=len(pairs), visible=not quiet, note=self.path.name)
            found = self._likelihoods(pairs, lambda done: bar.update(shown, completed=done))
        for (text, _, _), key, likelihood in zip(requests, keys, found, strict=True):
            if likelihood.truncated:
                self.cut.add(key)
                self.truncated[key] = True
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, (likelihood.logprob, likelihood.greedy))
        return [(f.logprob, f.greedy) for f in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in lm-eval's windows: each token once, with as much context as fits."""

        def windows(text: str) -> list:
            found = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            return [utils.make_disjoint_window(pair) for pair in found]

        parts = self._with_policy(requests, windows)
        flat = [(None, *pair) for part in parts for pair in part]
        scores = iter(self._scored(flat, [(None, None)] * len(flat), disable_tqdm))
        totals = [sum(next(scores)[0] for _ in part) for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation ---------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string, the end-of-text or end-of-turn token, or ``max_gen_toks``."""
        prompts = self._with_policy(requests, lambda text, _: self.tok_encode(text))
        options = [self._options(r.args[1], len(p)) for r, p in zip(requests, prompts, strict=True)]
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple, list[int]] = {}
        for i, o in enumerate(options):
            groups.setdefault((o["temperature"], o["top_p"], o["seed"]), []).append(i)
        with progress() as bar:
            shown = bar.add_task("answers", total=len(requests), visible=not disable_tqdm, note=self.path.name)
            for (temperature, top_p, seed), members in groups.items():
                found = self._generated(
                    [prompts[i] for i in members],
                    on_result=lambda *_: bar.advance(shown),
                    max_new_tokens=[options[i]["new"] for i in members],
                    stop_strings=[options[i]["until"] for i in members],
                    temperature=temperature, top_p=top_p, seed=seed,
                )  # fmt: skip
                for i, generation in zip(members, found, strict=True):
                    answers[i] = self._text(generation, options[i]["until"])
                    self._note(requests[i], generation, options[i]["new"])
                    if not temperature:
                        self.ties[_key(requests[i])] = self.ties.get(_key(requests[i]), 0) + generation.ties()
                        self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _likelihoods(self, pairs: list[tuple[list[int], list[int]]], on_done: Callable[[int], None]):
        return cached_loglikelihood(self.engine, pairs, cache=self.cache, truncate=self.truncate, on_done=on_done)

    def _generated(self, prompts: list[list[int]], **options):
        stops = {token for token in (self.engine.eos, self.engine.eot) if token >= 0}
        return cached_generate(self.engine, prompts, cache=self.cache, stop_ids=stops, truncate=self.truncate, **options)

    def _options(self, kwargs: dict, prompt_tokens: int) -> dict:
        """A task's generation options as the engine's.

        Raises:
            UserError: an option that would change the answer and is not supported here.
        """
        found = dict(normalize_gen_kwargs(kwargs, self.max_gen_toks))
        sampled = found["do_sample"] and found.get("temperature", 0.0) > 0
        for name, value in found.items():
            if name not in _OURS and value not in _NEUTRAL.get(name, ()) and not (name == "top_k" and not sampled):
                raise UserError(
                    f"the generation option {name}: {value!r} is not supported for a GGUF",
                    where="generation_kwargs", hint=f"Supported: {', '.join(sorted(_OURS))}.",
                )
        new = found["max_gen_toks"]
        if "max_length" in kwargs:  # of prompt and answer together
            new = max(1, int(kwargs["max_length"]) - prompt_tokens)
        return {
            "new": new, "until": tuple(u for u in found["until"] if u),
            "temperature": float(found["temperature"]) if sampled else 0.0,
            "top_p": float(found.get("top_p", 1.0)) if sampled else 1.0,
            "seed": int(found.get("seed", 0)),
        }  # fmt: skip

    def _text(self, generation, until: Iterable[str]) -> str:
        text = self.tokenizer.decode(generation.ids, skip_special_tokens=True) if self.tokenizer is not None else generation.text
        return postprocess_generated_text(text, list(until), None)

    def _note(self, request: Instance, generation, new: int) -> None:
        # an answer of one token has its length by definition
        ended = generation.finished == "stop" or (generation.finished == "length" and new == 1)
        if generation.truncated:
            self.cut.add(_key(request))
        self.truncated[_key(request)] = self.truncated.get(_key(request), False) or generation.truncated > 0 or not ended


def _key(request: Instance) -> tuple[str | None, int | None]:
    return request.task_name, request.doc_id


def _load_tokenizer(source: str | Path, engine: Engine):
    from transformers import AutoTokenizer

    try:
        tokenizer = load_tokenizer(source) if Path(source).is_dir() else AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}", where=str(source)) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= engine.vocab_size:
        raise UserError(
            f"the tokenizer has the id {largest}, the vocabulary of {engine.path.name} has {engine.vocab_size}",
            where=str(source), hint="Give the tokenizer of the base that the file was made from, or none.",
        )
    return tokenizer


@lru_cache(maxsize=1)
def bundled_bos_policies() -> dict[str, str]:
    """Task name → BOS policy of the tasks of this kit, as their YAML says."""
    return {name: t["metadata"]["bos"] for name, t in task_files(TASKS).items() if (t.get("metadata") or {}).get("bos")}


def main() -> None:
    """lm-eval's own command line, with ``tsugiki-gguf`` among its models and the tasks of this kit among its tasks."""
    from lm_eval.__main__ import cli_evaluate

    if "run" in sys.argv[1:2] and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(str(error))


model_registry.register("tsugiki-gguf", target="tsugiki.evaluate.harness:TsugikiGGUF")

if __name__ == "__main__":
    main()
