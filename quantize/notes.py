"""What a reader of a finished run should know of its files, as sentences in Japanese and English, from what its stages wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def file_notes(gguf: Mapping, levels: Mapping) -> list[dict[str, str]]:
    """Notes on the F16 file and its levels, ``{"en", "ja"}`` each; plain text, to be escaped.

    Args:
        gguf: ``gguf/gguf.json`` of a run; empty: nothing of it is said.
        levels: ``levels/levels.json`` of a run, likewise.

    Returns:
        Rows in another type than their level's, by level; tensors written wider because their values do not fit; texts with
        characters outside the vocabulary; a BOS that programs may double; then the conversion's other notes, English in both.
    """
    notes = []
    for row in levels.get("levels", ()):
        if moved := row.get("fallbacks"):
            kinds = ", ".join(f"{n} × {kind}" for kind, n in Counter(f["type"] for f in moved).most_common())
            notes.append({
                "en": f"{row['level']}: {len(moved)} matrices have rows that its types cannot take and are in others ({kinds}), so that it has {row['bpw']:.2f} bits/weight.",
                "ja": f"{row['level']}：行の長さが型に合わない行列が{len(moved)}個あり、別の型で書かれています（{kinds}）。実効{row['bpw']:.2f}ビット／重みです。",
            })
    conversion = gguf.get("conversion", {})
    if wide := conversion.get("wide"):
        kinds = ", ".join(sorted(set(wide.values())))
        notes.append({
            "en": f"{len(wide)} tensors hold values outside the range of {conversion['dtype'].upper()} and are written as {kinds}, first {next(iter(wide))}.",
            "ja": f"{len(wide)}個のテンソルは{conversion['dtype'].upper()}の範囲を超える値を含むため、{kinds}で書かれています（{next(iter(wide))}など）。",
        })
    for group in gguf.get("parity_groups", ()):
        if group.get("unknown"):
            share = group["unknown"] / group["texts"]
            notes.append({
                "en": f"Characters outside the vocabulary in {group['unknown']:,} of {group['texts']:,} texts of “{group['group']}” ({share:.1%}): "
                      "llama.cpp reads them as the unknown token, transformers as bytes.",
                "ja": f"「{group['group']}」の{group['texts']:,}文のうち{group['unknown']:,}文（{share:.1%}）に語彙外の文字があり、"
                      "llama.cppは未知トークン、transformersはバイト列として読みます。",
            })
    if gguf.get("bos", {}).get("gguf_added", 0) > max(1, gguf.get("bos", {}).get("gguf", 0)):
        notes.append({
            "en": "The chat template writes BOS, and the file says that BOS is added: render a conversation, then tokenize it without adding BOS, or it has two.",
            "ja": "チャットテンプレートがBOSを書き、ファイルもBOSの付加を指定しています。会話を整形した後はBOSを付けずにトークン化してください（二重になります）。",
        })
    said = () if not wide else ("are written wider than",)  # told above with their number and type
    return notes + [{"en": n, "ja": n} for n in conversion.get("notes", ()) if not any(s in n for s in said)]
