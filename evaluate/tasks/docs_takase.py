"""Documents of Takase & Honda's benchmarks and of FlexEval's, prompts built in; the YAML files beside this one name them.

Every document has ``id``, ``prompt`` (all that the model sees, except MGSM's shots, which lm-eval draws) and ``target``.
Definitions: lm-evaluation-harness 0.4.13 (MGSM native_cot, MMLU-ProX) and FlexEval 8a07c3ca (NIILC, JMMLU, AIO, MGSM-ja,
GSM8K). That the paper used FlexEval's public settings for NIILC, JMMLU and JAQKET is inferred: shot counts agree, all nine
NIILC scores are multiples of 1/127, and only these five JMMLU subjects, all 739 items, give all nine JMMLU scores.
"""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset

from tsugiki.errors import UserError
from tsugiki.evaluate import metrics
from tsugiki.evaluate.data import JMMLU_NC_ND, JMMLU_SUBJECTS, MMLU_PROX_OPTIONS, Row, load_set

# --- MGSM (lm-eval, native chain of thought) -------------------------------------------------------------------------

# Language -> what stands before a test question, and the answer's beginning as lm-eval asks for it. Its Russian one lacks
# the space of the exemplars ("Пошаговое решение").
MGSM_PROMPTS = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:"), "de": ("Frage:", "Schritt-für-Schritt-Antwort:"),
    "en": ("Question:", "Step-by-Step Answer:"), "es": ("Pregunta:", "Respuesta paso a paso:"),
    "fr": ("Question :", "Réponse étape par étape :"), "ja": ("問題：", "ステップごとの答え:"),
    "ru": ("Задача:", "Пошаговоерешение:"), "sw": ("Swali:", "Jibu la Hatua kwa Hatua:"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:"), "th": ("โจทย์:", "คำตอบทีละขั้นตอน:"), "zh": ("问题：", "逐步解答:"),
}  # fmt: skip


def mgsm(language: str = "ja", clipped: bool = True, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """Eight worked examples (train) and 250 problems (test) of one language.

    Args:
        clipped: lm-eval cuts ``len(answer's beginning) + 1`` characters from an exemplar's answer, for a space that
            Japanese and Chinese exemplars do not have: they lose their first character (and Russian ones keep the
            space). True does the same, as published scores do; False keeps every exemplar whole.
        data_dir: of :func:`tsugiki.evaluate.data.load_set`.
    """
    rows = load_set("mgsm", data_dir, config=language)
    question, answer = MGSM_PROMPTS[language]
    train, test = [], []
    for i, row in enumerate(rows["train"]):
        text = row["answer"]
        target = text[len(answer) + 1 :] if clipped else text.replace("：", ":", 1).partition(":")[2].lstrip()
        train.append({"id": f"{language}/train/{i}", "prompt": f"{row['question']}\n{answer}", "target": target})
    for i, row in enumerate(rows["test"]):
        prompt = f"{question} {row['question']}\n{answer}"
        test.append({"id": f"{language}/{i}", "prompt": prompt, "target": str(row["answer_number"])})
    return {"train": Dataset.from_list(train), "test": Dataset.from_list(test)}


def extracted_results(doc: Row, results: list[str]) -> dict[str, float]:
    """``exact_match`` (case and ASCII punctuation ignored) of what a filter extracted, and ``unparsed`` (1: nothing)."""
    found = results[0]
    return {
        "exact_match": metrics.exact_match_loose(found, doc["target"]),
        "unparsed": float(found == metrics.INVALID),
    }


# --- MMLU-ProX (lm-eval) ---------------------------------------------------------------------------------------------

_LETTERS = "ABCDEFGHIJ"
# Language -> question, options, answer, the same line as the exemplars have it, description.
MMLU_PROX_PROMPTS = {
    "ja": (
        "質問：", "選択肢：", "回答：一歩一歩考えていきましょう。", "A: 一歩一歩考えていきましょう。",
        "以下は{subject}に関する選択問題（解答付き）です。段階的に考え、最後に「答えは (X) です」と回答を締めくくってください。"
        "Xは正解の選択肢を示す文字です。\n",
    ),
    "en": (
        "Question:", "Options:", "Answer: Let's think step by step.", "A: Let's think step by step.",
        "The following are multiple choice questions (with answers) about {subject}. Think step by step and then finish "
        'your answer with "the answer is (X)" where X is the correct letter choice.\n',
    ),
}  # fmt: skip
MMLU_PROX_SUBJECTS = {
    "biology": "生物学", "business": "ビジネス", "chemistry": "化学", "computer science": "コンピュータサイエンス",
    "economics": "経済学", "engineering": "工学", "health": "健康科学", "history": "歴史", "law": "法律", "math": "数学",
    "other": "その他", "philosophy": "哲学", "physics": "物理学", "psychology": "心理学",
}  # fmt: skip


def mmlu_prox(language: str = "ja", data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """All categories in one task: its mean is the micro average; the shots are the category's first five of ``validation``."""
    rows = load_set("mmlu_prox", data_dir, config=language)
    unknown = sorted({str(row["category"]) for row in rows["test"]} - set(MMLU_PROX_SUBJECTS))
    if unknown:
        raise UserError(f"unknown categories: {', '.join(unknown)}", where=f"mmlu_prox/{language}/test (category)")
    question, options, answer, exemplar, description = MMLU_PROX_PROMPTS[language]

    def block(row: Row) -> str:
        listed = [f"{x}. {row[o]}\n" for x, o in zip(_LETTERS, MMLU_PROX_OPTIONS, strict=True) if row[o] is not None]
        return f"{question}\n{row['question']}\n{options}\n{''.join(listed)}"

    prefixes = {}
    for category, japanese in MMLU_PROX_SUBJECTS.items():
        chosen = [row for row in rows["validation"] if row["category"] == category][:5]
        subject = japanese if language == "ja" else category.replace(" ", "_")
        worked = [block(row) + row["cot_content"].replace(exemplar, answer) + "\n\n" for row in chosen]
        prefixes[category] = description.format(subject=subject) + "".join(worked)
        if len(chosen) < 5 and any(row["category"] == category for row in rows["test"]):
            raise UserError(f"{category} has {len(chosen)} worked examples, 5 are needed", where=f"mmlu_prox/{language}/validation")
    docs = [
        {"id": f"{language}/{i}", "category": row["category"], "target": row["answer"],
         "prompt": prefixes[row["category"]] + block(row) + answer}
        for i, row in enumerate(rows["test"])
    ]  # fmt: skip
    docs.sort(key=lambda doc: list(MMLU_PROX_SUBJECTS).index(doc["category"]))  # stable: a category's items share a prefix
    return {"test": Dataset.from_list(docs)}


def tolerant_ja(responses: Iterable[list[str]], docs: object) -> list[list[str]]:
    """lm-eval filter: :func:`tsugiki.evaluate.metrics.mmlu_prox_tolerant`, Japanese."""
    return [[metrics.mmlu_prox_tolerant(text, "ja") for text in texts] for texts in responses]


def tolerant_en(responses: Iterable[list[str]], docs: object) -> list[list[str]]:
    """lm-eval filter: :func:`tsugiki.evaluate.metrics.mmlu_prox_tolerant`, English."""
    return [[metrics.mmlu_prox_tolerant(text, "en") for text in texts] for texts in responses]


# --- NIILC and JAQKET (FlexEval) -------------------------------------------------------------------------------------

_INSTRUCTION = (
    "以下はタスクを説明する指示と、追加の背景情報を提供する入力の組み合わせです。要求を適切に満たす回答を書いてください。\n指示:: "
)
NIILC_HEAD = (
    _INSTRUCTION + "質問に対する答えを出力してください。\n\n"
    "質問:: ハリーポッターの著者は誰？, 回答:: J・K・ローリング\n"
    "質問:: 軽自動車は何cc以下から？, 回答:: 660cc以下\n"
    "質問:: 向日葵は何科の植物？, 回答:: キク科\n"
    "質問:: 入道雲はどの季節に発生するの？, 回答:: 夏\n"
)


def niilc(data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """The 127 questions whose answer is marked as the only one (``D.3`` is 唯一) and is not ``-``."""
    rows = load_set("niilc", data_dir, splits=["test"])["test"]
    kept = [row for row in rows if row["D_3"] == ["唯一"] and row["answers"] != ["-"]]
    docs = [
        {"id": row["id"], "prompt": f"{NIILC_HEAD}質問:: {row['text']}, 回答::", "target": list(row["answers"])}
        for row in kept
    ]
    return {"test": Dataset.from_list(docs)}


def jaqket(data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """AI王 questions, closed book; the answer opens with 「, so that it ends at 」."""
    rows = load_set("jaqket", data_dir)["validation"]
    docs = [
        {"id": str(row.get("qid") or i), "prompt": f"{row['question']}答えは「", "target": list(row["answers"])}
        for i, row in enumerate(rows)
    ]
    return {"test": Dataset.from_list(docs)}


def aio_results(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match and FlexEval's CharF1 with any reference after AIONormalizer; ``unparsed``: nothing is left of the answer."""
    answer = metrics.aio_normalize(results[0])
    references = [metrics.aio_normalize(reference) for reference in doc["target"]]
    return {
        "exact_match": float(answer in references),
        "flexeval_char_f1": metrics.flexeval_char_f1(answer, references),
        "unparsed": float(not answer),
    }


# --- JMMLU (FlexEval) ------------------------------------------------------------------------------------------------

JMMLU_HEAD = (
    _INSTRUCTION + "質問と回答の選択肢を入力として受け取り、選択肢から回答を選択してください。"
    "回答の他には何も含めないことを厳守してください。\n\n"
)
CULTURE = ("japanese_history", "world_history", "japanese_civics", "japanese_geography", "japanese_idiom")


def _jmmlu_question(row: Row) -> str:
    return f"質問:: {row['question'].strip()}, 選択肢::\n {row['A']}\n {row['B']}\n {row['C']}\n {row['D']}, 回答::"


def jmmlu_shots(rows: list[Row]) -> list[int]:
    """FlexEval's rule: the first row of each gold letter not seen before, in file order; indices of four rows."""
    seen: dict[str, int] = {}
    for i, row in enumerate(rows):
        seen.setdefault(row["answer"], i)
    return sorted(seen.values())


def jmmlu_prefix(rows: list[Row]) -> str:
    """A subject's prompt up to the question: instruction and four worked examples."""
    shots = (rows[i] for i in jmmlu_shots(rows))
    return JMMLU_HEAD + "".join(f"{_jmmlu_question(row)} {row[row['answer']]}\n" for row in shots)


def _jmmlu(subjects: Iterable[str], leaked_shots: bool, data_dir: str | None) -> dict[str, Dataset]:
    by_set = {"jmmlu": JMMLU_SUBJECTS, "jmmlu_nc_nd": JMMLU_NC_ND}
    docs = []
    for subject in subjects:
        name = next(n for n, members in by_set.items() if subject in members)
        rows = load_set(name, data_dir, config=subject)["test"]
        prefix, shots = jmmlu_prefix(rows), jmmlu_shots(rows)
        docs += [
            {"id": f"{subject}/{i}", "subject": subject, "prompt": prefix + _jmmlu_question(row),
             "options": [row[x] for x in "ABCD"], "target": row[row["answer"]]}
            for i, row in enumerate(rows) if leaked_shots or i not in shots
        ]  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def jmmlu_culture(leaked_shots: bool = True, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """The five subjects made in Japan: 739 items, or 719 without the four of each that are its own shots."""
    return _jmmlu(CULTURE, leaked_shots, data_dir)


def jmmlu_all(leaked_shots: bool = True, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """All 56 subjects, 7,536 items: FlexEval's own JMMLU."""
    return _jmmlu([*JMMLU_SUBJECTS, *JMMLU_NC_ND], leaked_shots, data_dir)


def jmmlu_results(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match with the text of the right option after NFKC, lower case, strip; ``unparsed``: it is none of the four."""
    answer, gold = (metrics.nfkc_lower_strip(text) for text in (results[0], doc["target"]))
    options = [metrics.nfkc_lower_strip(option) for option in doc["options"]]
    return {
        "exact_match": float(answer == gold),
        "flexeval_char_f1": metrics.flexeval_char_f1(answer, [gold]),
        "unparsed": float(answer not in options),
    }


# --- FlexEval's MGSM-ja and GSM8K ------------------------------------------------------------------------------------

_TENNIS = """\
問題: ロジャーは5個のテニスボールがあります。テニスボールの缶を2つ追加で買います。それぞれの缶には3つのテニスボールが入っています。彼は今いくつのテニスボールがありますか？
ステップごとの答え: ロジャーは最初5個のボールがありました。テニスボール3個入りの缶が2つあれば、テニスボールは6個あります。5+6=11。答えは11です。

問題: サーバールームには9台のコンピューターがありました。月曜日から木曜日まで毎日5台のコンピューターをインストールしました。今サーバールームには難題のコンピューターがありますか？
ステップごとの答え: 月曜から木曜まで4日あります。毎日5台のコンピューターが追加されます。つまり、全部で4*5=20台のコンピューターが追加されました。最初に9台のコンピューターがあったので、今は9+20=29台のコンピューターとなります。答えは29です。

問題: リアは32個のチョコレートを持っていました、彼女の妹は42個持っていました。彼女達が35個食べたとしたら、全部で何個残っていますか？
ステップごとの答え: リアは32個のチョコレートを持っており、リアの妹は42個持っていた。つまり、元々32+42=74個のチョコレートがあった。35個が食べられた。だから全部で、彼女たちには74-35=39個のチョコレートが残っている。答えは39個。

問題: ショーンは5個のおもちゃを持っています。クリスマスに、彼は父と母からそれぞれ2つずつおもちゃをもらいました。今彼はいくつのおもちゃがありますか？
ステップごとの答え: 彼は5個おもちゃを持っています。母から2つもらった後は、5+2=7個のおもちゃがあります。その後父から2つさらにもらい、全部で彼は、7+2=9個のおもちゃがあります。答えは9個です。

"""
_CLIPS = """\
Q: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did Natalia sell altogether in April and May?
A: Natalia sold 48/2 = 24 clips in May.
Natalia sold 48+24 = 72 clips altogether in April and May.
#### 72

Q: Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did she earn?
A: Weng earns 12/60 = $0.2 per minute.
Working 50 minutes, she earned 0.2 x 50 = $10.
#### 10

Q: Betty is saving money for a new wallet which costs $100. Betty has only half of the money she needs. Her parents decided to give her $15 for that purpose, and her grandparents twice as much as her parents. How much more money does Betty need to buy the wallet?
A: In the beginning, Betty has only 100 / 2 = $50.
Betty's grandparents gave her 15 * 2 = $30.
This means, Betty needs 100 - 50 - 30 - 15 = $5 more.
#### 5

Q: Julie is reading a 120-page book. Yesterday, she was able to read 12 pages and today, she read twice as many pages as yesterday. If she wants to read half of the remaining pages tomorrow, how many pages should she read?
A: Maila read 12 x 2 = 24 pages today.
So she was able to read a total of 12 + 24 = 36 pages since yesterday.
There are 120 - 36 = 84 pages left to be read.
Since she wants to read half of the remaining pages tomorrow, then she should read 84/2 = 42 pages.
#### 42

"""


def flexeval_mgsm_ja(corrected: bool = True, data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """MGSM-ja after four fixed worked examples.

    Args:
        corrected: the corrected Japanese questions that FlexEval loads; False takes the original ones.
    """
    if corrected:
        rows = load_set("mgsm_ja_fixed", data_dir)["test"]
    else:
        rows = load_set("mgsm", data_dir, config="ja", splits=["test"])["test"]
    docs = [
        {"id": f"ja/{i}", "prompt": f"{_TENNIS}問題: {row['question']}\nステップごとの答え:",
         "target": str(row["answer_number"]).replace(",", "")}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def flexeval_gsm8k(data_dir: str | None = None, **_) -> dict[str, Dataset]:
    """GSM8K after four fixed worked examples; the target is what follows ``#### ``, without commas."""
    rows = load_set("gsm8k", data_dir, splits=["test"])["test"]
    docs = [
        {"id": str(i), "prompt": f"{_CLIPS}Q: {row['question']}\nA:",
         "target": row["answer"].split("#### ")[1].strip().replace(",", "")}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    return {"test": Dataset.from_list(docs)}


def _number_results(doc: Row, text: str, prefix: str | None) -> dict[str, float]:
    number = metrics.flexeval_number(text, prefix)
    return {"exact_match": float(number == doc["target"]), "unparsed": float(not number)}


def mgsm_ja_number_results(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match of the last number after the last 答えは."""
    return _number_results(doc, results[0], "答えは")


def gsm8k_number_results(doc: Row, results: list[str]) -> dict[str, float]:
    """Exact match of the last number."""
    return _number_results(doc, results[0], None)
