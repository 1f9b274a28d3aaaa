"""Strings on which tokenizers tend to disagree, written for this kit: kana, half-width kana, rare kanji, signs."""

from __future__ import annotations

import unicodedata
from itertools import product

# Ordinary sentences of the kind that companies ask about.
SENTENCES = (
    "建築物の敷地は、これに接する道の境より高くなければならない。",
    "設備P-101の定格圧力は0.7 MPaで、点検は3か月ごとに行う。",
    "この法律において、次の各号に掲げる用語の意義は、当該各号に定めるところによる。",
    "点検の結果、異常がなければ記録簿に記入し、責任者に報告する。\n異常があれば直ちに停止する。",
    "The pump is inspected every 3 months, and its oil is changed once a year.",
    "第三条　前項の規定にかかわらず、都道府県知事は許可を取り消すことができる。",
    "ポンプの軸受温度が70度を超えたときは、予備機に切り替えてから原因を調べてください。",
    "保証期間は引渡しの日から1年間とし、消耗品は対象外とする。",
    "患者の体温が38.5度以上であれば、医師に連絡し、解熱剤の投与について指示を受ける。",
    "入力電圧は単相200V、消費電力は1.5kWです。専用回路を設けてください。",
    "見積書の有効期限は発行日から30日です。ご不明な点は担当者までお問い合わせください。",
    "Restart the controller, then check that the alarm code E-07 is no longer shown.",
)
HARD_TEXTS = (
    "吾輩は猫である。名前はまだ無い。",
    "ひらがなだけでかいたぶんしょうです",
    "カタカナダケデカイタブンショウデス",
    "ﾊﾝｶｸｶﾅﾃﾞｶｲﾀﾌﾞﾝｼｮｳ",
    "全角ＡＢＣと半角ABC、全角１２３と半角123",
    "が ぎ ぐ げ ご",
    "か\u3099き\u3099く\u3099け\u3099こ\u3099（結合濁点）",
    "ハ\u309aヒ\u309aフ\u309a（結合半濁点）",
    "ヴァイオリンとヴィオラ、ヷ゙ヸヹヺ",
    "コンピューターのメーカー、ラーメーーーン",
    "スーパーー〜〜～―‐−ー",
    "𠮷野家で𩸽を食べる",
    "𠀋𡈽𡌛𡑮𡢽𪐷",
    "髙島屋の﨑さんと神社の福を祈る",
    "葛\U000e0100飾区と葛\U000e0101城市",
    "鬱蒼とした森の中の齟齬と顰蹙",
    "驫驀騾驪驤驥龘龗",
    "辻\ufa66辻、社\ufa4c、祖\ufa50",
    "㍻㌔㌢㍑㈱㏍№℡①②③⑳Ⅳⅸ",
    "々〆ヶ〇〻ゝゞヽヾ〱",
    "「かぎ括弧」『二重』【隅付き】〈山〉《二重山》〔亀甲〕",
    "…‥・。、，．！？：；",
    "😀",
    "今日は晴れ☀️明日は雨☔です😊👍🏽",
    "👨‍👩‍👧‍👦の家族と🏳️‍🌈と🇯🇵",
    "(๑•̀ㅂ•́)و✧ (´・ω・`) ¯\\_(ツ)_/¯",
    "\t",
    "タブ\tで\t\t区切る",
    "\t先頭のタブ",
    "\n",
    "一行目\n二行目\n\n四行目",
    "\n改行で始まる",
    "改行で終わる\n",
    "\r\nWindowsの改行\r\n二行目\r\n",
    "行の前に空白\n  字下げ\n    さらに字下げ",
    "行末に空白  \n次の行",
    " 先頭に空白",
    "末尾に空白 ",
    "  先頭に二つ",
    "二つの  空白と三つの   空白",
    "　全角の空白で始まり　間にもある　",
    "ノーブレーク\u00a0スペースと\u200bゼロ幅と\ufeffBOM",
    "行区切り\u2028段落区切り\u2029終わり",
    "3.14159と１，２３４．５６と1,234,567と0x1F",
    "2024年12月31日23時59分59秒",
    "１２３４５６７８９０1234567890",
    "電話は03-1234-5678、郵便は〒100-0001",
    "Pythonで`print(\"こんにちは\")`と書く",
    "The quick brown foxが怠け者のdogを飛び越える",
    "I'm, you're, it's, WE'LL, they'd — I'VE",
    "naïve café Zürich Ελληνικά Русский العربية עברית हिन्दी ไทย 한국어",
    "e\u0301 と é、A\u030a と Å と Å",
    "圧力は0.7±0.05 MPa、温度は−10〜40℃、騒音は65 dB(A)以下",
    "P-101A／B号機のV-ベルト（Ｂ形）を交換する。",
    "第三条の二第一項第一号イ(1)",
    "前項の規定は、次の各号のいずれかに該当する場合には、適用しない。",
    "¥1,000と￥１，０００と\\1000",
    "https://example.jp/検索?q=日本語&page=2#節",
    "user.name+tag@example.co.jp",
    "<|begin_of_text|>",
    "<|eot_id|>という文字列",
    "<|im_start|>user\n質問<|im_end|>\n",
    "<|endoftext|><|im_end|>",
    "<s>と</s>と<unk>と<pad>",
    "<0x0A>は改行ではない",
    "▁は下線に似た記号▁です",
    "[INST] 指示 [/INST]",
    "### 指示:\nこれは見出し\n\n### 応答:\n",
    "Ġ と Ċ は内部の文字",
    "ＡＩ（人工知能）のＬＬＭ",
    "すもももももももものうち",
    "にわにはにわにわとりがいる",
    "ああああああああああああああああああああああああああああああ",
    "wwwwwwwwwwwwwwwwwwwwwwww",
    "----------==========**********__________",
    "あいうえおabcdeアイウエオ12345亜意宇絵尾!#$%&",
    "\u3042\u3099\u3042\u309aあ゛あ゜",
    "ｶﾞｷﾞｸﾞとガギグど゚",
    "“引用符”と‘引用符’と\"直線\"と'一重'",
    "½ ¼ x² y₃ ∑∫√∞≒≠≦≧",
    "←↑→↓⇒⇔∀∃∈∩∪",
    "縦書き︱の︵括弧︶と﹁鉤﹂",
    "ルビ《るび》と｜漢字《かんじ》",
    "\u202e右から左\u202c",
    "終わりの文字\ufffd",
)

_TOKENS = (
    "<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|user|>", "<|assistant|>",
    "<|system|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<tool_call>", "</tool_call>", "<think>", "</think>", "<0x0A>",
    "<0xE3>", "[PAD151646]", "<|", "|>", "<|im_start", "im_end|>", "< s >", "＜ｓ＞", "<S>", "[MASK]", "[CLS]", "▁", "##ing", "Ġthe",
)
# Old and new forms of kanji that names and statutes still mix.
_FORMS = (
    "亜亞", "悪惡", "圧壓", "囲圍", "為爲", "壱壹", "隠隱", "栄榮", "営營", "衛衞", "駅驛", "円圓", "塩鹽", "応應", "桜櫻", "価價", "仮假",
    "会會", "絵繪", "壊壞", "学學", "覚覺", "関關", "気氣", "旧舊", "拠據", "挙擧", "区區", "経經", "軽輕", "芸藝", "県縣", "検檢", "権權",
    "験驗", "広廣", "号號", "国國", "済濟", "雑雜", "実實", "写寫", "釈釋", "条條", "浄淨", "触觸", "図圖", "声聲", "斉齊", "戦戰", "総總",
    "体體", "対對", "台臺", "沢澤", "単單", "鉄鐵", "伝傳", "当當", "読讀", "売賣", "発發", "浜濱", "変變", "弁辯", "宝寶", "満滿", "訳譯",
    "薬藥", "余餘", "様樣", "来來", "竜龍", "両兩", "塁壘", "礼禮", "霊靈", "労勞", "楼樓", "湾灣", "高髙", "崎﨑", "辺邊", "辺邉", "斎齋",
)
_CODE = (
    "def {0}(x: int) -> str:\n    return f\"{{x:>4}}円\"\n", "for {0} in range(10):\n\tprint({0})  # 表示", "if ({0} != NULL) {{ {0}->next = 0; }}",
    "SELECT {0}, COUNT(*) FROM `設備` WHERE 型番 = 'P-101' GROUP BY {0};", "{{\"{0}\": [1, 2.5, -3e-7, null], \"名前\": \"値\"}}",
    "<div class=\"{0}\">本文&nbsp;</div>", "grep -rn '{0}' ./src | awk '{{print $1}}' >> out.txt", "C:\\設備\\{0}.xlsx", "let {0} = a?.b ?? c => d;",
)


def hard_texts() -> list[str]:
    """More than 2,000 different strings on which tokenizers tend to disagree, always the same ones.

    Kana (full and half width, with marks), kanji (common, rare, of the upper planes, compatibility forms), emoji and what
    joins them, line ends, tabs and runs of spaces, numbers, code, composed and decomposed forms, the names of special
    tokens, old and new forms, English and mixtures.
    """
    kana = [chr(c) for c in (*range(0x3041, 0x3097), *range(0x30A1, 0x30FB), *range(0x31F0, 0x3200), *range(0xFF66, 0xFFA0))]
    marked = [b + m for b in "かきくけこさたはカサタハウワヷｶｻﾀﾊあん" for m in ("\u3099", "\u309a", "ﾞ", "゛", "゜", "ー", "ッ")]
    common = [chr(c) for c in range(0x4E00, 0x9FA0, 13)]
    rare = [chr(c) for c in (*range(0x3400, 0x4DB0, 97), *range(0x20000, 0x2A6D0, 613), *range(0x2A700, 0x2CEA0, 401))]
    compatible = [chr(c) for c in (*range(0xF900, 0xFA6E, 5), *range(0x2F800, 0x2FA1E, 17))]
    signs = [chr(c) for c in (*range(0x2000, 0x2070, 3), *range(0x2190, 0x2300, 11), *range(0x2460, 0x2600, 13),
                              *range(0x3000, 0x3040, 2), *range(0x3200, 0x3400, 11), *range(0xFF01, 0xFF66, 3))]
    emoji = [chr(c) for c in (*range(0x1F300, 0x1F650, 7), *range(0x1F680, 0x1F700, 7), *range(0x1F900, 0x1FA00, 7), *range(0x2600, 0x27C0, 11))]
    joined = [f"{a}\u200d{b}" for a in "👨👩🧑🏳🐻" for b in ("💻", "🚀", "🌈", "⚕️", "👧\u200d👦", "❄️")]
    joined += [p + t for p in "👍👋🙏✋" for t in "🏻🏼🏽🏾🏿"] + [f"{n}\ufe0f\u20e3" for n in "0123456789#*"]
    flags = [chr(0x1F1E6 + ord(a) - 65) + chr(0x1F1E6 + ord(b) - 65) for a, b in ("JP", "US", "FR", "KR", "CN", "DE", "XX")]
    gaps = ("\n", "\r\n", "\t", " ", "　", "\u00a0")
    spaces = ["前" + "".join(g) + "後" for n in (1, 2, 3) for g in product(gaps, repeat=n)]
    spaces += [form.format(" " * n) for n in range(1, 33) for form in ("{0}a", "漢{0}字", "x{0}", "{0}")]
    spaces += ["\n" * n + end for n in range(1, 9) for end in ("", "次", " 次")]
    numbers = [form.format(int("9876543210123456"[:n])) for n in range(1, 17)
               for form in ("{0}", "{0}個", "No.{0}", "-{0}.{0}", "{0:,}円", "0x{0:X}", "v{0}.0.{0}")]
    numbers += ["".join(chr(0xFF10 + (i * 7) % 10) for i in range(n)) + "番" for n in range(1, 13)]
    numbers += [f"{y}年{m}月{d}日 {h:02}:{m:02}" for y, m, d, h in ((1868, 1, 25, 0), (1989, 1, 8, 9), (2024, 12, 31, 23), (2031, 2, 3, 4))]
    code = [line.format(name) for line in _CODE for name in ("i", "温度", "get_value", "__init__", "camelCaseName", "MAX_SIZE2")]
    forms = [unicodedata.normalize(f, t) for f in ("NFC", "NFD", "NFKC", "NFKD") for t in HARD_TEXTS]
    tokens = [form.format(t) for t in _TOKENS for form in ("{0}", "これは{0}です", " {0} ", "{0}{0}", "\n{0}\n")]
    old = [form.format(*pair) for pair in _FORMS for form in ("{0}{1}", "{1}の旧字体は{0}ではない")]
    words = ("I'LL", "we've", "Don’t", "naïve", "HTTPServer", "foo_bar", "e.g.,", "state-of-the-art", "αβγ", "Москва", "안녕", "שלום", "ไทย", "नमस्ते")
    mixed = [form.format(w) for w in words for form in ("{0}", "{0}と言う", "「{0}」", "{0} {0}!", "ﾃｽﾄ{0}テスト", "1{0}2")]
    invisible = [f"前{chr(c)}後" for c in (0x00AD, 0x034F, 0x061C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F),
                                           *range(0x2060, 0x2065), 0xFE00, 0xFE0F, 0xFEFF, 0xFFFC, 0xFFFD, 0xE0100, 0xE0101)]
    pairs = [a + b for a, b in zip(common, common[7:], strict=False)]
    everything = [
        *HARD_TEXTS, *kana, *(f"{a}{b}" for a, b in zip(kana, kana[5:], strict=False)), *marked,
        *("".join(pairs[i : i + 2]) for i in range(0, len(pairs), 5)), *(f"{c}という字" for c in rare), *compatible, *signs,
        *emoji, *joined, *flags, *spaces, *numbers, *code, *forms, *tokens, *old, *mixed, *invisible,
    ]
    return list(dict.fromkeys(everything))
