"""The chat template as token ids: what is prompt, what is completion, where a turn ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tsugiki.artifacts import atomic_path, write_text
from tsugiki.errors import UserError
from tsugiki.samples import EncodedSample, Sample
from tsugiki.tokenizers import load_tokenizer

_SENTINEL = "接木接木"

# The markers of each family's chat format; the templates themselves are ours.
TEMPLATES = {
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llm-jp": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '\n\n### 指示:\n' + m['content'] }}"
        "{% else %}{{ '\n\n### 応答:\n' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\n\n### 応答:\n' }}{% endif %}"
    ),
}


def supply_template(base_dir: Path, family: str, out: Path) -> Path:
    """A folder of the base whose tokenizer has a chat template: the base's own folder where it has one.

    Otherwise ``out``: links to the base's files beside a template, the family's where its markers are in the
    vocabulary, else the plain one that ends a turn with the EOS token.

    Raises:
        UserError: the tokenizer has no EOS token either.
    """
    tokenizer = load_tokenizer(base_dir)
    if tokenizer.chat_template:
        return base_dir
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has neither a chat template nor an EOS token", where=str(base_dir))
    name = {"llama-3": "llama-3"}.get(family, "chatml" if family.startswith("qwen") else "llm-jp")
    marker = {"llama-3": "<|eot_id|>", "chatml": "<|im_end|>", "llm-jp": None}[name]
    if marker and marker not in tokenizer.get_vocab():
        name = "llm-jp"
    template = TEMPLATES[name]
    if tokenizer.bos_token is None:
        template = template.replace("{{ bos_token }}", "")
    with atomic_path(out) as folder:
        folder.mkdir()
        for file in base_dir.iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file.resolve())
        write_text(folder / "chat_template.jinja", template)
    return out


def prompt_text(tokenizer, prompt: str, system: str | None = None) -> str:
    """The rendered chat template of one question, up to and including the assistant's header.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the conversation or drops the system prompt.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = _render(tokenizer, messages, add_generation_prompt=True)
    if system and system.strip() not in text:
        raise UserError("the chat template drops the system prompt", hint="Take it out of the domain (system), or change the template.")
    return text


def _render(tokenizer, messages: list[dict], *, add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            "the base's tokenizer has no chat template",
            hint="Take the base's instruct variant, or give the base a chat_template file.",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:
        raise UserError(f"the chat template refuses roles {[m['role'] for m in messages]}: {error}") from error


def special_ids(tokenizer) -> set[int]:
    """The ids of all special tokens: those with a role (BOS, EOS …) and those that only a template writes."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def end_of_turn_id(tokenizer) -> int:
    """The id of the special token that the template writes after an assistant's answer.

    Raises:
        UserError: no special token follows the answer, so the model could never learn to stop, or the template drops
            the answer.
    """
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SENTINEL}]
    _, answer, tail = _render(tokenizer, messages, add_generation_prompt=False).rpartition(_SENTINEL)
    if not answer:
        raise UserError("the chat template drops the assistant's answer", hint="Write message['content'] for every role.")
    ids = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"]
    # A tokenizer that prepends a space marks it with a token of its own.
    ids = [i for i in ids if tokenizer.decode([i]).strip()]
    if not ids or ids[0] not in special_ids(tokenizer):
        raise UserError(
            f"the chat template ends an answer with {tail!r}, not with a special token",
            hint="Add an end-of-turn token (for example the EOS token) after the assistant's content.",
        )
    return ids[0]


def encode(tokenizer, samples: Iterable[Sample], system: str | None = None) -> list[EncodedSample]:
    """Encode samples: the prompt tokenised alone, as it is at inference, then the answer and end of turn.

    The answer's ids are those of the whole text where the prompt's ids are a prefix of it; a tokenizer that
    merges across the border has the answer tokenised alone, so that the mask never moves into the prompt.
    """
    end = end_of_turn_id(tokenizer)
    samples = list(samples)
    if not samples:
        return []

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    heads = [prompt_text(tokenizer, s.prompt, system) for s in samples]
    prompts, wholes = ids(heads), ids([h + s.completion for h, s in zip(heads, samples, strict=True)])
    alone = ids([s.completion for s in samples])
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    marked = [s for s, answer in zip(samples, alone, strict=True) if special.intersection(answer)]
    if marked:
        raise UserError(
            f"{len(marked)} answer(s) hold a special token of the base's tokenizer, first {marked[0].completion[:60]!r}",
            where=f"sample {marked[0].id}", hint="Take the token's text out of the data: it would end the answer there.",
        )
    encoded = []
    for s, prompt_ids, whole, answer in zip(samples, prompts, wholes, alone, strict=True):
        completion_ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else answer
        encoded.append(EncodedSample(s.id, s.prompt, s.completion, s.document, s.kind, prompt_ids, [*completion_ids, end]))
    return encoded
