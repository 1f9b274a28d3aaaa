"""Talking to a GGUF with nothing but the file: its own chat template, its own end-of-turn token."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import llama_cpp
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tsugiki.errors import UserError
from tsugiki.evaluate.engine import Engine


def render(engine: Engine, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Render the chat template stored in the file, by default ready for the assistant's answer.

    Raises:
        UserError: the file holds no template, or the template refuses the conversation.
    """
    template = engine.metadata.get("tokenizer.chat_template")
    if not template:
        raise UserError("the file holds no chat template", where=str(engine.path))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # The environment that transformers gives its templates: a sandbox, blocks trimmed, loop controls, an undefined
    # name false in a condition (`if message.tool_calls`).
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # The token's own text: as a piece of an answer a special token is empty, and a prompt without BOS is another prompt.
    special = {
        f"{name}_token": llama_cpp.llama_vocab_get_text(engine._vocab, token).decode("utf-8") if token >= 0 else ""
        for name, token in (("bos", engine.bos), ("eos", engine.eos))
    }
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special
        )
    except TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}", where=str(engine.path)) from error


def answer(
    engine: Engine, messages: list[dict[str, str]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[str]:
    """Stream the assistant's answer as text, until an end-of-turn or end-of-text token.

    Args:
        engine: the open file.
        messages: the conversation so far, the last message the user's.
        max_new_tokens: the longest answer.
        temperature: 0 takes the most likely token.
        seed: of the sampling.
    """
    ids = engine.tokenize(render(engine, messages), special=True)
    stops = {token for token in (engine.eot, engine.eos) if token >= 0}
    tokens = engine.stream(ids, max_new_tokens=max_new_tokens, stop_ids=stops, temperature=temperature, seed=seed)
    yield from engine.stream_text(tokens)
