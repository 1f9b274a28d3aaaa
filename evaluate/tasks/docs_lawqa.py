"""Documents of lawqa_jp, the Digital Agency's four-choice questions on Japanese law, as a domain benchmark.

No prompt is published with the data; this one is the kit's. The instruction of the data begins with the literal
``<following_context>`` and exists in three spellings: the first is used for all, without that mark.
"""

from __future__ import annotations

from datasets import Dataset

from tsugiki.evaluate.data import load_set

INSTRUCTION = "以下の問題文に対する回答を、選択肢a、b、c、dの中から１つ選んでください。"
LETTERS = ["a", "b", "c", "d"]


def lawqa(orders: bool = True, context: bool = True, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """The 140 questions.

    Args:
        orders: each in four orders of its options, gold balanced (140 a, b, c, d each); the mean over all is the mean
            over questions. False: the published order alone, where always answering c scores 48/140.
        context: put the article of the law in front of the question; False asks from memory.
    """
    split = "randomized" if orders else "test"
    rows = load_set("lawqa_jp", data_dir, splits=[split])[split]
    docs = []
    for row in rows:
        article = f"条文：\n{row['コンテキスト']}\n\n" if context else ""
        docs.append(
            {
                "id": row["ファイル名"] + (f"#{row['回答オーダーマップ番号']}" if orders else ""),
                "question_id": row["ファイル名"],
                "law": row["ファイル名"].split("_")[0],
                "prompt": f"{INSTRUCTION}\n\n{article}問題文：{row['問題文']}\n選択肢：\n{row['選択肢']}\n回答：",
                "options": LETTERS,
                "target": LETTERS.index(row["output"]),
            }
        )
    return {"test": Dataset.from_list(docs)}
