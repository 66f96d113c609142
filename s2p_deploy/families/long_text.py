"""Prompts longer than a text encoder reads at once: divided into chunks that are encoded one by one and joined."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from s2p_deploy.families.text import encode_texts, is_sd3

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline
    from torch import Tensor


_UNREAD = 2  # tokens of SD3's third encoder beside every chunk, which are thrown away: room for begin and end


def divide_text(pipe: DiffusionPipeline, text: str) -> list[str]:
    """Divides a text at white space into chunks that every CLIP encoder of a pipeline reads whole, as long as can be.

    A word that none reads whole is divided as well. A text that they do read stays as it is.
    """
    tokenizers = _clip_tokenizers(pipe)
    room = min(one.model_max_length - one.num_special_tokens_to_add() for one in tokenizers)
    chunks, left = [""], room
    for word, size in _sized_words(pipe, text, room):
        if size > left and chunks[-1]:
            chunks.append("")
            left = room
        chunks[-1] = f"{chunks[-1]} {word}" if chunks[-1] else word
        left -= size
    return chunks if len(chunks) > 1 else [text]


@torch.no_grad()
def long_prompt_embeds(
    pipe: DiffusionPipeline,
    prompt: str,
    negative: str = "",
    *,
    guided: bool = True,
    fewest: int = 1,
    max_sequence_length: int = 256,
) -> dict[str, Tensor]:
    """Encodes a prompt of any length, as keyword arguments of the stock pipeline's call.

    Every chunk of :func:`divide_text` is encoded by itself, as the pipeline encodes a prompt, and the states follow one
    another; a pooled text is the first chunk's. The negative prompt gets as many chunks, the last ones empty. SD3's
    third encoder, which reads texts of any length, gets the text whole, in as many times ``max_sequence_length`` tokens
    as both prompts need.

    Args:
        pipe: a stock pipeline, with an engine or without; its text encoders run where they are.
        prompt: the text.
        negative: the negative text.
        guided: encodes ``negative`` too.
        fewest: chunks to fill up to with empty ones.
        max_sequence_length: tokens that SD3's third encoder reads at once.

    Example:
        >>> with open_pipeline("build/engine") as opened:
        ...     embeds = long_prompt_embeds(opened.pipe, ", ".join(["a small red circle at the top left"] * 4))
        ...     opened.pipe(**embeds, num_inference_steps=2).images[0].size
        (64, 64)
    """
    texts = {"": prompt} | ({"negative_": negative} if guided else {})
    divided = {kind: divide_text(pipe, text) for kind, text in texts.items()}
    count = max(fewest, *(len(chunks) for chunks in divided.values()))
    third = max_sequence_length * max(
        fewest, *(_third_parts(pipe, text, max_sequence_length) for text in texts.values())
    )
    clip = pipe.components["text_encoder"] or pipe.components["text_encoder_2"]
    embeds: dict[str, Tensor] = {}
    for kind, text in texts.items():
        chunks = [*divided[kind], *[""] * (count - len(divided[kind]))]
        # SDXL takes zeros for a negative prompt that is empty, not for empty chunks of one
        zeros = kind == "negative_" and not text
        encoded = encode_texts(pipe, chunks, negative=zeros, max_sequence_length=_UNREAD)
        states = encoded.states
        if is_sd3(pipe):
            states = torch.cat([states[:, :-_UNREAD].flatten(0, 1), _third_states(pipe, text, third, clip.device)])
        else:
            states = states.flatten(0, 1)
        embeds[f"{kind}prompt_embeds"] = states[None].to(clip.device, clip.dtype)
        if "text_encoder_2" in pipe.components:
            # size ids follow SDXL's pooled text
            width = None if is_sd3(pipe) else pipe.text_encoder_2.config.projection_dim
            pooled = encoded.added_cond[:1, :width]
            embeds[f"{kind}pooled_prompt_embeds"] = pooled.to(clip.device, clip.dtype)
    return embeds


def _clip_tokenizers(pipe: DiffusionPipeline) -> list[Any]:
    found = (pipe.components.get(name) for name in ("tokenizer", "tokenizer_2"))
    return [tokenizer for tokenizer in found if tokenizer is not None]


def _sized_words(pipe: DiffusionPipeline, text: str, room: int) -> Iterator[tuple[str, int]]:
    """Yields the words of a text, each with its number of tokens; parts of those that have more than ``room``."""
    for word in text.split():
        rest = word
        while (size := _tokens(pipe, rest)) > room:
            part = rest[: _fitting(pipe, rest, room)]
            yield part, _tokens(pipe, part)
            rest = rest[len(part) :]
        yield rest, size


def _fitting(pipe: DiffusionPipeline, word: str, room: int) -> int:
    """Returns how many characters of a word, at least one, have at most ``room`` tokens."""

    def size(end: int) -> int:
        return _tokens(pipe, word[:end])

    return max(1, bisect_right(range(1, len(word)), room, key=size))


def _tokens(pipe: DiffusionPipeline, word: str) -> int:
    """Returns the number of tokens of a word, of the CLIP tokenizer that needs most."""
    sizes = []
    for tokenizer in _clip_tokenizers(pipe):
        converts = isinstance(pipe, TextualInversionLoaderMixin)
        converted = pipe.maybe_convert_prompt(word, tokenizer) if converts else word
        sizes.append(len(tokenizer(converted, add_special_tokens=False).input_ids))
    return max(sizes)


def _third_parts(pipe: DiffusionPipeline, text: str, max_sequence_length: int) -> int:
    """Returns how many times ``max_sequence_length`` tokens SD3's third encoder needs for a text; 1 without one."""
    tokenizer = pipe.components.get("tokenizer_3")
    return 1 if tokenizer is None else math.ceil(len(tokenizer(text).input_ids) / max_sequence_length)


def _third_states(pipe: DiffusionPipeline, text: str, tokens: int, device: torch.device) -> Tensor:
    """Encodes a text by SD3's third encoder, or as zeros where it is absent: float32 [tokens, D] on the CPU."""
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "max_sequence_length": tokens}
    states: Tensor = pipe.encode_prompt([""], None, [text], device=device, **options)[0]
    return states[0, -tokens:].float().cpu()
