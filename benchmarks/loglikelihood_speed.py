"""Log-likelihoods of options, items a second, side by side in one run: ours, lm-eval's GGUF route, lm-eval on transformers.

    python -P benchmarks/loglikelihood_speed.py --llama-cpp DIR [--items 40] [--slow-items 4] [--keep DIR] [--json FILE]

A random-weight Llama of about 0.4B parameters with the real 128k vocabulary of Llama 3 at Q4_K_M, and five-shot
questions of JMMLU (made-up ones where the data is not at hand): once with the letters as options (one token each), once
with the options' texts (several tokens). Routes:

- ``ours``: ``TsugikiGGUF.loglikelihood``, all items in one call, as ``tsugiki evaluate run`` does it;
- ``lm-eval gguf``: lm-eval's own class over llama-cpp-python's server on this machine, the same file;
- ``lm-eval hf``: lm-eval's own class on transformers, the same weights unquantized, in float32 and in bfloat16.

The slow routes get less work, and their rate does not depend on it: they reuse nothing between items. transformers gets
``--slow-items`` items; the server, which sorts the whole vocabulary in Python for every token of the prompt (minutes a
request), ``--server-requests`` of the four requests of an item. Random weights have near-ties: whether the routes agree is seen on the trained ``tiny-llama``.

``--llama-cpp`` (or ``TSUGIKI_LLAMA_CPP``) is a source tree of llama.cpp, for ``models/ggml-vocab-llama-bpe.gguf``; the
source archive of llama-cpp-python holds one (``pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36``,
``vendor/llama.cpp``). The server is the extra ``llama-cpp-python[server]``; without it that route is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsugiki.artifacts import write_json
from tsugiki.errors import UserError
from tsugiki.machine import cpu_count
from tsugiki.quantize.convert import convert
from tsugiki.quantize.levels import make_level

TINY = Path(__file__).parent.parent / "recipes" / "bases" / "tiny-llama"
SUBJECT = "japanese_history"
SHOTS, LETTERS = 5, "ABCD"
# llama-cpp-python's server as it is, but for two things: it ends with this process, and, as the engine does, it keeps
# weights from being repacked for AMX tiles in a build where that crashes.
SERVER = """
import os, runpy, threading, time, llama_cpp.llama_cpp as low
from tsugiki.evaluate.tiles import tiles_work
def follow(parent=os.getppid()):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
threading.Thread(target=follow, daemon=True).start()
defaults = low.llama_model_default_params
def plain():
    params = defaults()
    if b"AMX_INT8 = 1" in low.llama_print_system_info() and not tiles_work():
        params.use_extra_bufts = False
    return params
low.llama_model_default_params = plain
runpy.run_module("llama_cpp.server", run_name="__main__")
"""
Pair = tuple[str, str]


def random_model(folder: Path, llama_cpp: Path) -> tuple[Path, Path]:
    """The Hugging Face folder and its Q4_K_M file, made once a folder: 415M parameters, embeddings tied."""
    hf, quantized = folder / "hf", folder / "model-Q4_K_M.gguf"
    if not (hf / "config.json").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        vocabulary = llama_cpp / "models" / "ggml-vocab-llama-bpe.gguf"
        if not vocabulary.is_file():
            raise UserError("there is no such vocabulary", where=str(vocabulary), hint="Give --llama-cpp, a source tree of llama.cpp.")
        tokenizer = AutoTokenizer.from_pretrained(vocabulary.parent, gguf_file=vocabulary.name)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=1024, intermediate_size=3584, num_hidden_layers=20,
            num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=True,
            rope_theta=5e5, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        tokenizer.save_pretrained(hf)
        LlamaForCausalLM(config).half().save_pretrained(hf)
    if not quantized.exists():
        convert(hf, folder / "model-F16.gguf")
        make_level(folder / "model-F16.gguf", "Q4_K_M", quantized)
        (folder / "model-F16.gguf").unlink()
    return hf, quantized


def questions(count: int) -> list[dict]:
    """Rows of a JMMLU subject; made-up ones of like length where the data is not at hand."""
    try:
        from tsugiki.evaluate.data import load_set

        rows = load_set("jmmlu", config=SUBJECT)["test"]
    except UserError:
        rng, words = random.Random(0), ["設備", "点検", "配管", "ポンプ", "温度", "圧力", "記録", "期間", "担当", "法令", "工事", "現場", "資格", "安全", "管理", "基準"]

        def text(n: int) -> str:
            return "の".join(rng.choices(words, k=n))

        rows = [{"question": text(20) + "とは何ですか。", **{a: text(4) for a in LETTERS}, "answer": rng.choice(LETTERS)} for _ in range(count + SHOTS)]
    if len(rows) < count + SHOTS:
        raise UserError(f"{count} items were asked for, the subject has {len(rows) - SHOTS}")
    return rows


def requests_of(rows: list[dict], count: int, letters: bool) -> list[list[Pair]]:
    """For each item its four (context, continuation) pairs: five shots shared by all, then the question."""

    def ask(row: dict) -> str:
        options = "\n".join(f"{a}. {row[a]}" for a in LETTERS)
        return f"{row['question']}\n{options}\n答え："

    def option(row: dict, letter: str) -> str:
        return letter if letters else row[letter]

    prefix = "".join(f"{ask(r)}{option(r, r['answer'])}\n\n" for r in rows[:SHOTS])
    return [[(prefix + ask(r), option(r, a)) for a in LETTERS] for r in rows[SHOTS : SHOTS + count]]


def instances(items: list[list[Pair]]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, k, ("bench", i, 1)) for i, item in enumerate(items) for k, pair in enumerate(item)]


def timed(score: Callable[[list], list], asked: list) -> tuple[float, list[tuple[float, bool]]]:
    """Items of four requests a second, and the likelihoods."""
    began = time.perf_counter()
    found = score(asked)
    return len(asked) / 4 / (time.perf_counter() - began), found


# --- the routes ---------------------------------------------------------------------------------------------------


@contextmanager
def ours(path: Path, _: Path) -> Iterator[Callable]:
    from tsugiki.evaluate.harness import TsugikiGGUF

    with TsugikiGGUF(path) as lm:
        yield lambda asked: lm.loglikelihood(asked, disable_tqdm=True)


@contextmanager
def lm_eval_gguf(path: Path, _: Path) -> Iterator[Callable]:
    """lm-eval's ``gguf`` model over llama-cpp-python's server, with what it needs to echo log-probabilities."""
    import llama_cpp
    from lm_eval.models.gguf import GGUFLM

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    layers = "-1" if llama_cpp.llama_supports_gpu_offload() else "0"
    command = [sys.executable, "-P", "-c", SERVER, "--model", path, "--host", "127.0.0.1", "--port", port, "--n_ctx", 4096,
               "--logits_all", "true", "--n_threads", cpu_count(), "--n_threads_batch", cpu_count(), "--n_gpu_layers", layers, "--verbose", "false"]  # fmt: skip
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if server.poll() is not None:
                raise UserError(f"the server ended with {server.returncode}", hint="Is llama-cpp-python[server] installed?")
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        lm = GGUFLM(base_url=url)
        yield lambda asked: lm.loglikelihood(asked, disable_tqdm=True)
    finally:
        server.terminate()
        server.wait()


@contextmanager
def lm_eval_hf(dtype: str, hf: Path) -> Iterator[Callable]:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(cpu_count())
    lm = HFLM(pretrained=str(hf), dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu", batch_size=4)
    yield lambda asked: lm.loglikelihood(asked, disable_tqdm=True)


def routes(path: Path, hf: Path, with_server: bool) -> dict[str, Callable]:
    found = {"ours": lambda: ours(path, hf)}
    if with_server:
        found["lm-eval gguf"] = lambda: lm_eval_gguf(path, hf)
    for dtype in ("float32", "bfloat16"):
        found[f"lm-eval hf {dtype}"] = lambda dtype=dtype: lm_eval_hf(dtype, hf)
    return found


def agreement(found: list[tuple[float, bool]], reference: list[tuple[float, bool]]) -> dict:
    """Share of items with the same likeliest option, and the largest difference of a likelihood, nats."""

    def best(scores: list[tuple[float, bool]]) -> list[int]:
        return [max(range(4), key=lambda k: scores[4 * i + k][0]) for i in range(len(scores) // 4)]

    same = [a == b for a, b in zip(best(found), best(reference), strict=False)]  # the server has fewer items
    return {"items": len(same), "same_answer": sum(same) / len(same),
            "largest_difference_nats": max(abs(a[0] - b[0]) for a, b in zip(found, reference, strict=False))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=40, help="of our route")
    parser.add_argument("--slow-items", type=int, default=4, help="of transformers")
    parser.add_argument("--server-requests", type=int, default=1, help="of the server, a quarter of an item each; 0 leaves it out")
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("TSUGIKI_LLAMA_CPP"), help="source tree of llama.cpp")
    parser.add_argument("--keep", type=Path, help="folder for the model, found there the next time; else a temporary one")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    if given.llama_cpp is None and not (given.keep and (given.keep / "hf" / "config.json").exists()):
        parser.exit(0, "loglikelihood_speed: left out, it needs --llama-cpp DIR or TSUGIKI_LLAMA_CPP\n")
    with_server = given.server_requests > 0 and importlib.util.find_spec("starlette_context") is not None  # of the extra
    if given.server_requests > 0 and not with_server:
        print("lm-eval's own GGUF route is left out: pip install 'llama-cpp-python[server]'", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        hf, quantized = random_model(folder, Path(given.llama_cpp or "."))
        tiny = Path(temporary) / "tiny.gguf"
        convert(TINY, tiny)
        rows, console = questions(max(given.items, given.slow_items)), Console(stderr=True)
        speed: dict[str, dict[str, float]] = {"letters": {}, "texts": {}}
        zeros: dict[str, dict[str, float]] = {"letters": {}, "texts": {}}
        scores: dict[str, dict[str, list]] = {"letters": {}, "texts": {}}
        for name, open_route in routes(quantized, hf, with_server).items():
            with open_route() as score:
                score(instances([[("Answer:", " A")]]))  # a warm-up
                for kind in speed:
                    asked = instances(requests_of(rows, given.items if name == "ours" else given.slow_items, kind == "letters"))
                    asked = asked[: given.server_requests] if name == "lm-eval gguf" else asked
                    speed[kind][name], found = timed(score, asked)
                    zeros[kind][name] = sum(logprob == 0 for logprob, _ in found) / len(found)
                    console.print(f"{name}, {kind}: {len(asked)} requests, {speed[kind][name]:.3g} items a second")
        for name, open_route in routes(tiny, TINY, with_server).items():
            if name != "lm-eval hf bfloat16":
                with open_route() as score:
                    for kind in scores:
                        scores[kind][name] = score(instances(requests_of(rows, 1 if name == "lm-eval gguf" else given.slow_items * 2, kind == "letters")))
    report(speed, zeros, scores, given)


def report(speed: dict, zeros: dict, scores: dict, given: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="Items a second (four options, five shots)", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("options", *speed["letters"], "least times"):
        table.add_column(column, justify="left" if column == "options" else "right")
    found = {"machine": f"{platform.machine()}, {cpu_count()} CPUs", "items": given.items, "slow_items": given.slow_items, "server_requests": given.server_requests,
             "items_per_second": speed, "share_of_likelihoods_that_are_zero": zeros, "times": {}, "agreement_on_tiny_llama": {}}  # fmt: skip
    for kind, rates in speed.items():
        times = {name: rates["ours"] / rate for name, rate in rates.items() if name != "ours"}
        found["times"][kind] = times
        table.add_row("one token" if kind == "letters" else "several tokens", *(f"{r:.3g}" for r in rates.values()), f"{min(times.values()):.1f}")
    console.print(table)
    for kind, shares in zeros.items():
        for name in (n for n, share in shares.items() if share):
            console.print(f"{name}, {kind}: {shares[name]:.0%} of the likelihoods are exactly 0 nats: it lost the option's tokens")
    for kind, routes_ in scores.items():
        reference = routes_["lm-eval hf float32"]
        found["agreement_on_tiny_llama"][kind] = {n: agreement(s, reference) for n, s in routes_.items() if n != "lm-eval hf float32"}
        for name, a in found["agreement_on_tiny_llama"][kind].items():
            console.print(f"tiny-llama, {kind}: {name} and transformers (float32) choose alike in {a['same_answer']:.0%} of {a['items']} items; "
                          f"largest difference {a['largest_difference_nats']:.2g} nats")  # fmt: skip
    print(json.dumps(found, ensure_ascii=False))
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
