"""The training samples of a run against the benchmark sets that are at hand."""

from __future__ import annotations

from pathlib import Path

from tsugiki.adapt.contamination import NGRAM, SHARE, index_samples, overlaps
from tsugiki.artifacts import write_json
from tsugiki.errors import UserError
from tsugiki.evaluate.data import SETS, check_sets, load_set
from tsugiki.progress import progress
from tsugiki.samples import EncodedSample


def contamination(train: list[EncodedSample], out: Path, *, data_dir: Path | None = None) -> dict:
    """Look for test items of every benchmark set in the data folder among the training samples; write ``out``.

    Every text field of an item is compared by itself: a sample that holds the question without its options counts.

    Returns:
        ``{"ngram", "share", "samples", "sets": [{"name", "texts", "short", "found", "examples"}], "absent"}``: texts
        compared, texts too short to tell, those found in a sample, and the first ten of them.

    Raises:
        UserError: no set is there.
    """
    present = [row["name"] for row in check_sets(data_dir) if row["found"]]
    if not present:
        raise UserError("there is no benchmark set to compare with", hint="Name their folder: --data-dir DIR (tsugiki evaluate data list)")
    index, rows = index_samples([f"{s.prompt}\n{s.completion}" for s in train]), []
    with progress() as bar:
        task = bar.add_task("benchmarks", total=len(present), note="")
        for name in present:
            splits = load_set(name, data_dir)
            scored = [r for split, items in splits.items() if split != "train" for r in items]
            fields = [(i, key, value) for i, r in enumerate(scored) for key, value in r.items() if isinstance(value, str)]
            fields += [(i, key, v) for i, r in enumerate(scored) for key, value in r.items() if isinstance(value, list)
                       for v in value if isinstance(v, str)]
            found, short = overlaps([value for *_, value in fields], index)
            rows.append({
                "name": name, "items": len(scored), "texts": len(fields), "short": short,
                "found": len({fields[o.item][0] for o in found}),
                "examples": [{"item": fields[o.item][0], "field": fields[o.item][1], "text": fields[o.item][2][:200],
                              "sample": train[o.sample].id, "share": round(o.share, 3)} for o in found[:10]],
            })
            bar.advance(task)
    result = {"ngram": NGRAM, "share": SHARE, "samples": len(train), "sets": rows, "absent": [n for n in SETS if n not in present]}
    write_json(out, result)
    return result
