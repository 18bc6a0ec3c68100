"""From a question, an optional start of the answer and a number of images to token ids with a role for each.

Unusual: the tokenizer sees the very text that Hugging Face's processor would give it, images expanded, so the ids are
the same; the spans that tell question from template are found beside it, by rendering the template a second time.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError, nearest
from llava_lens.images import ImageProcessor
from llava_lens.pictures import Layout

Span = tuple[int, int]
P = TypeVar("P", bound="Processor")
MARK = "7f3a question 7f3a"  # stands for the question to find its place in a template


@dataclass(frozen=True)
class Processor:
    """A checkpoint's tokenizer, image processor (None without a tower) and chat template (None: Vicuna's).

    A subclass names its `Images`, and overrides `expansion` or `render` where its prompts are written differently.
    """

    Images: ClassVar[type[ImageProcessor]] = ImageProcessor

    tokenizer: Any
    image: ImageProcessor | None = None
    chat_template: str | None = None
    image_token: str = "<image>"

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise LensError(
                f"a tokenizer of type {type(self.tokenizer).__name__}; expected a fast one (tokenizer.json)"
            )

    @classmethod
    def from_pretrained(cls: type[P], source: str | Path, cfg: LlavaConfig, **kwargs: Any) -> P:
        """Read a checkpoint's folder or hub name; `kwargs` (revision, local_files_only …) go to transformers.

        A release without image settings gets CLIP's at the tower's size, padded to a square where its config says so.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        whole = _json_of(source, "processor_config.json", **kwargs)
        settings = whole.get("image_processor") or _json_of(source, "preprocessor_config.json", **kwargs)
        if not settings and _json_of(source, "config.json", **kwargs).get("image_aspect_ratio") == "pad":
            settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        template = _text_of(source, "chat_template.jinja", **kwargs)
        template = template or _json_of(source, "chat_template.json", **kwargs).get("chat_template")
        template = template or whole.get("chat_template") or tokenizer.chat_template
        word = whole.get("image_token") or getattr(tokenizer, "image_token", None) or cls.image_token
        return cls(tokenizer, cls.image_processor(settings, cfg), template, word)

    @classmethod
    def from_hf(cls: type[P], hf: Any, cfg: LlavaConfig) -> P:
        """Wrap a `LlavaProcessor` of transformers, or a tokenizer alone (then CLIP's settings at the tower's size)."""
        if isinstance(hf, cls):
            return hf
        tokenizer = getattr(hf, "tokenizer", None) or hf
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise LensError(f"a processor of type {type(hf).__name__}; expected a LlavaProcessor or a tokenizer")
        template = getattr(hf, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        image = cls.image_processor(getattr(hf, "image_processor", None) or {}, cfg)
        return cls(tokenizer, image, template, getattr(hf, "image_token", None) or cls.image_token)

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        """The image processor with these settings (or around this one of transformers); None without a tower."""
        if cfg.vision is None:
            return None
        if not settings or isinstance(settings, dict):
            side = cfg.vision.image_size
            settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} | (
                settings or {}
            )
        return cls.Images(settings, cfg.vision.image_size, cfg.vision.patch_size * cfg.vision.merge)

    def layout(self, image: Image.Image, cfg: LlavaConfig) -> Layout:
        """How an image stands in a prompt. Raises `LensError` as `load_image` does for a size that is no use."""
        assert self.image is not None
        return self.image.layout(image.size, cfg)

    def layouts(self, images: Sequence[Image.Image], cfg: LlavaConfig) -> list[Layout]:
        """How the images of one prompt stand in it; a subclass says it where one image depends on the others."""
        return [self.layout(image, cfg) for image in images]

    def pixels(self, rows: Sequence[Sequence[Image.Image]]) -> Float[np.ndarray, "picture channel y x"]:
        """Pixel values of every picture of the images of some prompts, in order."""
        assert self.image is not None
        return self.image.pixels([image for images in rows for image in images])

    def extras(self, images: Sequence[Image.Image], inputs: Any, cfg: LlavaConfig) -> dict[str, Tensor]:
        """What the model needs beside tokens and pixel values, by Hugging Face's names."""
        return {}

    def expansion(self, layout: Layout) -> str:
        """What an image's placeholder is replaced by in the text: a word for each of its tokens."""
        return self.image_token * layout.n_tokens

    def render(self, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
        """The text of a prompt, each image one placeholder."""
        return render(self, question, n_images, answer, template)

    def knows_image_token(self, cfg: LlavaConfig) -> bool:
        """Whether the tokenizer has a word for an image; raises `LensError` if it is not the config's."""
        token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        token_id = None if token_id == self.tokenizer.unk_token_id else token_id
        if token_id is not None and cfg.image_token_id is not None and token_id != cfg.image_token_id:
            raise LensError(
                f"the tokenizer's {self.image_token} is {token_id}, the config's image_token_id {cfg.image_token_id}"
            )
        return token_id is not None


def _text_of(source: str | Path, name: str, **kwargs: Any) -> str | None:
    from transformers.utils import cached_file

    found = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **kwargs,
    )  # fmt: skip
    return Path(found).read_text(encoding="utf-8") if found else None


def _json_of(source: str | Path, name: str, **kwargs: Any) -> dict[str, Any]:
    return json.loads(_text_of(source, name, **kwargs) or "{}")


class Prompt(NamedTuple):
    """A rendered prompt, each image one placeholder, and where the question and the given answer stand in it."""

    text: str
    question: Span
    answer: Span

    def label(self, start: int, end: int) -> str:
        """The role of a token that covers these characters; one without characters belongs to where it stands."""
        end = max(end, start + 1)
        for name, (first, stop) in (("answer", self.answer), ("question", self.question)):
            if start < stop and first < end:
                return name
        return "system" if start < self.question[0] else "template"


def render(processor: Processor, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
    """Put a question into the chat template (or take it as the whole prompt) and let the answer's start follow.

    Without a placeholder in the question, one per image is put in front. Raises `LensError` for an empty question and
    for a number of placeholders that is not the number of images.
    """
    if not question.strip():
        raise LensError(f"an empty question ({question!r}); expected some text")
    token = processor.image_token
    given = question.count(token)
    if given != n_images and (given or not template):
        raise LensError(
            f"{given} {token} in {question!r}, but {n_images} image{'s' * (n_images != 1)} given; expected as many"
            + (f", or no {token} at all: one per image is then put in front" if template else "")
        )
    text, span, start = _in_template(processor, question, n_images) if template else _verbatim(question)
    answer = answer.lstrip()
    if answer:
        text += answer if text[-1:].isspace() else f" {answer}"
    return Prompt(text, _trimmed(text, span, token), (min(start, len(text) - len(answer)), len(text)))


def _trimmed(text: str, span: Span, token: str) -> Span:
    """The span without the placeholders and white space at its ends."""
    said = text[slice(*span)]
    while said != (inner := said.strip().removeprefix(token).removesuffix(token)):
        said = inner
    start = text.index(said, span[0])
    return start, start + len(said)


def _verbatim(prompt: str) -> tuple[str, Span, int]:
    """A whole prompt, its question, and where its answer starts: around the last `ASSISTANT:` in Vicuna's form."""
    form = re.fullmatch(r".*USER:(.*?)(?:ASSISTANT:\s*(.*))?", prompt, re.DOTALL)
    if form is None:
        return prompt, (0, len(prompt)), len(prompt)
    return prompt, form.span(1), form.start(2) if form[2] else len(prompt)


def _in_template(processor: Processor, question: str, n_images: int) -> tuple[str, Span, int]:
    """The rendered template, the question in it, and its end, where the answer starts."""
    token = processor.image_token
    for as_parts in (True, False):
        shell = _chat(processor, MARK, n_images if token not in question else 0, as_parts)
        text = _chat(processor, question, n_images if token not in question else 0, as_parts)
        if shell.count(MARK) != 1 or "'type': 'text'" in shell or text.count(token) != n_images:
            continue
        before, after = shell.split(MARK)
        for said in (question, question.strip()):
            if text == before + said + after:
                return text, (len(before), len(before) + len(said)), len(text)
    raise LensError(
        f"the chat template does not keep the question and its {n_images} {token}; "
        "write the whole prompt and pass template=False"
    )


def _chat(processor: Processor, question: str, n_images: int, as_parts: bool) -> str:
    """One user's turn and the opening of the assistant's; "" if the template cannot take content of this form."""
    from jinja2 import TemplateError

    flat = f"{processor.image_token}\n" * n_images + question
    if processor.chat_template is None:
        return f"USER: {flat} ASSISTANT:"
    parts = [*[{"type": "image"}] * n_images, {"type": "text", "text": question}]
    try:
        return processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts if as_parts else flat}],
            chat_template=processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError):
        return ""


class Encoded(NamedTuple):
    """Token ids with each token's characters in the prompt's text; an image's tokens all cover its placeholder."""

    ids: list[int]
    spans: list[Span]


def encode(processor: Processor, prompt: Prompt, cfg: LlavaConfig, layouts: Sequence[Layout] | None = None) -> Encoded:
    """Tokenize a prompt, each placeholder expanded to the image's tokens. Raises `LensError` for unknown words.

    `layouts` are those of the images, in order; without them every image stands as `cfg.layout()` says.
    """
    bos = processor.tokenizer.bos_token
    special = not (bos and prompt.text.startswith(bos))
    if layouts is None:
        count = prompt.text.count(processor.image_token) if cfg.vision is not None else 0
        layouts = [cfg.layout()] * count if count else []
    known = processor.knows_image_token(cfg)
    encoded = (_encode_whole if known else _encode_chunks)(processor, prompt.text, cfg, special, layouts)
    _refuse_unknown(processor.tokenizer, prompt.text, encoded)
    return encoded


def _encode_whole(
    processor: Processor, text: str, cfg: LlavaConfig, special: bool, layouts: Sequence[Layout]
) -> Encoded:
    """For a tokenizer with a word for an image: all in one go, as Hugging Face does."""
    token = processor.image_token
    expanded, at = "", 0
    edges: list[int] = [0]
    kept: list[tuple[int, Span | None]] = [(0, None)]  # of each stretch of the expanded text: its shift, or placeholder
    for match, layout in zip(re.finditer(re.escape(token), text), layouts, strict=False):
        expanded += text[at : match.start()]
        edges.append(len(expanded))
        kept.append((0, match.span()))
        expanded, at = expanded + processor.expansion(layout), match.end()
        edges.append(len(expanded))
        kept.append((at - len(expanded), None))
    ids, spans = _call(processor.tokenizer, expanded + text[at:], special)
    for i, (start, end) in enumerate(spans):
        shift, placeholder = kept[bisect_right(edges, start) - 1] if start < end else (0, None)
        spans[i] = placeholder or (start + shift, end + shift)
    return Encoded(ids, _placed(spans))


def _encode_chunks(
    processor: Processor, text: str, cfg: LlavaConfig, special: bool, layouts: Sequence[Layout]
) -> Encoded:
    """For a vocabulary without such a word: the text between images one by one, as the original release does."""
    ids: list[int] = []
    spans: list[Span] = []
    at = 0
    for i, chunk in enumerate(text.split(processor.image_token)):
        if i:
            n = layouts[i - 1].n_tokens if i <= len(layouts) else 0
            ids += [cfg.image_token_id or 0] * n
            spans += [(at - len(processor.image_token), at)] * n
        if chunk or not i:
            new_ids, new_spans = _call(processor.tokenizer, chunk, special)
            skip = int(bool(i) and special and new_ids[:1] == [processor.tokenizer.bos_token_id])
            ids += new_ids[skip:]
            spans += [(start + at, end + at) for start, end in new_spans[skip:]]
        at += len(chunk) + len(processor.image_token)
    return Encoded(ids, _placed(spans))


def _call(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[Span]]:
    out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return list(out["input_ids"]), [tuple(span) for span in out["offset_mapping"]]


def _placed(spans: list[Span]) -> list[Span]:
    """Tokens without characters (`<s>`, say) get the place where the token before them ended."""
    placed, at = [], 0
    for start, end in spans:
        placed.append((start, end) if start < end else (at, at))
        at = placed[-1][1]
    return placed


def _refuse_unknown(tokenizer: Any, text: str, encoded: Encoded) -> None:
    unknown = tokenizer.unk_token_id
    words = [text[slice(*span)] for i, span in zip(encoded.ids, encoded.spans, strict=True) if i == unknown]
    words = [word for word in dict.fromkeys(words) if word and word != tokenizer.unk_token]
    if not words:
        return
    vocabulary = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    hints = [f"{word!r}{nearest(word.lower(), vocabulary)}" for word in words]
    raise LensError(
        f"words that the tokenizer does not know: {' | '.join(hints)} | in {text!r}; it knows {len(vocabulary)} words"
    )


def spell(tokenizer: Any, ids: list[int]) -> tuple[tuple[str, ...], str, tuple[Span, ...]]:
    """The strings of ready-made tokens, a text that they spell, and each token's place in it."""
    known = len(tokenizer)
    strings = tuple(tokenizer.convert_ids_to_tokens(i) if 0 <= i < known else "" for i in ids)
    marked = any(string.startswith(("▁", "Ġ")) for string in strings)  # else one token per word
    text, spans = "", []
    for string in strings:
        if string.startswith(("▁", "Ġ")) or (text and not marked):
            text += " "
        spans.append((len(text), len(text) + len(string.lstrip("▁Ġ"))))
        text += string.lstrip("▁Ġ")
    return strings, text, tuple(spans)
