"""設備保全: a fictional plant, its rule book, and thousands of questions about it, from one seed.

Everything here is invented for this kit. Two things can be learnt from the questions:

* **rules**, which hold for every device of a type, a class (重要度 A, B, C) or an alarm code, so that they can be
  asked about a device that training never saw (:func:`rule_answer` is the whole rule book), and
* **facts** of one device (where it stands, its rated pressure or speed), which only its own record tells.

A third kind has no answer (分かりません): attributes that the plant never records, attributes that a type does not
have, types and devices that the plant does not own.

Every choice comes from SHA-256 of the seed and the item's own key, never from a random generator's state, so a seed
gives the same rows on every machine and Python version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

UNKNOWN = "分かりません"
CLASSES = ("A", "B", "C")
KINDS = ("seen_fact", "rule", "unanswerable")


@dataclass(frozen=True)
class DeviceType:
    """What the plant's rule book says about one type of device.

    Attributes:
        name: the Japanese name.
        letter: what its device ids begin with.
        interval: months between periodic inspections, for class A, B and C.
        section: the section in charge.
        lubricant: what it is lubricated with.
        permit: the permit needed before it is opened.
        rating: the one rated value in its record: ``定格圧力`` (MPa) or ``回転数`` (rpm).
    """

    name: str
    letter: str
    interval: tuple[int, int, int]
    section: str
    lubricant: str
    permit: str
    rating: str


TYPES = (
    DeviceType("ポンプ", "P", (1, 3, 6), "機械課", "タービン油", "液抜き確認票", "定格圧力"),
    DeviceType("圧縮機", "C", (1, 2, 4), "動力課", "コンプレッサー油", "脱圧確認票", "定格圧力"),
    DeviceType("送風機", "B", (2, 4, 8), "空調課", "グリース", "電源遮断票", "回転数"),
    DeviceType("熱交換器", "E", (6, 12, 24), "製造課", "給油不要", "脱圧確認票", "定格圧力"),
    DeviceType("攪拌機", "M", (2, 3, 6), "製造課", "ギヤ油", "酸欠作業許可", "回転数"),
    DeviceType("コンベヤ", "V", (1, 2, 6), "搬送課", "グリース", "電源遮断票", "回転数"),
    DeviceType("ボイラー", "K", (3, 6, 12), "動力課", "給油不要", "火気使用許可", "定格圧力"),
    DeviceType("冷凍機", "R", (3, 4, 12), "空調課", "冷凍機油", "冷媒回収票", "定格圧力"),
)
TYPE_OF = {t.name: t for t in TYPES}

# Alarm codes are a family and a level from 1 to 3, as in VH-2.
ALARMS = {
    "TH": "冷却水を確認する",
    "VH": "軸受を点検する",
    "PL": "弁の開度を確認する",
    "LL": "液を補給する",
    "OC": "負荷を下げる",
    "GD": "換気をする",
}
TOP_LEVEL_ACTION = "直ちに停止する"
RESPONSE_MINUTES = {"A": (30, 10, 3), "B": (60, 30, 10), "C": (240, 60, 30)}
APPROVER = {"A": "工場長", "B": "保全課長", "C": "当直長"}
PATROL = {"A": "毎直1回", "B": "毎日1回", "C": "毎週1回"}

SITES = tuple(f"{b}{f}階" for b in ("東棟", "西棟", "南棟", "北棟") for f in (1, 2, 3))
RATINGS = {
    "定格圧力": tuple(f"{v}MPa" for v in ("0.2", "0.3", "0.5", "0.7", "0.9", "1.2", "1.6", "2.5")),
    "回転数": tuple(f"{v}rpm" for v in (300, 450, 600, 750, 900, 1200, 1500, 1800)),
}


@dataclass(frozen=True)
class Device:
    """One line of the plant's register."""

    id: str
    type: str
    rank: str
    site: str
    rating: str


def rule_answer(topic: str, type_name: str, rank: str, code: str = "") -> str:
    """The rule book: what holds for every device of this type and class, or for this alarm code.

    Args:
        topic: one of :data:`RULE_TOPICS`.
        type_name: a name in :data:`TYPES`.
        rank: class ``A``, ``B`` or ``C``.
        code: the alarm code for ``action`` and ``response``, for example ``VH-2``.
    """
    device_type = TYPE_OF[type_name]
    if topic == "interval":
        return f"{device_type.interval[CLASSES.index(rank)]}か月"
    if topic == "section":
        return device_type.section
    if topic == "lubricant":
        return device_type.lubricant
    if topic == "permit":
        return device_type.permit
    if topic == "approver":
        return APPROVER[rank]
    if topic == "patrol":
        return PATROL[rank]
    family, level = code.split("-")
    if topic == "action":
        return TOP_LEVEL_ACTION if level == "3" else ALARMS[family]
    if topic == "response":
        return f"{RESPONSE_MINUTES[rank][int(level) - 1]}分以内"
    raise ValueError(f"no rule for topic {topic!r}")


# Wordings by topic: (training, validation, test). {t} type, {d} device id, {r} class, {c} alarm code, {x} attribute.
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "interval": (
        (
            "重要度{r}の{t} {d}の定期点検は何か月ごとですか。",
            "重要度{r}の{t} {d}は何か月ごとに点検しますか。",
            "{t} {d}(重要度{r})の点検周期は何か月ですか。",
            "{t} {d}、重要度{r}の定期点検の間隔を教えてください。",
            "重要度{r}の{t} {d}の点検間隔はどれだけですか。",
            "{t} {d}は重要度{r}です。定期点検の周期は?",
            "重要度{r}の{t} {d}、点検は何か月おきですか。",
            "重要度{r}である{t} {d}の定期点検の周期を答えてください。",
        ),
        ("{t} {d}(重要度{r})は何か月ごとに定期点検をしますか。",),
        ("重要度{r}の{t} {d}の定期点検の周期を教えてください。", "{t} {d}は重要度{r}です。何か月ごとに点検しますか。"),
    ),
    "section": (
        (
            "{t} {d}の担当課はどこですか。",
            "{t} {d}を担当するのはどの課ですか。",
            "{t} {d}の保全はどの課が行いますか。",
            "{t} {d}の不具合はどの課に連絡しますか。",
            "{t} {d}の責任部署を教えてください。",
            "{t} {d}を受け持つ課はどこですか。",
            "{t} {d}の担当部署は?",
        ),
        ("{t} {d}の責任部署はどこですか。",),
        ("{t} {d}の担当課を教えてください。", "{t} {d}の保全を受け持つのはどの課ですか。"),
    ),
    "lubricant": (
        (
            "{t} {d}の潤滑油は何ですか。",
            "{t} {d}にはどの潤滑油を使いますか。",
            "{t} {d}の潤滑に使うものは何ですか。",
            "{t} {d}に給油する油の種類は?",
            "{t} {d}の潤滑剤を教えてください。",
            "{t} {d}に使う油は何ですか。",
            "{t} {d}の指定潤滑油を答えてください。",
        ),
        ("{t} {d}の潤滑剤は何ですか。",),
        ("{t} {d}の潤滑油を教えてください。", "{t} {d}に使う潤滑油の種類は?"),
    ),
    "permit": (
        (
            "{t} {d}を開放する前に必要な書類は何ですか。",
            "{t} {d}の開放作業にはどの許可が要りますか。",
            "{t} {d}を分解する前に何を提出しますか。",
            "{t} {d}の開放に必要な許可を教えてください。",
            "{t} {d}の分解作業に要る書類は?",
            "{t} {d}を開ける前に取る書類は何ですか。",
            "{t} {d}の開放前に必要な手続きを答えてください。",
        ),
        ("{t} {d}の分解作業に必要な許可は何ですか。",),
        ("{t} {d}を開放する前に必要な許可を教えてください。", "{t} {d}を分解する前に要る書類は何ですか。"),
    ),
    "approver": (
        (
            "重要度{r}の{t} {d}を止めるには誰の承認が要りますか。",
            "重要度{r}の{t} {d}の停止を承認するのは誰ですか。",
            "{t} {d}(重要度{r})を停止する許可は誰が出しますか。",
            "{t} {d}は重要度{r}です。停止の承認者は?",
            "重要度{r}の{t} {d}を止めるときの承認者は誰ですか。",
            "重要度{r}の{t} {d}の停止は誰に承認を求めますか。",
            "{t} {d}、重要度{r}の停止の承認者を教えてください。",
        ),
        ("{t} {d}(重要度{r})を止めるには誰の承認が必要ですか。",),
        ("重要度{r}の{t} {d}の停止の承認者を教えてください。", "{t} {d}は重要度{r}です。誰が停止を承認しますか。"),
    ),
    "patrol": (
        (
            "重要度{r}の{t} {d}の巡回点検の頻度は?",
            "重要度{r}の{t} {d}はどの頻度で巡回しますか。",
            "{t} {d}(重要度{r})の巡回はいつ行いますか。",
            "{t} {d}は重要度{r}です。巡回の頻度は?",
            "重要度{r}の{t} {d}の見回りはどの頻度ですか。",
            "重要度{r}の{t} {d}の巡回点検はいつしますか。",
            "{t} {d}、重要度{r}の巡回頻度を教えてください。",
        ),
        ("{t} {d}(重要度{r})の見回りの頻度は?",),
        ("重要度{r}の{t} {d}の巡回点検の頻度を教えてください。", "{t} {d}は重要度{r}です。いつ巡回しますか。"),
    ),
    "action": (
        (
            "{t} {d}に警報 {c} が出ました。何をしますか。",
            "{t} {d}で警報 {c} です。最初の処置は?",
            "{t} {d}の警報 {c} にはどう対応しますか。",
            "警報 {c} が{t} {d}で出たら何をしますか。",
            "{t} {d}に {c} が出たときの処置を教えてください。",
            "{t} {d}の警報 {c} の初動は何ですか。",
            "{c} が鳴りました。{t} {d}をどうしますか。",
        ),
        ("{t} {d}に警報 {c} が出たときの初動は?",),
        ("{t} {d}で警報 {c} が出ました。どう対応しますか。", "警報 {c} が{t} {d}に出たときの処置は何ですか。"),
    ),
    "response": (
        (
            "重要度{r}の{t} {d}に警報 {c}。何分以内に対応しますか。",
            "重要度{r}の{t} {d}の警報 {c} の対応時間は?",
            "{t} {d}(重要度{r})の警報 {c} は何分以内に対応しますか。",
            "重要度{r}の{t} {d}で {c} が出ました。対応の期限は?",
            "重要度{r}の{t} {d}、警報 {c} の対応期限を教えてください。",
            "{t} {d}は重要度{r}です。{c} には何分以内に対応しますか。",
            "警報 {c} が重要度{r}の{t} {d}で出ました。対応時間は?",
        ),
        ("{t} {d}(重要度{r})で警報 {c}。対応時間は?",),
        ("重要度{r}の{t} {d}の警報 {c} には何分以内に対応しますか。", "{t} {d}は重要度{r}です。警報 {c} の対応期限は?"),
    ),
    "site": (
        (
            "{t} {d}はどこにありますか。",
            "{t} {d}の設置場所はどこですか。",
            "{d}はどこに設置されていますか。",
            "{t} {d}は何棟の何階ですか。",
            "{d}の場所を教えてください。",
            "{t} {d}の据付場所は?",
        ),
        ("{t} {d}の場所はどこですか。",),
        ("{t} {d}はどこに設置されていますか。", "{d}の設置場所を教えてください。"),
    ),
    "rating": (
        (
            "{t} {d}の{x}はいくつですか。",
            "{d}の{x}を教えてください。",
            "{t} {d}の{x}は?",
            "{t} {d}の{x}の値はいくらですか。",
            "{d}の銘板にある{x}はいくつですか。",
            "{t} {d}の{x}を答えてください。",
        ),
        ("{d}の{x}はいくらですか。",),
        ("{t} {d}の{x}を教えてください。", "{d}の{x}の値はいくつですか。"),
    ),
    # Attributes without an answer: asked much as a rated value is, so that the wording alone does not give it away.
    "unrecorded": (
        (
            "{t} {d}の{x}はどう記録されていますか。",
            "{d}の{x}を教えてください。",
            "{t} {d}の{x}は?",
            "{t} {d}の{x}は何ですか。",
            "{d}の記録にある{x}は?",
            "{t} {d}の{x}を答えてください。",
        ),
        ("{d}の{x}は何ですか。",),
        ("{t} {d}の{x}を教えてください。", "{d}の{x}を答えてください。"),
    ),
}
RULE_TOPICS = ("interval", "section", "lubricant", "permit", "approver", "patrol", "action", "response")
FACT_TOPICS = ("site", "rating")
_ASKED_MORE = ("interval", "action", "response")  # the rules with the most combinations

UNRECORDED = ("購入価格", "製造番号", "塗装色", "重量", "前回の故障日", "材質", "消費電力", "保証期限", "耐用年数", "図面番号")
FOREIGN_TYPES = {"タンク": "T", "クレーン": "Q", "乾燥機": "D", "集じん機": "J", "遠心分離機": "N"}

SPLIT_OF_WORDING = ("train", "valid", "test")


def _number(*key: object) -> int:
    """A 64-bit number that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()[:8], "big")


def _pick(options: Sequence[T], *key: object) -> T:
    return options[_number(*key) % len(options)]


def _shuffled(options: Sequence[T], *key: object) -> list[T]:
    return sorted(options, key=lambda option: (_number(*key, option), str(option)))


def plant(seed: int, devices: int) -> list[Device]:
    """The register: ``devices`` devices, spread evenly over the types, in hash order."""
    per_type = -(-devices // len(TYPES))
    register = []
    for device_type in TYPES:
        numbers = _shuffled(range(101, 101 + max(400, 2 * per_type)), seed, "number", device_type.letter)[:per_type]
        for position, number in enumerate(numbers):
            name = f"{device_type.letter}-{number}"
            rating = _pick(RATINGS[device_type.rating], seed, "rating", name)
            rank = CLASSES[position % len(CLASSES)]
            register.append(Device(name, device_type.name, rank, _pick(SITES, seed, "site", name), rating))
    return sorted(register, key=lambda d: _number(seed, "register", d.id))[:devices]


def generate(
    seed: int = 1, *, train_devices: int = 240, valid_devices: int = 40, test_devices: int = 64
) -> list[dict[str, str]]:
    """Rows with ``id, prompt, completion, document, kind, topic, split``; the same rows for the same arguments.

    Training asks about the first ``train_devices`` devices of the register. Validation and test ask rules about
    devices of their own, facts about training's devices in wordings that training does not hold, and questions
    without an answer in such wordings too. ``document`` is the device, the group that a bootstrap draws.
    No prompt is in two splits.
    """
    register = plant(seed, train_devices + valid_devices + test_devices)
    train = register[:train_devices]
    valid = register[train_devices : train_devices + valid_devices]
    test = register[train_devices + valid_devices :]
    rows: list[dict[str, str]] = []

    for device in train:
        for topic in FACT_TOPICS:
            for wording in WORDINGS[topic][0]:
                rows.append(_fact(device, topic, wording, "train"))
        for topic in RULE_TOPICS:
            wordings = _shuffled(WORDINGS[topic][0], seed, "rule", device.id, topic)
            for turn in range(3 if topic in _ASKED_MORE else 2):
                rows.append(_rule(seed, device, topic, wordings[turn], "train", turn))
        for turn in range(5):
            rows.append(_unanswerable(seed, device, "train", turn))
    # Each held-out split asks about a third of its size in facts, half in rules, the rest without an answer.
    for split, own, facts in (("valid", valid, 80), ("test", test, 160)):
        for device in _shuffled(train, seed, "asked", split)[:facts]:
            topic = _pick(FACT_TOPICS, seed, split, "topic", device.id)
            wording = _pick(_wordings(topic, split), seed, split, "wording", device.id)
            rows.append(_fact(device, topic, wording, split))
        for position, device in enumerate(own):
            # Three rules a device, in turn, so that every rule is asked equally often.
            for turn in range(3):
                topic = RULE_TOPICS[(3 * position + turn) % len(RULE_TOPICS)]
                wording = _pick(_wordings(topic, split), seed, split, "wording", device.id, topic)
                rows.append(_rule(seed, device, topic, wording, split, 0))
            for turn in range(2 if position % 2 else 1):
                rows.append(_unanswerable(seed, device, split, turn))
    unique: dict[str, dict[str, str]] = {}
    for row in rows:
        unique.setdefault(row["prompt"], row)
    return [{"id": f"setsubi-{_number(row['prompt']):016x}", **row} for row in unique.values()]


def _wordings(topic: str, split: str) -> tuple[str, ...]:
    return WORDINGS[topic][SPLIT_OF_WORDING.index(split)]


def _row(prompt: str, completion: str, document: str, kind: str, topic: str, split: str) -> dict[str, str]:
    return {
        "prompt": prompt,
        "completion": completion,
        "document": document,
        "kind": kind,
        "topic": topic,
        "split": split,
    }


def _fact(device: Device, topic: str, wording: str, split: str) -> dict[str, str]:
    prompt = wording.format(t=device.type, d=device.id, x=TYPE_OF[device.type].rating)
    return _row(prompt, device.site if topic == "site" else device.rating, device.id, "seen_fact", topic, split)


def _rule(seed: int, device: Device, topic: str, wording: str, split: str, turn: int) -> dict[str, str]:
    key = (seed, split, device.id, topic, turn)
    # Every level of an alarm is asked equally often: level 3 has one answer for all families.
    code = f"{_pick(tuple(ALARMS), *key, 'family')}-{_pick((1, 2, 3), *key, 'level')}"
    prompt = wording.format(t=device.type, d=device.id, r=device.rank, c=code)
    return _row(prompt, rule_answer(topic, device.type, device.rank, code), device.id, "rule", topic, split)


def _unanswerable(seed: int, device: Device, split: str, turn: int) -> dict[str, str]:
    """A question that the plant's records cannot answer; why is its topic."""
    key = (seed, split, device.id, "unanswerable", turn)
    reason = _pick(("unrecorded", "no_such_attribute", "no_such_type", "no_such_device"), *key)
    type_name, name, document = device.type, device.id, device.id
    if reason == "unrecorded":
        attribute = _pick(UNRECORDED, *key, "attribute")
        prompt = _pick(_wordings("unrecorded", split), *key, "wording").format(t=type_name, d=name, x=attribute)
        return _row(prompt, UNKNOWN, document, "unanswerable", reason, split)
    if reason == "no_such_attribute":
        attribute = next(a for a in RATINGS if a != TYPE_OF[type_name].rating)
        prompt = _pick(_wordings("rating", split), *key, "wording").format(t=type_name, d=name, x=attribute)
        return _row(prompt, UNKNOWN, document, "unanswerable", reason, split)
    letters = FOREIGN_TYPES if reason == "no_such_type" else {type_name: "X"}
    type_name = _pick(tuple(letters), *key, "type")
    name = f"{letters[type_name]}-{101 + _number(*key, 'number') % 400}"
    topic = _pick((*RULE_TOPICS, *FACT_TOPICS), *key, "topic")
    code = f"{_pick(tuple(ALARMS), *key, 'family')}-{_pick((1, 2, 3), *key, 'level')}"
    attribute = _pick(tuple(RATINGS), *key, "rating")
    wording = _pick(_wordings(topic, split), *key, "wording")
    prompt = wording.format(t=type_name, d=name, r=_pick(CLASSES, *key, "rank"), c=code, x=attribute)
    return _row(prompt, UNKNOWN, name, "unanswerable", reason, split)
