"""The model card of a run: what the files are made of, under which licences, and what was measured."""

from __future__ import annotations

from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

import tsugiki
from tsugiki.artifacts import write_text
from tsugiki.bases import Base
from tsugiki.recipes.summary import level_rows, read_stages

SHOWN = ("rank", "alpha", "rslora", "dora", "learning_rate", "epochs", "batch_size", "four_bit")
CARD_LICENCES = {"apache-2.0", "mit", "llama3", "llama3.1", "llama3.2", "gemma", "cc-by-4.0", "cc-by-sa-4.0"}


def write_card(run_dir: Path, summary: dict, base: Base) -> Path:
    """Write ``model-card.md`` into a run's folder: Markdown with the front matter that model hubs read.

    Args:
        run_dir: ``runs/<domain>/<base>``.
        summary: the run's summary (:func:`tsugiki.recipes.summary.build_summary`).
        base: where the base comes from, and its licence.
    """
    stages = read_stages(run_dir)
    data, sweep = stages.get("data", {}), stages.get("sweep", {})
    hashes = {row["level"]: row.get("sha256") for row in level_rows(stages)}
    fit = sweep.get("settings", {}).get("fit", {})
    licence = (base.licence or "").strip()
    front = {
        "base_model": base.hub_id or base.name, "language": ["ja"], "library_name": "gguf", "pipeline_tag": "text-generation",
        "license": licence.lower() if licence.lower() in CARD_LICENCES else "other",
        **({} if licence.lower() in CARD_LICENCES else {"license_name": licence or "unknown"}),
        "tags": ["lora", "gguf", "llama.cpp", "tsugiki", summary["domain"]],
    }
    environment = Environment(
        loader=PackageLoader("tsugiki.recipes", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown, read as text; hubs clean what they show
    )
    title = data.get("title") or {}
    choice = summary["recommended"]
    levels = [{**row, "sha256": hashes.get(row["level"])} for row in summary["levels"]]
    text = environment.get_template("model_card.md.j2").render(
        front=yaml.safe_dump(front, allow_unicode=True, sort_keys=False),
        name=f"{summary['base']}-{summary['domain']}", domain=summary["domain"], base=summary["base"],
        title={"en": title.get("en") or summary["domain"], "ja": title.get("ja") or summary["domain"]},
        base_id=base.hub_id or base.name, base_revision=base.revision, base_licence=licence, obligations=base.obligations, version=tsugiki.__version__,
        data={"licence": None, "credit": None, "system": None} | data, samples=summary["samples"],
        kept=(sweep.get("kept") or {}).get("n"), settings=", ".join(f"{k} {fit[k]}" for k in SHOWN if fit.get(k) not in (None, False)),
        points=sweep.get("points", []), optimum=sweep.get("optimum"), base_nll=(sweep.get("base") or {}).get("nll"),
        levels=levels, scoring=stages.get("evaluate", {}).get("scoring", "score"), benchmarks=summary["benchmarks"],
        parity=summary["parity"], size=_size,
        choice=choice and {**choice, "bytes": next(r["bytes"] for r in levels if r["level"] == choice["level"])},
    )
    path = run_dir / "model-card.md"
    write_text(path, text)
    return path


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
