"""Turn the parts of an example into a model's text, and text into tokens with their characters.

The chat template is rendered with private-use characters around each text, which tell where each
part is in the result. Text of the user that spells a control token of the model ("<|im_end|>")
stays text: while the template is rendered and images are processed, filler characters stand in its
place, and its tokens are those of plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmheads import compat
from mmheads.examples import Part, Video
from mmheads.models import VLM

OPEN, CLOSE, FILLER = "\ue0f0", "\ue0f1", "\ue0f2"
"""Private-use characters around each text, and in place of control tokens that a user wrote."""


@dataclass(frozen=True)
class Place:
    """Where a part is in a text.

    Attributes:
        chars: First and last + 1 character; None for a part that is only white space.
        visual: Index among the images and videos of the prompt; None for a text.
    """

    chars: tuple[int, int] | None = None
    visual: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """An example as a chat template writes it.

    Attributes:
        text: The prompt, with fillers of the same length in place of control tokens of the user.
        places: The place of each part, in order.
        controls: The characters that the fillers stand for, in order.
    """

    text: str
    places: tuple[Place, ...]
    controls: str


def render(vlm: VLM, parts: Sequence[Part]) -> Rendered:
    """Render parts of one user message with the model's chat template.

    Args:
        vlm: The model.
        parts: Texts, images and videos in the order of the prompt.

    Raises:
        ValueError: The model has no chat template, its template does not keep the parts whole and
            in order, it reads no images, or a text holds one of our private-use characters.
    """
    if not vlm.processor.chat_template:
        raise ValueError(
            f"{vlm} has no chat template, as base models often have none; give one: "
            "load(..., chat_template=...) takes the text of a Jinja template or its file"
        )
    marks = placeholders(vlm)
    control = control_tokens(vlm)
    controls = []
    written: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            if any(mark in part for mark in (OPEN, CLOSE, FILLER)):
                raise ValueError(
                    f"the text {part[:80]!r} holds one of the private-use characters U+E0F0 to "
                    "U+E0F2, which mark parts here; take them out"
                )
            controls += control.findall(part)
            part = control.sub(lambda match: FILLER * len(match.group()), part)
        elif not marks:
            raise ValueError(f"{vlm} reads only text, not images")
        written.append(part)
    expected = [
        OPEN if isinstance(part, str) else "visual"
        for part in written
        if not isinstance(part, str) or part.strip()
    ]
    pattern = re.compile("|".join([OPEN, *map(re.escape, marks.values())]))
    for messages in _contents(written, marks, vlm.is_text_only):
        try:
            marked, plain = _apply(vlm, messages(True)), _apply(vlm, messages(False))
        except (TypeError, ValueError, jinja2.TemplateError):
            continue
        order = [m.group() if m.group() == OPEN else "visual" for m in pattern.finditer(marked)]
        if order == expected and marked.replace(OPEN, "").replace(CLOSE, "") == plain:
            places = tuple(_places(written, marked, pattern))
            return Rendered(text=plain, places=places, controls="".join(controls))
    raise ValueError(
        f"the chat template of {vlm} does not keep the parts of a message whole and in order"
    )


def expand(rendered: Rendered, replacements: Sequence[str]) -> Rendered:
    """The text with each placeholder replaced, as the processor does it, and its places."""
    pieces: list[str] = []
    places: list[Place] = []
    end = grown = 0
    for place in rendered.places:
        if place.chars is None:
            places.append(place)
            continue
        first, last = place.chars
        more = 0
        if place.visual is not None:
            replacement = replacements[place.visual]
            pieces += [rendered.text[end:first], replacement]
            more = len(replacement) - (last - first)
            end = last
        places.append(Place((first + grown, last + grown + more), place.visual))
        grown += more
    text = "".join([*pieces, rendered.text[end:]])
    return Rendered(text=text, places=tuple(places), controls=rendered.controls)


def tokenize(
    vlm: VLM, rendered: Rendered, start: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids of a text from a character on, and the characters of each token [token, 2].

    Args:
        vlm: The model.
        rendered: An expanded text.
        start: Character at which a token begins.

    Raises:
        ValueError: A control token in the user's text cannot be kept as text.
    """
    before = rendered.text[:start].count(FILLER)
    control = iter(rendered.controls[before:])
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at = start
    for piece in re.split(f"({FILLER}+)", rendered.text[start:]):
        if piece.startswith(FILLER):
            text = "".join(islice(control, len(piece)))
            new = compat.tokens_as_text(vlm.tokenizer, text)
            if new is None or set(new) & control_ids(vlm):
                raise ValueError(
                    f"the text holds {text!r}, a control token of {vlm}, and its tokenizer cannot "
                    "write it as plain text; take it out"
                )
            ids += new
            offsets += [(at, at + len(piece))] * len(new)
        elif piece or not at:
            more, chars = _piece(vlm, piece, first=not at)
            if not at and chars and chars[-1] == (0, 0) and rendered.controls:
                raise ValueError(
                    f"the tokenizer of {vlm} ends each text with a token, so that the control "
                    f"tokens {rendered.controls[:40]!r} in the text cannot stay text; take them out"
                )
            ids += more
            offsets += [(at + a, at + b) for a, b in chars]
        at += len(piece)
    tokens, places = np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)
    _check_controls(vlm, rendered, tokens, places)
    return tokens, places


def stand_in(rendered: Rendered) -> Rendered:
    """The text as the processor gets it: fillers are ordinary characters there."""
    return Rendered(
        text=rendered.text, places=rendered.places, controls=FILLER * len(rendered.controls)
    )


def _piece(vlm: VLM, text: str, *, first: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and characters of a piece of a text; tokenizers may treat the first piece differently."""
    tokenizer = vlm.tokenizer
    if first:
        begin = tokenizer.bos_token
        encoded = tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=not (begin and text.startswith(begin)),
        )
        return encoded["input_ids"], encoded["offset_mapping"]
    # Behind a line feed, no tokenizer adds the space with which it starts a text.
    feed = tokenizer("\n", add_special_tokens=False)["input_ids"]
    encoded = tokenizer("\n" + text, return_offsets_mapping=True, add_special_tokens=False)
    ids, chars = encoded["input_ids"], encoded["offset_mapping"]
    if feed and ids[: len(feed)] == feed and all(a >= 1 for a, _ in chars[len(feed) :]):
        return ids[len(feed) :], [(a - 1, b - 1) for a, b in chars[len(feed) :]]
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _check_controls(
    vlm: VLM, rendered: Rendered, ids: NDArray[np.int64], offsets: NDArray[np.int64]
) -> None:
    """Raise ValueError if a control token came out of the user's text, even out of two parts."""
    control = np.flatnonzero(np.isin(ids, list(control_ids(vlm))))
    texts = [p.chars for p in rendered.places if p.visual is None and p.chars]
    starts = np.array([first for first, _ in texts], np.int64)
    ends = np.array([last for _, last in texts], np.int64)
    for token in control:
        first, last = offsets[token]
        if ((starts < last) & (ends > first)).any() and last > first:
            raise ValueError(
                f"parts of the text together read {rendered.text[first:last]!r}, a control token "
                f"of {vlm}; put a space between them"
            )


@lru_cache(maxsize=8)
def _control_pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def control_tokens(vlm: VLM) -> re.Pattern[str]:
    """A pattern of all added tokens of the tokenizer, and of the processor's placeholders.

    Added tokens of white space (Gemma has them) are ordinary text.
    """
    added = (token.content for token in vlm.tokenizer.added_tokens_decoder.values())
    tokens = {token for token in (*added, *placeholders(vlm).values()) if not _is_blank(token)}
    return _control_pattern(frozenset(tokens))


def control_ids(vlm: VLM) -> frozenset[int]:
    """Ids of the added tokens, but for those of white space and for unknown words."""
    tokenizer = vlm.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    ids = {token_id for token_id, token in added if not _is_blank(token.content)}
    return frozenset(ids - {tokenizer.unk_token_id})


def _is_blank(token: str) -> bool:
    return not token.replace("\u2581", " ").strip()


def placeholders(vlm: VLM) -> dict[type, str]:
    """What stands for an image and for a video in the rendered text; empty for a text model."""
    named = {Image.Image: "image_token", Video: "video_token"}
    tokens = {kind: getattr(vlm.processor, name, None) for kind, name in named.items()}
    return {kind: str(token) for kind, token in tokens.items() if token and not vlm.is_text_only}


def _contents(parts: Sequence[Part], marks: Mapping[type, str], text_only: bool) -> Iterator[Any]:
    """Ways to give the parts to a template: as a list, or as one text with placeholders."""

    def piece(part: Part, marked: bool) -> str:
        if not isinstance(part, str):
            return marks[type(part) if isinstance(part, Video) else Image.Image]
        core = part.strip()
        return part.replace(core, OPEN + core + CLOSE) if marked and core else part

    def listed(marked: bool) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": piece(part, marked)}
            if isinstance(part, str)
            else {"type": "video" if isinstance(part, Video) else "image"}
            for part in parts
        ]

    def joined(marked: bool) -> str:
        texts = [isinstance(part, str) for part in parts]
        apart = ["\n" if a and b else "" for a, b in zip(texts, [*texts[1:], False], strict=True)]
        return "".join(piece(p, marked) + end for p, end in zip(parts, apart, strict=True))

    yield listed
    if text_only:
        yield joined
    else:
        yield lambda marked: [{"type": "text", "text": joined(marked)}]


def _apply(vlm: VLM, content: Any) -> str:
    text: str = vlm.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def _places(parts: Sequence[Part], marked: str, pattern: re.Pattern[str]) -> Iterator[Place]:
    """Places in the text without marks; `pattern` finds marks and placeholders in `marked`."""
    found = pattern.finditer(marked)
    marks = visuals = 0
    for part in parts:
        if isinstance(part, str) and not part.strip():
            yield Place()
            continue
        match = next(found)
        first = match.start() - marks
        if isinstance(part, str):
            yield Place((first, marked.index(CLOSE, match.end()) - marks - 1))
            marks += 2
        else:
            yield Place((first, first + len(match.group())), visuals)
            visuals += 1
