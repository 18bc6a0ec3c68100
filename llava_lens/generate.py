"""Greedy and sampled generation that equals Hugging Face's token for token, with hooks live at every step.

Unusual: the prompt is run once and then, through the KV cache, only what is new, so after the first step a hook sees
the one new position (patterns keep all keys); without the cache every step runs the whole text, picture included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.layers import KVCache
from llava_lens.prompt import spell
from llava_lens.roles import Roles

StopTokens = int | str | Sequence[int | str] | None
GenerateReturn = Literal["tokens", "text", "inputs"]


@torch.no_grad()
def generate(
    model: Any,
    input: Any = None,
    max_new_tokens: int = 32,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | int | None = None,
    stop_tokens: StopTokens = None,
    use_kv_cache: bool = True,
    return_type: GenerateReturn = "tokens",
    fwd_hooks: Sequence[tuple[Any, Callable[..., Any]]] = (),
    on_step: Callable[[Tensor], Any] | None = None,
    progress: bool = False,
    **named: Any,
) -> Any:
    """Continue a prompt: tokens `[batch, pos + new]`, equal to those of Hugging Face's `generate`.

    `input` is what the model itself takes (or by name: `input_ids`, `pixel_values`, `attention_mask`); rows of
    different lengths must be padded on the left. With `do_sample`, `temperature`, `top_k` and `top_p` shape the
    distribution in Hugging Face's order (its own default of `top_k=50` is not taken over), and `generator`, a
    `torch.Generator` or a seed, draws; None is torch's global one. `<image>` is never written: no picture would
    follow it (Hugging Face's `suppress_tokens`).

    A row ends after one of `stop_tokens` (ids, or strings that are one token; by default those of the checkpoint, `()`
    for none) and is then filled with the padding id, or the first stop token where there is no padding id.
    `return_type="text"` gives the new text of each row; `"inputs"` gives `Inputs` for another run, where the new
    tokens have the role `answer`.

    `fwd_hooks`, and hooks held by `model.hooks`, run at every step. With `use_kv_cache` a step after the first shows
    them only the new position, `[batch, 1, …]`, and patterns `[batch, head, 1, keys so far]`; the vision tower runs
    in the first step alone. `on_step` is called with the new tokens `[batch]` of each step.

    Raises `LensError`, before anything runs, for a text that would not fit the context, right padding, settings of
    sampling without `do_sample`, and a stop string that is not one token; `UnknownHook` for a hook that does not exist
    or never fired.
    """
    prompt = model.read_inputs(input, **named)
    stop = torch.tensor(stop_ids(model, stop_tokens), dtype=torch.long, device=prompt.tokens.device)
    check_prompt(prompt, max_new_tokens, model.cfg)
    reply = {"tokens": as_tokens, "text": as_text, "inputs": as_inputs}.get(return_type)
    if reply is None:
        raise LensError(f"return_type {return_type!r}: expected 'tokens', 'text' or 'inputs'")
    _ = model.tokenizer if return_type == "text" else None
    choose = Choice.of(do_sample, temperature, top_k, top_p, repetition_penalty, generator, model.cfg)
    draft = Draft.of(model, prompt, stop, use_kv_cache)
    with model.hooks(fwd_hooks=list(fwd_hooks)):
        for _ in tqdm(range(max_new_tokens), disable=not progress, desc="generate", unit="token"):
            new = draft.append(choose(draft.tokens, draft.logits()))
            if on_step is not None:
                on_step(new)
            if not bool(draft.unfinished.any()):
                break
    return reply(model, prompt, draft)


@dataclass
class Draft:
    """A text that grows: what it holds, how its positions count, and which rows still go on."""

    model: Any
    tokens: Int[Tensor, "batch pos"]
    pixels: Float[Tensor, "image channel height width"] | None
    attention_mask: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    unfinished: Bool[Tensor, " batch"]
    stop: Int[Tensor, " stop"]
    past: KVCache | None

    @classmethod
    def of(cls, model: Any, prompt: Inputs, stop: Int[Tensor, " stop"], use_kv_cache: bool) -> Draft:
        """The prompt alone; padding does not count as a position."""
        mask = torch.ones_like(prompt.tokens) if prompt.attention_mask is None else prompt.attention_mask.long()
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        past = KVCache(model.cfg.n_layers) if use_kv_cache else None
        going = torch.ones(prompt.batch_size, dtype=torch.bool, device=mask.device)
        return cls(model, prompt.tokens, prompt.pixels, mask, positions, going, stop, past)

    def logits(self) -> Float[Tensor, "batch d_vocab"]:
        """What the model predicts next; with a KV cache only the positions it has not seen are run."""
        seen = 0 if self.past is None else self.past.length
        inputs = Inputs(self.tokens[:, seen:], None if seen else self.pixels, self.attention_mask[:, seen:])
        logits = self.model(inputs, past_kv_cache=self.past, position_ids=self.positions[:, seen:], logits_to_keep=1)
        return logits[:, -1].float()

    def append(self, new: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Put one token behind each row (the padding id behind finished ones); returns what was put."""
        if len(self.stop):
            new = torch.where(self.unfinished, new, self.pad_id)
        self.tokens = torch.cat((self.tokens, new[:, None]), dim=-1)
        self.attention_mask = torch.cat((self.attention_mask, torch.ones_like(new)[:, None]), dim=-1)
        self.positions = torch.cat((self.positions, self.positions[:, -1:] + 1), dim=-1)
        self.unfinished = self.unfinished & ~torch.isin(new, self.stop)
        return new

    @property
    def pad_id(self) -> int:
        pad = self.model.cfg.pad_token_id
        return int(self.stop[0]) if pad is None else pad

    def written(self, start: int) -> list[list[int]]:
        """Each row's tokens from position `start` up to its stop token, that included."""
        rows = []
        for row in self.tokens[:, start:]:
            ends = torch.isin(row, self.stop).nonzero()
            rows.append(row[: int(ends[0]) + 1 if len(ends) else len(row)].tolist())
        return rows


@dataclass(frozen=True)
class Choice:
    """From logits `[batch, d_vocab]` to tokens `[batch]`, by Hugging Face's own arithmetic and in its order."""

    warpers: LogitsProcessorList
    do_sample: bool
    generator: torch.Generator | None

    @classmethod
    def of(
        cls,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float,
        generator: torch.Generator | int | None,
        cfg: LlavaConfig,
    ) -> Choice:
        """Check the settings; those of sampling raise `LensError` where nothing is sampled."""
        given = {"temperature": temperature != 1.0, "top_k": top_k is not None, "top_p": top_p is not None}
        idle = [name for name, changed in {**given, "generator": generator is not None}.items() if changed]
        if idle and not do_sample:
            raise LensError(f"{', '.join(idle)} without do_sample=True: the greedy choice does not depend on it")
        if isinstance(generator, int):
            generator = torch.Generator(cfg.device).manual_seed(generator)
        warpers = LogitsProcessorList()
        try:
            if repetition_penalty != 1.0:
                warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
            if cfg.image_token_id is not None and cfg.image_token_id < cfg.d_vocab:
                warpers.append(SuppressTokensLogitsProcessor([cfg.image_token_id], str(cfg.device)))
            if temperature != 1.0:
                warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_k is not None:
                warpers.append(TopKLogitsWarper(top_k))
            if top_p is not None:
                warpers.append(TopPLogitsWarper(top_p))
        except ValueError as error:
            raise LensError(str(error)) from None
        return cls(warpers, do_sample, generator)

    def __call__(self, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Tensor:
        words: Any = tokens.masked_fill(tokens >= logits.shape[-1], 0)  # `<image>` may lie beyond the vocabulary
        scores = self.warpers(words, logits)
        if not self.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1, generator=self.generator).squeeze(1)


def stop_ids(model: Any, stop_tokens: StopTokens) -> list[int]:
    """Ids that end a row: those given, else the checkpoint's, else the tokenizer's."""
    if stop_tokens is None:
        known = list(model.cfg.eos_token_ids)
        last = None if known or model.processor is None else model.tokenizer.eos_token_id
        return known if last is None else [last]
    asked = [stop_tokens] if isinstance(stop_tokens, int | str) else list(stop_tokens)
    ids = [model.to_single_token(token) if isinstance(token, str) else token for token in asked]
    beyond = [i for i in ids if not 0 <= i < model.cfg.d_vocab]
    if beyond:
        raise LensError(f"stop_tokens {beyond}: expected 0 … {model.cfg.d_vocab - 1}")
    return ids


def check_prompt(prompt: Inputs, max_new_tokens: int, cfg: LlavaConfig) -> None:
    """Raise `LensError` for a prompt that cannot be continued by so many tokens, or not at its end."""
    if max_new_tokens < 1:
        raise LensError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    mask = prompt.attention_mask
    if mask is not None and not bool(mask[:, -1].all()):
        rows = (mask[:, -1] == 0).nonzero()[:, 0].tolist()
        raise LensError(f"rows {rows} end in padding, where nothing can follow: pad on the left (padding_side='left')")
    longest = prompt.n_pos if mask is None else int(mask.sum(-1).max())
    if cfg.max_positions is not None and longest + max_new_tokens > cfg.max_positions:
        raise LensError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} make {longest + max_new_tokens}; "
            f"the context holds {cfg.n_ctx}"
        )


def as_tokens(model: Any, prompt: Inputs, draft: Draft) -> Int[Tensor, "batch pos"]:
    """Prompt and continuation."""
    return draft.tokens


def as_text(model: Any, prompt: Inputs, draft: Draft) -> list[str]:
    """The continuation of each row, without special tokens."""
    rows = draft.written(prompt.n_pos)
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def as_inputs(model: Any, prompt: Inputs, draft: Draft) -> Inputs:
    """Prompt and continuation as one input; what fills a row after its end is padding."""
    rows, length = draft.written(prompt.n_pos), draft.tokens.shape[1]
    mask = draft.attention_mask.clone()
    for i, row in enumerate(rows):
        mask[i, prompt.n_pos + len(row) :] = 0
    roles = None
    if prompt.roles is not None:
        tokenizer = None if model.processor is None else model.tokenizer
        pairs = zip(prompt.roles, rows, strict=True)
        roles = tuple(answered(said, row, tokenizer).padded(after=length - len(said) - len(row)) for said, row in pairs)
    return Inputs(draft.tokens, prompt.pixels, None if bool(mask.all()) else mask, roles)


def answered(roles: Roles, ids: list[int], tokenizer: Any = None) -> Roles:
    """The roles of a prompt with the tokens of an answer behind it."""
    unknown = (("",) * len(ids), "", ((0, 0),) * len(ids))
    strings, text, spans = unknown if tokenizer is None else spell(tokenizer, ids)
    start = len(roles.text) + 1
    return replace(
        roles,
        labels=roles.labels + ("answer",) * len(ids),
        tokens=roles.tokens + strings if roles.tokens else (),
        text=f"{roles.text} {text}" if roles.spans else roles.text,
        spans=roles.spans + tuple((start + a, start + b) for a, b in spans) if roles.spans else (),
    )
