"""Random LLaVAs of several sizes, and studies on them: a clean and a corrupt prompt, a metric, an exact twin.

Unusual: the weights are made on the device and are there once. Where a path of ours lays them out anew (queries, keys
and values in one matrix, say), all other models take views of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_lens import HookedLlava, Inputs
from llava_lens.rename import LLAVA_TABLE, look_up

PATHS = ("reference", "fused")
"""How our forward can be run; the last is the one that works in a layout of its own."""
FIRST_WORD = 4
"""Token ids below are `<pad> <s> </s> <unk>`; the last id of the vocabulary is `<image>`."""


@dataclass(frozen=True)
class Size:
    """A model's and a prompt's dimensions; `before`, `question` and `after` count the prompt's words."""

    name: str
    layers: int
    d_model: int
    d_mlp: int
    heads: int
    kv_heads: int
    vocab: int
    grid: int
    tower_layers: int
    tower_d_model: int
    tower_heads: int
    images: int = 1
    before: int = 4
    question: int = 12
    after: int = 7

    @property
    def image_token(self) -> int:
        return self.vocab - 1

    @property
    def positions(self) -> int:
        """Length of the prompt, `<s>` included."""
        return 1 + self.before + self.images * self.grid**2 + self.question + self.after

    def __str__(self) -> str:
        shape = f"{self.layers} layers, d_model {self.d_model}, {self.heads} heads, vocabulary {self.vocab}"
        return f"{self.name}: {shape}, {self.positions} positions ({self.images} × {self.grid**2} of images)"


SIZES = {
    "toy": Size("toy", 3, 64, 112, 4, 2, 97, 3, 3, 48, 3, before=2, question=5, after=2),
    "bench": Size("bench", 16, 384, 1024, 16, 16, 8192, 8, 4, 128, 2),
    "gemm": Size("gemm", 8, 1024, 2816, 8, 8, 8192, 22, 4, 192, 3, question=16),
    "tower": Size("tower", 1, 1024, 2816, 8, 8, 97, 24, 7, 512, 8),
    "7b": Size("7b", 32, 4096, 11008, 32, 32, 32064, 24, 24, 1024, 16, question=28),
}
"""The towers of `bench` and `gemm` take a few per cent of a forward, as the real one's does; products of matrices are
most of the work of `gemm` and `tower`. `7b` is LLaVA-1.5-7B but for the side of a patch (8 pixels instead of 14)."""


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that every part matters, gains and biases included."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, weight in model.named_parameters():
        generator = generators.setdefault(weight.device, torch.Generator(weight.device).manual_seed(seed))
        noise = torch.randn(weight.shape, generator=generator, device=weight.device).to(weight)
        gain = "norm" in name and name.endswith("weight")
        weight.copy_(1 + 0.2 * noise if gain else noise * (0.1 if weight.ndim == 1 else 1.2 / weight.shape[-1] ** 0.5))


def random_hf(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random `LlavaForConditionalGeneration` with sdpa attention; equal arguments give equal weights."""
    text = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.d_model,
        intermediate_size=size.d_mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    )
    tower = CLIPVisionConfig(
        hidden_size=size.tower_d_model,
        intermediate_size=4 * size.tower_d_model,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=size.tower_heads,
        image_size=8 * size.grid,
        patch_size=8,
    )
    config = LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=size.image_token, image_seq_length=size.grid**2
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    shake(model)
    return model.eval()


@lru_cache(maxsize=1)
def build(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, HookedLlava]]:
    """A Hugging Face model, and ours by path over the same memory; equal arguments give equal weights."""
    hf = random_hf(size, device, dtype)
    models = {path: HookedLlava.from_hf(hf) for path in PATHS if path == PATHS[0] or hasattr(HookedLlava, "use")}
    for path, model in models.items():
        use: Any = getattr(model, "use", None)
        if use is not None:
            use(path)
    *others, owner = models.values()
    with torch.inference_mode():  # weights may be laid out anew only in the first run
        pixels = torch.zeros(size.images, 3, 8 * size.grid, 8 * size.grid, device=device, dtype=dtype)
        owner(prompt(size, torch.Generator().manual_seed(0)).to(device), pixel_values=pixels, logits_to_keep=1)
    share(owner, others, hf)
    return hf, models


@torch.no_grad()
def share(owner: HookedLlava, others: Sequence[HookedLlava], hf: Any) -> None:
    """Let everybody's weights be views of the owner's, wherever it has put them; the values stay."""
    held = dict(owner.named_parameters())
    for other in others:
        for name, weight in other.named_parameters():
            weight.data = held[name].data
    for name, weight in hf.named_parameters():
        ours = look_up(name, LLAVA_TABLE)
        if ours in held:
            weight.data = held[ours].data


def bytes_of(models: Iterable[torch.nn.Module]) -> int:
    """Bytes behind the parameters and buffers of some models, memory that they share counted once."""
    tensors = (each for model in models for each in (*model.parameters(), *model.buffers()))
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@dataclass(frozen=True, eq=False)
class Study:
    """Two prompts of one length on one model, and two tokens whose logits are compared.

    `paths` are ours by name; `model` is the one that a user gets, the last of them.
    """

    size: Size
    hf: Any
    paths: dict[str, HookedLlava]
    clean: Inputs
    corrupt: Inputs
    a: int
    b: int

    @property
    def model(self) -> HookedLlava:
        """What a user gets."""
        return list(self.paths.values())[-1]

    @property
    def reference(self) -> HookedLlava:
        """The path that repeats Hugging Face's operations one for one."""
        return self.paths[PATHS[0]]

    @property
    def variants(self) -> dict[str, HookedLlava]:
        """Ours by the name that rows call them."""
        return {f"llava_lens {path}": model for path, model in self.paths.items()}

    @property
    def missing(self) -> dict[str, str]:
        """Paths that this version does not have, and why they are left out."""
        return {f"llava_lens {path}": "this version has no such path" for path in PATHS if path not in self.paths}

    def metric(self, last: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, ""]:
        """The difference of the two tokens' logits at the last position."""
        return last[0, self.a] - last[0, self.b]

    @property
    def image(self) -> list[int]:
        """The positions of all pictures."""
        return self.corrupt.positions("image").tolist()

    @property
    def words(self) -> list[int]:
        """The positions of the question's words."""
        start = 1 + self.size.before + self.size.images * self.size.grid**2
        return list(range(start, start + self.size.question))


def make_study(
    size: Size,
    differ: Literal["picture", "words"] = "picture",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Study:
    """Clean and corrupt differ in the picture alone, or in three words of the question alone."""
    hf, paths = build(size, device, dtype)
    cfg = paths[PATHS[0]].cfg
    generator = torch.Generator().manual_seed(1)
    tokens = prompt(size, generator)
    pixels = torch.randn(size.images, 3, 8 * size.grid, 8 * size.grid, generator=generator)
    other_tokens, other_pixels = tokens.clone(), pixels
    if differ == "picture":
        other_pixels = torch.randn(pixels.shape, generator=generator)
    else:
        third = 1 + size.before + size.images * size.grid**2 + size.question // 4
        swapped = tokens[0, third : third + 3] - FIRST_WORD
        other_tokens[0, third : third + 3] = FIRST_WORD + (swapped + 1) % (size.image_token - FIRST_WORD)
    clean, corrupt = (
        Inputs.from_tokens(t.to(device), cfg, p.to(device, dtype))
        for t, p in ((tokens, pixels), (other_tokens, other_pixels))
    )
    return Study(size, hf, paths, clean, corrupt, FIRST_WORD + 1, FIRST_WORD + 2)


def prompt(size: Size, generator: torch.Generator, question: int | None = None) -> Tensor:
    """`<s>`, words, the pictures, a question and words behind it, `[1, pos]`."""
    count = size.before + (size.question if question is None else question) + size.after
    words = torch.randint(FIRST_WORD, size.image_token, (count,), generator=generator)
    pictures = torch.full((size.images * size.grid**2,), size.image_token)
    return torch.cat((torch.tensor([1]), words[: size.before], pictures, words[size.before :]))[None]


def batch_of(study: Study, count: int) -> Inputs:
    """Prompts of one length, each with words and pictures of its own."""
    size, generator, like = study.size, torch.Generator().manual_seed(3), study.clean.pixels
    assert like is not None
    tokens = torch.cat([prompt(size, generator) for _ in range(count)])
    pixels = torch.randn(count * size.images, *like.shape[1:], generator=generator)
    return Inputs(tokens.to(like.device), pixels.to(like))


def questions(study: Study, count: int = 5) -> list[Inputs]:
    """Questions of different lengths on the clean picture, all with the same words in front of it."""
    size, generator = study.size, torch.Generator().manual_seed(2)
    pixels, first = study.clean.pixels, study.clean.tokens[:, : 1 + size.before]
    made = []
    for i in range(count):
        tokens = prompt(size, generator, max(1, size.question + 2 * (i - count // 2))).to(first.device)
        tokens[:, : 1 + size.before] = first
        made.append(Inputs.from_tokens(tokens, study.model.cfg, pixels))
    return made
