"""Which base to take for a domain: several bases, adapted on the same samples at the same settings, side by side.

    tsugiki recipe bases DOMAIN --bases a,b,c

Each base goes through the recipe's own stages in ``runs/<domain>/bases/<base>/``, one after another; what is finished is
not computed again. ``bases.json``, ``bases.html`` and rows of the results table come out.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from tsugiki.artifacts import digest, read_json, read_jsonl, write_json
from tsugiki.bases import Profile, profile, tensor_headers
from tsugiki.errors import UserError, raise_problems
from tsugiki.evaluate.paired import Item, compare_items, read_items
from tsugiki.intervals import expanded, paired_interval, ratio_intervals
from tsugiki.licences import licence_notes
from tsugiki.progress import console
from tsugiki.recipes.bases_page import write_page
from tsugiki.recipes.domains import load_domain
from tsugiki.recipes.rank_bases import CONFIDENCE, Measured, choose, compare_pairs, joint_confidence, ranks
from tsugiki.recipes.recipe import (
    Run,
    base_folder,
    benchmark_data,
    data_stage,
    gguf_stage,
    levels_stage,
    open_run,
    settle,
    sweep_stage,
)
from tsugiki.recipes.report import SCORE_NAMES
from tsugiki.recipes.stages import alone, code_digest, run_stage, stage_hash
from tsugiki.results import Result, replace_results
from tsugiki.samples import read_encoded, write_encoded

BUNDLED = ("tiny-llama", "tiny-qwen", "tiny-llmjp")
SPLITS = ("train", "valid", "test")
LEVEL = "Q4_K_M"  # the file whose size, speed and memory are told
MOST = 1000  # training samples where no number is given
PART = "bases"


def compare_bases(
    domain: str,
    bases: Sequence[str] = BUNDLED,
    *,
    n: int | None = None,
    seeds: Sequence[int] = (0,),
    runs: Path = Path("runs"),
    data_dir: Path | None = None,
    changes: Sequence[str] = (),
) -> Path:
    """Adapt every base on the same samples, measure all on the same items, rank them; what is finished is kept.

    Args:
        domain: a domain's name or YAML.
        bases: names in ``bases.yaml`` or folders, two or more.
        n: training samples, the same for all; None: the domain's largest count up to 1,000.
        seeds: one fit of each base for each; the spread between them enters the intervals.
        runs: where runs are kept.
        data_dir: where the domain's files, and the benchmarks', lie.
        changes: ``key=value`` settings, for all bases alike.

    Returns:
        The path of ``runs/<domain>/bases.json``.

    Raises:
        UserError: a base that is unknown, named twice or allows no derived models (all such are told at once);
            fewer samples than ``n`` that every base can take.
    """
    chosen = open_bases(domain, bases, runs=runs, data_dir=data_dir, changes=changes)
    if n is not None and n < 1:
        raise UserError(f"--n must be at least 1, not {n}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be distinct whole numbers, not {list(seeds)}")
    folder = runs / chosen[0].domain.name
    with alone(folder / PART):
        for run in chosen:
            console.print(f"[bold]{escape(run.name)}[/] → {escape(str(run.folder))}")
            for _, note in licence_notes(run.base, run.base_dir):
                console.print(f"  [yellow]{escape(note)}[/]")
            _encode(run)
        ids, lost = common_samples(chosen)
        n = _count(n, chosen[0], len(ids["train"]))
        for name, parts in lost.items():
            if sum(parts.values()):
                console.print(f"  {name}: {', '.join(f'{k} {v:,}' for k, v in parts.items() if v)} left out, which another base cannot take")
        for run in (ready := [_settled(run, n, seeds) for run in chosen]):
            console.print(f"[bold]{escape(run.name)}[/]")
            common_stage(run, ids)
            sweep_stage(run)
            gguf_stage(run)
            levels_stage(run)
            answers_stage(run)
        result = read_comparison(ready, lost)
        _keep_rows(ready, result)
        write_json(folder / "bases.json", result)
        write_page(result, folder / "bases.html")
    return folder / "bases.json"


def open_bases(
    domain: str, bases: Sequence[str], *, runs: Path, data_dir: Path | None = None, changes: Sequence[str] = ()
) -> list[Run]:
    """The runs of a comparison, ``runs/<domain>/bases/<base>``; everything wrong with any base is told at once."""
    if len(bases) < 2:
        raise UserError(f"{len(bases)} base is nothing to compare", hint="Name two or more: --bases tiny-llama,tiny-qwen")
    settle(load_domain(domain), list(changes), large=False)  # what is wrong with these is wrong for all bases: said once
    found, errors = [], {}
    for base in bases:
        try:
            run = open_run(domain, base, runs=runs, data_dir=data_dir, changes=list(changes))
            found.append(dataclasses.replace(run, folder=runs / run.domain.name / PART / run.base.name, part=PART))
        except UserError as error:
            errors[base] = error
    names = [run.base.name for run in found]
    twice = [f"{name}: named {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if len(errors) == 1 and not twice:
        raise next(iter(errors.values()))
    raise_problems([f"{base}: {error}" for base, error in errors.items()] + twice, what="Bases")
    return found


def _own(run: Run) -> Run:
    """The run whose data stage encodes a base's own samples, before those of all are known."""
    return dataclasses.replace(run, folder=run.folder / "own")


def _encode(run: Run) -> None:
    try:
        data_stage(_own(run))
    except UserError as error:
        raise UserError(f"{run.base.name}: {error.message}", where=error.where, hint=error.hint) from error


def _count(n: int | None, run: Run, there: int) -> int:
    if n is None:
        counts = [c for c in run.settings.sweep.counts if c <= MOST] or [min(run.settings.sweep.counts)]
        return min(max(counts), there)
    if n > there:
        raise UserError(f"there are {there:,} training samples that all bases can take, --n asks for {n:,}", hint=f"Ask for fewer: --n {there}")
    return n


def _settled(run: Run, n: int, seeds: Sequence[int]) -> Run:
    sweep = dataclasses.replace(run.settings.sweep, counts=(n,), seeds=tuple(seeds), search="grid", mode="epochs")
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, sweep=sweep, levels=(LEVEL,)))


# --- the same samples -------------------------------------------------------------------------------------------


def common_samples(runs: Sequence[Run]) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """The ids of the samples that every base can take, by split and in nested order; how many each base gave up.

    A sample may be too long in one tokenizer and not in another: what one cannot take, none gets.
    """
    ids: dict[str, list[str]] = {}
    lost: dict[str, dict[str, int]] = {run.base.name: {} for run in runs}
    for split in SPLITS:
        rows = [{r["id"]: (r["prompt"], r["completion"]) for r in read_jsonl(_own(run).folder / "data" / f"{split}.jsonl")} for run in runs]
        ids[split] = [id for id, text in rows[0].items() if all(other.get(id) == text for other in rows[1:])]
        for run, own in zip(runs, rows, strict=True):
            lost[run.base.name][split] = len(own) - len(ids[split])
    if not ids["train"] or not ids["test"]:
        raise UserError(f"the bases have {len(ids['train'])} training and {len(ids['test'])} test samples in common", hint="Both are needed.")
    return ids, lost


def common_stage(run: Run, ids: Mapping[str, Sequence[str]]) -> bool:
    """A base's encoded samples without those that another base cannot take."""
    own = _own(run).folder / "data"
    inputs = {"own": stage_hash(own), "ids": digest(ids), "code": code_digest("tsugiki.samples")}

    def work(folder: Path) -> list[Path]:
        if (own / "base").exists():
            shutil.copytree(own / "base", folder / "base", symlinks=True)
        data = read_json(own / "data.json")
        for split in SPLITS:
            by_id = {s.id: s for s in read_encoded(own / f"{split}.jsonl")}
            if left_out := len(by_id) - len(ids[split]):
                data["dropped_by"][f"{split}: too long for another base"] = left_out
                data["samples"]["dropped"] += left_out
            data["samples"][split] = len(ids[split])
            write_encoded(folder / f"{split}.jsonl", [by_id[id] for id in ids[split]])
        write_json(folder / "data.json", data)
        return [folder / f"{split}.jsonl" for split in SPLITS] + [folder / "data.json"]

    return run_stage(run.folder / "data", inputs, work, console_title="samples that all bases can take")


# --- measured ---------------------------------------------------------------------------------------------------


def answers_stage(run: Run) -> bool:
    """Answers of the base and of every fit to the same test items; benchmarks before and after; speed of the file."""
    items, choice = run.settings.evaluate_items, run.settings.evaluate
    inputs = {
        "data": stage_hash(run.folder / "data", "test.jsonl"),
        "sweep": stage_hash(run.folder / "sweep", "sweep.json"),
        "gguf": stage_hash(run.folder / "gguf", "model-F16.gguf", "base-F16.gguf"),
        "levels": stage_hash(run.folder / "levels", f"model-{LEVEL}.gguf"),
        "scoring": [run.domain.scoring, run.domain.max_new_tokens, items],
        "benchmarks": [dataclasses.asdict(choice), *(benchmark_data(run.data_dir) if choice.tasks or choice.suites else ())],
        "code": code_digest("tsugiki.recipes.before_after", "tsugiki.quantize.compare", "tsugiki.quantize.convert"),
    }

    def work(folder: Path) -> list[Path]:
        from tsugiki.quantize.compare import run_task
        from tsugiki.quantize.convert import convert
        from tsugiki.recipes.before_after import answer_test, measure_benchmarks

        sweep, data = read_json(run.folder / "sweep" / "sweep.json"), read_json(run.folder / "data" / "data.json")
        test = read_encoded(run.folder / "data" / "test.jsonl")[:items]
        how = {"max_new_tokens": run.domain.max_new_tokens, "end_of_turn": data["end_of_turn"]}
        files = [folder / "answers-base.jsonl"]
        answer_test(run.folder / "gguf" / "base-F16.gguf", test, files[0], note="base", scoring=run.domain.scoring, **how)
        for point in sweep["points"]:
            model = run.folder / "gguf" / "model-F16.gguf"
            if point["seed"] != sweep["kept"]["seed"]:
                model = folder / "other-seed-F16.gguf"
                adapter = run.folder / "sweep" / "points" / f"n{point['n']:06d}-s{point['seed']}" / "adapter"
                convert(base_folder(run), model, adapter)
            files.append(folder / f"answers-s{point['seed']}.jsonl")
            answer_test(model, test, files[-1], note=f"seed {point['seed']}", scoring=run.domain.scoring, **how)
        (folder / "other-seed-F16.gguf").unlink(missing_ok=True)
        path = run.folder / "levels" / f"model-{LEVEL}.gguf"
        job = {"task": "speed", "path": str(path), "samples": str(run.folder / "data" / "test.jsonl"), **how}
        speed = run_task(job, name=f"speed {LEVEL}")
        benchmarks: dict[str, list] = {"changes": [], "not_measured": []}
        if choice.tasks or choice.suites:
            benchmarks = measure_benchmarks(run.folder, folder / "benchmarks", choice, data_dir=run.data_dir, tokenizer=base_folder(run))
        write_json(folder / "answers.json", {
            "items": len(test), "speed": speed, "not_measured": benchmarks["not_measured"],
            "changes": [c for c in benchmarks["changes"] if c["to"] == "adapted"],
        })
        return [*files, folder / "answers.json"]

    return run_stage(run.folder / "answers", inputs, work, console_title="answers, benchmarks, speed", keep_partial=True)


# --- compared ---------------------------------------------------------------------------------------------------


def read_comparison(runs: Sequence[Run], lost: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The content of ``bases.json`` from the finished stages of every base."""
    domain, settings = runs[0].domain, runs[0].settings
    test = read_encoded(runs[0].folder / "data" / "test.jsonl")
    scored = test[: settings.sweep.test_items or len(test)]
    characters, bits_documents = np.asarray([len(s.completion) for s in scored], float), [s.document for s in scored]
    measured, rows, score_documents = [], [], []
    for run in runs:
        sweep = read_json(run.folder / "sweep" / "sweep.json")
        points = sweep["points"]
        answered = [read_items(run.folder / "answers" / f"answers-s{p['seed']}.jsonl") for p in points]
        nats = [_nats(run, f"n{p['n']:06d}-s{p['seed']}") for p in points]
        score_documents = [i.document for i in answered[0]]
        one = Measured(run.base.name, np.asarray([[i.score for i in items] for items in answered]), np.stack(nats))
        measured.append(one)
        rows.append(_row(run, sweep, one, score_documents, characters, bits_documents))
    pairs = compare_pairs(measured, score_documents, characters, bits_documents)
    names = [run.base.name for run in runs]
    by_score, by_bits = ranks(names, pairs, "score"), ranks(names, pairs, "bits")
    for row in rows:
        row |= {"rank_score": by_score[row["name"]], "rank_bits": by_bits[row["name"]]}
    rows.sort(key=lambda r: (r["rank_score"], r["rank_bits"], -r["score"]["after"]))
    forgetting = [r for r in rows if r["forgetting"]]
    base, reason, beside = choose(
        [{"name": r["name"], "score": r["score"]["after"], "lost": r["lost"] if len(forgetting) == len(rows) else None, "bytes": r["bytes"][LEVEL]} for r in rows], pairs
    )
    data = read_json(runs[0].folder / "data" / "data.json")
    return {
        "domain": domain.name, "title": domain.title, "scoring": domain.scoring,
        "samples": {"n": settings.sweep.counts[0], **{k: data["samples"][k] for k in SPLITS}, "given_up": {k: dict(v) for k, v in lost.items()}},
        "seeds": list(settings.sweep.seeds), "answered": len(score_documents), "scored": len(scored),
        "documents": len(set(score_documents)), "device": rows[0]["cost"]["device"],
        "equal": _equal(runs), "differs": _differs(runs), "level": LEVEL,
        "confidence": CONFIDENCE, "pair_confidence": joint_confidence(len(runs)),
        "bases": rows, "pairs": pairs,
        "recommended": {"base": base, "because": reason, "beside": beside, "why": _why(base, reason, beside, rows, pairs, domain.scoring)},
    }


def _nats(run: Run, point: str) -> np.ndarray:
    return np.load(run.folder / "sweep" / "points" / point / "nats.npy", allow_pickle=False)


def _row(run: Run, sweep: Mapping, one: Measured, documents: list[str], characters: np.ndarray, bits_documents: list[str]) -> dict[str, Any]:
    """One base's numbers."""
    points, found = sweep["points"], read_json(run.folder / "answers" / "answers.json")
    before = read_items(run.folder / "answers" / "answers-base.jsonl")
    after = [dataclasses.replace(item, score=float(score)) for item, score in zip(before, one.scores.mean(axis=0), strict=True)]
    gain = compare_items(before, after)
    base_nats = _nats(run, "base") / math.log(2)
    mean_nats = one.nats.mean(axis=0) / math.log(2)
    wide = expanded(CONFIDENCE, len(set(bits_documents)))
    old_bits, new_bits = ratio_intervals(np.stack([base_nats, mean_nats]), characters, bits_documents, confidence=wide)
    train = read_encoded(run.folder / "data" / "train.jsonl")[: points[0]["n"]]
    shape = profile(run.base_dir)
    cuda = sweep["settings"]["device"] == "cuda"
    held = (sweep["settings"]["fit"].get("processes") or 1) if cuda else points[0]["cores"]  # GPUs, or cores
    hours = [p["seconds"] * held / 3600 for p in points]
    passes = points[0]["train_tokens"] / sum(len(s.ids) for s in train)
    files = {"F16": run.folder / "gguf" / "model-F16.gguf", LEVEL: run.folder / "levels" / f"model-{LEVEL}.gguf"}
    return {
        "name": run.base.name, "hub_id": run.base.hub_id, "licence": run.base.licence, "obligations": run.base.obligations,
        "licence_notes": [{"ja": ja, "en": en} for ja, en in licence_notes(run.base, run.base_dir)],
        "architecture": shape.architecture, "parameters": shape.parameters, "vocabulary": shape.vocab_size,
        "score": {
            "before": gain["before"], "before_ci": _score_interval(before), "after": gain["after"], "after_ci": _score_interval(after),
            "gain": gain["difference"], "gain_ci": gain["ci"], "change": gain["change"],
            "truncated": float(np.mean([r["finished"] != "stop" for p in points for r in read_jsonl(run.folder / "answers" / f"answers-s{p['seed']}.jsonl")])),
            "by_seed": {str(p["seed"]): float(s.mean()) for p, s in zip(points, one.scores, strict=True)},
        },
        "bits": {
            "before": float(base_nats.sum() / characters.sum()), "before_ci": _list(old_bits),
            "after": float(mean_nats.sum() / characters.sum()), "after_ci": _list(new_bits),
            "by_seed": {str(p["seed"]): p["bpc"] for p in points},
        },
        "budget": {
            "samples": points[0]["n"], "epochs": points[0]["epochs"], "steps": points[0]["steps"], "tokens": points[0]["train_tokens"],
            "characters_per_token": sum(len(s.completion) for s in train) / sum(len(s.completion_ids) - 1 for s in train),
            "flops": fit_flops(shape, lora_parameters(run.folder / "sweep" / "adapter"), points[0]["train_tokens"],
                               round(passes * sum(len(s.completion_ids) for s in train))),
        },
        "cost": {
            "device": sweep["settings"]["device"], "unit": "GPU-hours" if cuda else "core-hours", "hours": float(np.mean(hours)),
            "seconds": float(np.mean([p["seconds"] for p in points])), "held": held,
            "peak_memory": max(p["gpu_peak"] if cuda else p["peak_rss"] for p in points),
        },
        "bytes": {level: path.stat().st_size for level, path in files.items()},
        "speed": {k: found["speed"][k] for k in ("seconds_per_answer", "prompt_tok_s", "gen_tok_s", "peak_rss", "threads")},
        "forgetting": found["changes"], "not_measured": found["not_measured"],
        "lost": sum(c["change"] == "lost" for c in found["changes"]),
        "gained": sum(c["change"] == "gained" for c in found["changes"]),
    }  # fmt: skip


def _score_interval(items: Sequence[Item]) -> list[float] | None:
    """Of a mean score within 0 to 1; not of no width where all answers are wrong."""
    found = paired_interval(np.asarray([i.score for i in items]), [i.document for i in items], confidence=CONFIDENCE)
    return [max(0.0, found[0]), min(1.0, found[1])] if found else None


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return list(interval) if interval else None


def lora_parameters(adapter: Path) -> int:
    """Trained parameters of an adapter's folder."""
    return sum(math.prod(t["shape"]) for t in tensor_headers(adapter).values())


def fit_flops(shape: Profile, adapter: int, tokens: int, learned: int) -> float | None:
    """Floating-point operations of a LoRA fit's matrix products.

    Of a frozen weight two a token forward and two backward (the gradient of its input; it has none of its own), of the
    adapter's six; the output matrix at learned tokens only. Attention's own products, and what is computed again under
    gradient checkpointing, are left out. None where the number of parameters is not known.

    Args:
        adapter: parameters of the adapter.
        tokens: passed through the model, all epochs.
        learned: of these, completion tokens.
    """
    if shape.parameters is None:
        return None
    matrix = shape.vocab_size * shape.hidden
    body = shape.parameters - matrix * (1 if shape.tied_embeddings else 2)
    return float((4 * body + 6 * adapter) * tokens + 4 * matrix * learned)


def _fit_settings(run: Run) -> dict[str, Any]:
    from tsugiki.adapt.sweep import NOT_OF_THE_RESULT

    return {k: v for k, v in dataclasses.asdict(run.settings.sweep.fit).items() if k not in NOT_OF_THE_RESULT}


def _equal(runs: Sequence[Run]) -> dict[str, Any]:
    """The settings of the fit that all bases share."""
    found = [_fit_settings(run) for run in runs]
    return {k: v for k, v in found[0].items() if all(other[k] == v for other in found)}


def _differs(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Settings of the fit that are not the same for all (a large base has its own), by base."""
    found = {run.base.name: _fit_settings(run) for run in runs}
    return {k: {name: values[k] for name, values in found.items()} for k in found[runs[0].base.name] if k not in _equal(runs)}


# --- told -------------------------------------------------------------------------------------------------------


def _why(base: str, reason: str, beside: Sequence[str], rows: Sequence[Mapping], pairs: Sequence[Mapping], scoring: str) -> dict[str, str]:
    """The recommendation in a sentence or two, in both languages."""
    of = {r["name"]: r for r in rows}
    row, (score_ja, score_en) = of[base], SCORE_NAMES.get(scoring, ("スコア", "Score"))
    value = f"{100 * row['score']['after']:.1f}%"
    ja, en = f"{base}：", f"{base}: "
    others_ja, others_en = "、".join(beside), " and ".join(beside)
    if reason == "score":
        rival = max((r for r in rows if r["name"] != base), key=lambda r: r["score"]["after"])
        gap_ja, gap_en = _gap(pairs, base, rival["name"], "score")
        ja += f"{score_ja}が最も高く（{value}）、次の{rival['name']}より{gap_ja}。"
        en += f"the highest {score_en.lower()}, {value}, {gap_en} above {rival['name']}, the next."
    elif reason == "bits":
        ja += f"{score_ja}（{value}）では{others_ja}と区別できず、その中で1文字あたりのビット数が最も少ない（{row['bits']['after']:.3f}）。"
        en += f"its {score_en.lower()}, {value}, cannot be told from that of {others_en}, and of these it needs the fewest bits per character ({row['bits']['after']:.3f})."
    else:
        ja += f"{score_ja}（{value}）でも1文字あたりのビット数でも{others_ja}と区別できません。"
        en += f"neither {score_en.lower()} ({value}) nor bits per character tell it from {others_en}. "
        if reason == "measured":
            ja += f"測った{score_ja}はその中で最も高いものです。"
            en += f"Of these its measured {score_en.lower()} is the highest."
        elif reason == "forgetting":
            ja += f"その中で忘れた課題が最も少ない（{row['lost']}）。"
            en += f"Of these it forgot the fewest benchmarks ({row['lost']})."
        elif reason == "size":
            ja += f"その中で{LEVEL}のファイルが最も小さい（{row['bytes'][LEVEL] / 1e6:,.1f} MB）。"
            en += f"Of these its {LEVEL} file is the smallest ({row['bytes'][LEVEL] / 1e6:,.1f} MB)."
        else:
            ja, en = ja + "先に挙げられたものです。", en + "It was named first."
    if row["score"]["change"] != "gained":
        ja += "ただし、適応の前より確かに良くなったとは言えません。"
        en += " But that it gained from the adaptation is not shown."
    if row["lost"]:
        tasks = [c["task"].partition("[")[0] for c in row["forgetting"] if c["change"] == "lost"]
        ja += f"適応で確かに下がった課題：{'、'.join(tasks)}。"
        en += f" Its adaptation surely lost on {' and '.join(tasks)}."
    for note in row["licence_notes"]:
        ja, en = ja + note["ja"], f"{en} {note['en'][:1].upper()}{note['en'][1:]}."
    return {"ja": ja, "en": en.strip()}


def _gap(pairs: Sequence[Mapping], base: str, rival: str, measure: str) -> tuple[str, str]:
    pair = next(p for p in pairs if {p["first"], p["second"]} == {base, rival})
    sign = 1 if pair["first"] == base else -1
    points = f"{100 * sign * pair[measure]['difference']:.1f}"
    if not pair[measure]["ci"]:
        return f"{points}ポイント高い（区間なし）", f"{points} points (no interval)"
    low, high = sorted(100 * sign * v for v in pair[measure]["ci"])
    interval = f"{low:.1f} – {high:.1f}".replace("-", "−")
    return f"{points}ポイント高い（{interval}）", f"{points} points ({interval.replace(' – ', ' to ')})"


def _keep_rows(runs: Sequence[Run], result: Mapping[str, Any]) -> None:
    """Rows of the results table: score, bits and benchmarks before and after, and what a fit cost."""
    by_name = {r["name"]: r for r in result["bases"]}
    for run in runs:
        row = by_name[run.base.name]
        told = {"samples": result["samples"]["n"], "seeds": result["seeds"]}
        values = [
            ("base", result["scoring"], row["score"]["before"], row["score"]["before_ci"], result["answered"]),
            ("adapted", result["scoring"], row["score"]["after"], row["score"]["after_ci"], result["answered"]),
            ("base", "bits_per_character", row["bits"]["before"], row["bits"]["before_ci"], result["scored"]),
            ("adapted", "bits_per_character", row["bits"]["after"], row["bits"]["after_ci"], result["scored"]),
            ("adapted", row["cost"]["unit"], row["cost"]["hours"], None, None),
            ("adapted", "peak_memory", row["cost"]["peak_memory"], None, None),
        ]
        replace_results(run.results, run.name, "bases", [
            Result(f"{run.name}/{model}", run.base.name, run.domain.name, metric, value, adapter="" if model == "base" else run.name,
                   level="F16", n=items, settings=told | ({"ci": ci} if ci else {}), provenance=stage_hash(run.folder / "answers"))
            for model, metric, value, ci, items in values
        ] + [
            Result(f"{run.name}/{model}", run.base.name, change["task"], change["metric"], change[when], adapter="" if model == "base" else run.name,
                   level="F16", n=change["n"], settings=told | {"task": change["name"]}, provenance=stage_hash(run.folder / "answers"))
            for change in row["forgetting"] for model, when in (("base", "before"), ("adapted", "after"))
        ])  # fmt: skip
