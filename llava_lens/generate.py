"""Greedy and sampled generation that equals Hugging Face's token for token, with hooks live at every step.

Unusual: the prompt is run once and then, through the KV cache, only what is new, so after the first step a hook sees
the one new position (patterns keep all keys); without the cache every step runs the whole text, picture included.
The host waits for a device once per step, to learn whether every row has ended; without stop tokens it never does.
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
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_lens.config import LlavaConfig
from llava_lens.draft import Draft, longest_row
from llava_lens.errors import LensError
from llava_lens.facts import is_whole
from llava_lens.inputs import Inputs
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
    stop = stop_ids(model, stop_tokens)
    check_prompt(prompt, max_new_tokens, model.cfg)
    reply = {"tokens": as_tokens, "text": as_text, "inputs": as_inputs}.get(return_type)
    if reply is None:
        raise LensError(f"return_type {return_type!r}: expected 'tokens', 'text' or 'inputs'")
    _ = model.tokenizer if return_type == "text" else None
    choose = Choice.of(do_sample, temperature, top_k, top_p, repetition_penalty, generator, model.cfg)
    watched = on_step is not None
    with (
        model.hooks(fwd_hooks=list(fwd_hooks)),
        Draft(model, prompt, stop, max_new_tokens, use_kv_cache, watched) as draft,
    ):
        for _ in tqdm(range(max_new_tokens), disable=not progress, desc="generate", unit="token"):
            new = draft.append(choose(draft.tokens, draft.logits()))
            if on_step is not None:
                on_step(new)
            if draft.is_finished():
                break
    return reply(model, prompt, draft)


@dataclass(frozen=True)
class Choice:
    """From logits `[batch, d_vocab]` to tokens `[batch]`, by Hugging Face's own arithmetic and in its order.

    `never [d_vocab]` is True for what is not to be written, or None.
    """

    never: Bool[Tensor, " d_vocab"] | None
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
        never, warpers = None, LogitsProcessorList()
        try:
            if repetition_penalty != 1.0:
                warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
            if cfg.image_token_id is not None and cfg.image_token_id < cfg.d_vocab:
                never = torch.arange(cfg.d_vocab, device=cfg.device) == cfg.image_token_id
            if temperature != 1.0:
                warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_k is not None:
                warpers.append(TopKLogitsWarper(top_k))
            if top_p is not None:
                warpers.append(TopPLogitsWarper(top_p))
        except ValueError as error:
            raise LensError(str(error)) from None
        return cls(never, warpers, do_sample, generator)

    def __call__(self, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]) -> Tensor:
        scores: Any = logits if self.never is None else logits.masked_fill(self.never, -torch.inf)
        if self.warpers:
            words: Any = tokens.masked_fill(tokens >= logits.shape[-1], 0)  # `<image>` may lie beyond the vocabulary
            scores = self.warpers(words, scores)
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
    longest = longest_row(prompt)
    if cfg.max_positions is not None and longest + max_new_tokens > cfg.max_positions:
        raise LensError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} make {longest + max_new_tokens}; "
            f"the context holds {cfg.n_ctx}"
        )


def as_tokens(model: Any, prompt: Inputs, draft: Draft) -> Int[Tensor, "batch pos"]:
    """Prompt and continuation."""
    return draft.tokens.contiguous()


def as_text(model: Any, prompt: Inputs, draft: Draft) -> list[str]:
    """The continuation of each row, without special tokens."""
    rows = draft.written(prompt.n_pos)
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def as_inputs(model: Any, prompt: Inputs, draft: Draft) -> Inputs:
    """Prompt and continuation as one input; what fills a row after its end is padding."""
    rows, length = draft.written(prompt.n_pos), draft.tokens.shape[1]
    mask = torch.ones_like(draft.tokens) if draft.mask is None else draft.mask[:, :length].clone()
    for i, row in enumerate(rows):
        mask[i, prompt.n_pos + len(row) :] = 0
    roles = None
    if prompt.roles is not None:
        tokenizer = None if model.processor is None else model.tokenizer
        pairs = zip(prompt.roles, rows, strict=True)
        roles = tuple(answered(said, row, tokenizer).padded(after=length - len(said) - len(row)) for said, row in pairs)
    kept = None if is_whole(mask) else mask
    return Inputs(draft.tokens.clone(), prompt.pixels, kept, roles, prompt.extras_over(length))


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
