"""The chat template in a GGUF renders as transformers renders it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tsugiki.artifacts import write_text
from tsugiki.errors import UserError
from tsugiki.evaluate.chat import render
from tsugiki.evaluate.engine import Engine
from tsugiki.quantize.convert import convert

BASE = Path(__file__).resolve().parents[1] / "recipes" / "bases" / "tiny-llama"
TALK = [
    {"role": "system", "content": "あなたは助手です。"},
    {"role": "user", "content": "点検は？"},
    {"role": "assistant", "content": "三か月ごとです。"},
    {"role": "user", "content": "次は？ <b>&"},
]
HEAD = "<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m['content'] | trim }}"
# What the templates of published models do: look at tools, at a message's absent keys, at the date; leave loops.
TEMPLATES = {
    "own": None,
    "tools": "{{ bos_token }}{%- if tools %}{{ tools | tojson }}{%- endif %}{% for m in messages %}"
    "{% if m.tool_calls %}!{% endif %}" + HEAD + "<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "loops": "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}" + HEAD + "<|eot_id|>{% endfor %}",
    "date": "{{ strftime_now('%Y') }}{% if documents is defined and documents %}d{% endif %}{{ date_string }}"
    "{% for m in messages %}" + HEAD + "{{ eos_token }}{% endfor %}",
}


def with_template(folder: Path, template: str | None) -> Path:
    base = Path(shutil.copytree(BASE, folder / "base"))
    if template is not None:
        write_text(base / "chat_template.jinja", template)
    return base


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_file_renders_its_template_as_transformers_does(tmp_path, name):
    base = with_template(tmp_path, TEMPLATES[name])
    convert(base, tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(base)
    with Engine(tmp_path / "model.gguf", n_seq_max=1) as engine:
        for talk in (TALK, TALK[1:], TALK[:2]):
            expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            assert render(engine, talk) == expected


def test_a_template_that_refuses_is_a_sentence(tmp_path):
    refusal = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    base = with_template(tmp_path, refusal + HEAD + "<|eot_id|>{% endfor %}")
    convert(base, tmp_path / "model.gguf")
    with Engine(tmp_path / "model.gguf", n_seq_max=1) as engine:
        with pytest.raises(UserError, match="no system role"):
            render(engine, TALK)
        assert render(engine, TALK[1:2]).endswith("点検は？<|eot_id|>")
