"""TransformerLens's own sweeps on its LLaVA bridge, with the picture handed to every run."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pandas as pd
import torch
from jaxtyping import Float
from tokenizers import Tokenizer, models
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import helpers
from transformers import PreTrainedTokenizerFast

from benchmarks.baselines import Cell
from benchmarks.models import Study
from benchmarks.twins import sharing
from llava_lens import Inputs

CANNOT = {
    "knockout": "its sweeps replace one activation of one layer by the clean run's; they block no attention and take "
    "no window of layers",
    "questions": "it has no function for several prompts that share their start",
}
"""Case → why TransformerLens's API cannot do it."""


@contextlib.contextmanager
def nothing_is_installed() -> Iterator[None]:
    """Booting the bridge would install torchvision with pip where it is missing; a benchmark must not."""

    def refuse(*command: Any, **_: Any) -> Any:
        raise AssertionError(f"a subprocess was started: {command}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(helpers, "_ensure_torchvision", lambda: False))
        for name in ("check_call", "run", "Popen"):
            stack.enter_context(mock.patch.object(subprocess, name, refuse))
        yield


class Bridge:
    """The bridge with a prompt's picture bound to it: the sweeps hand on tokens alone.

    Only the last position's logits are formed, as in the Hugging Face loop; left to itself the bridge forms all. Its
    attention is eager: it allows no other where hooks may touch the pattern.
    """

    def __init__(self, study: Study):
        rewired = sharing(study.hf)  # the bridge changes the model it is given, but not its weights
        with tempfile.TemporaryDirectory() as folder, nothing_is_installed():
            rewired.config.save_pretrained(folder)
            word_tokenizer(study.size.vocab).save_pretrained(folder)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            self.bridge = TransformerBridge.boot_transformers(
                folder, hf_model=rewired, tokenizer=tokenizer, device=str(study.hf.device), dtype=study.hf.dtype
            )
        self.cfg = self.bridge.cfg
        self.study = study

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Sequence[Any]) -> Float[Tensor, "batch 1 d_vocab"]:
        """What TransformerLens's sweeps call."""
        return self.bridge.run_with_hooks(tokens, fwd_hooks=list(fwd_hooks), **self._seen(self.study.corrupt))

    @torch.inference_mode()
    def last_logits(self, inputs: Inputs) -> Float[Tensor, "batch d_vocab"]:
        """A plain forward."""
        return self.bridge(inputs.tokens, **self._seen(inputs))[:, -1]

    @torch.inference_mode()
    def cached(self, inputs: Inputs, names: Any = None) -> tuple[Float[Tensor, "batch d_vocab"], Any]:
        """The last logits, and a cache of everything or of what `names` selects."""
        logits, cache = self.bridge.run_with_cache(inputs.tokens, names_filter=names, **self._seen(inputs))
        return logits[:, -1], cache

    def clean_cache(self, activation: str) -> Any:
        """The clean run's `activation` in every layer."""
        return self.cached(self.study.clean, lambda name: name.endswith(f"hook_{activation}"))[1]

    def _seen(self, inputs: Inputs) -> dict[str, Any]:
        return {"pixel_values": inputs.pixels, "logits_to_keep": 1, "use_cache": False}

    @torch.inference_mode()
    def sweep(self, function: Any, cells: Sequence[Cell], columns: Sequence[str], clean: Any) -> Tensor:
        """One of `patching.get_act_patch_*` over the given cells."""
        with mock.patch.object(patching, "tqdm", iter):
            return function(
                self,
                self.study.corrupt.tokens,
                clean,
                lambda logits: self.study.metric(logits[:, -1]),
                index_axis_names=None,
                index_df=pd.DataFrame(list(cells), columns=list(columns)),
            )

    def patch_resid(self, cells: Sequence[Cell], clean: Any) -> Float[Tensor, " cell"]:
        """Cells `(layer, position)`."""
        return self.sweep(patching.get_act_patch_resid_pre, cells, ("layer", "pos"), clean)

    def patch_heads(self, cells: Sequence[Cell], clean: Any) -> Float[Tensor, " cell"]:
        """Cells `(layer, head)`, at all positions."""
        return self.sweep(patching.get_act_patch_attn_head_out_all_pos, cells, ("layer", "head"), clean)

    def patch_heads_last(self, cells: Sequence[Cell], clean: Any) -> Float[Tensor, " cell"]:
        """Cells `(layer, head)`, at the last position."""
        last = self.study.corrupt.n_pos - 1
        at_last = [(layer, last, head) for layer, head in cells]
        return self.sweep(patching.get_act_patch_attn_head_out_by_pos, at_last, ("layer", "pos", "head"), clean)


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One token per word, for a bridge that will not boot without a tokenizer."""
    special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>", vocab - 1: "<image>"}
    words = {special.get(i, f"w{i}"): i for i in range(vocab)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
