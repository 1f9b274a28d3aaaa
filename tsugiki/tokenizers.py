"""Loading a tokenizer as the base was trained with it.

transformers 5 reads every ``tokenizer.model`` of a ``LlamaTokenizer`` as BPE, and with any other class leaves out the
space before a text. Where it is a Unigram model, as Sarashina's, almost no text gets the ids that the base has learned:
2 of 800 Japanese questions and answers with a vocabulary of 2,000. Such a model is built here as what it is.
"""

from __future__ import annotations

from pathlib import Path

_SPACE = "▁"


def load_tokenizer(folder: Path | str):
    """The tokenizer in a folder, from its files alone; raises whatever transformers raises."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    proto = _unigram_proto(folder)
    return loaded if proto is None else _unigram_tokenizer(proto, loaded)


def is_unigram_model(folder: Path | str) -> bool:
    """Whether a folder's only tokenizer is a SentencePiece Unigram model, which transformers alone may read as BPE."""
    return _unigram_proto(Path(folder)) is not None


def _unigram_proto(folder: Path):
    """SentencePiece's description of ``tokenizer.model``, where that is a Unigram model and the only definition."""
    path = folder / "tokenizer.model"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return None
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:  # not SentencePiece's: transformers has read it as something else
        return None
    return proto if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM else None


def _unigram_tokenizer(proto, loaded):
    """A fast tokenizer with the pieces, the byte fallback and the spaces of a SentencePiece Unigram model."""
    import tokenizers
    from tokenizers import decoders, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    spec, pieces = proto.normalizer_spec, proto.pieces
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [(p.piece, p.score) for p in pieces], unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback
    ))
    steps = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()] if spec.remove_extra_whitespaces else []
    steps += [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for kind, special in ((3, True), (4, False)):  # control and user-defined pieces
        backend.add_tokens([tokenizers.AddedToken(p.piece, normalized=False, special=special) for p in pieces if p.type == kind])
    later = {i: t for i, t in loaded.added_tokens_decoder.items() if i >= len(pieces)}
    backend.add_tokens([later[i] for i in sorted(later)])
    if getattr(loaded, "add_bos_token", False) and loaded.bos_token:
        bos = (loaded.bos_token, backend.token_to_id(loaded.bos_token))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos])
    roles = {f"{r}_token": getattr(loaded, f"{r}_token") for r in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=loaded.chat_template, clean_up_tokenization_spaces=False,
        model_max_length=loaded.model_max_length, **{k: v for k, v in roles.items() if v},
    )
