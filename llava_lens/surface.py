"""TransformerLens's weight and token surface for a model with `embed`, `blocks`, `ln_final`, `unembed`.

Unusual: the final norm's gain goes into the residual *directions*, because no weight is folded; key and value weights
keep their own number of heads under grouped-query attention (`QK` and `OV` share them out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from llava_lens.errors import LensError, nearest
from llava_lens.kernels import repeat_heads
from llava_lens.layers import accumulated_bias
from llava_lens.prompt import Prompt, encode


class TransformerLensSurface:
    """What TransformerLens users reach for on a model. Stacked weights are copies; `blocks[i].attn.W_Q` is a view."""

    cfg: Any
    processor: Any
    embed: nn.Embedding
    unembed: nn.Linear
    ln_final: Any
    blocks: nn.ModuleList

    def _stack(self, pick: Callable[[Any], Tensor]) -> Tensor:
        return torch.stack([pick(block) for block in self.blocks])

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.unembed.weight.new_zeros(self.cfg.d_vocab)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        return self._stack(lambda block: block.attn.W_Q)

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._stack(lambda block: block.attn.W_K)

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        return self._stack(lambda block: block.attn.W_V)

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stack(lambda block: block.attn.W_O)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack(lambda block: block.mlp.W_in)

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """The gate weights, None where the MLP has no gate."""
        return self._stack(lambda block: block.mlp.W_gate) if self.cfg.gated_mlp else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stack(lambda block: block.mlp.W_out)

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        return self._stack(lambda block: block.attn.b_Q)

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._stack(lambda block: block.attn.b_K)

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        return self._stack(lambda block: block.attn.b_V)

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stack(lambda block: block.attn.b_O)

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stack(lambda block: block.mlp.b_in)

    @property
    def b_gate(self) -> Float[Tensor, "layer d_mlp"] | None:
        """The gate's biases, None where the MLP has no gate."""
        return self._stack(lambda block: block.mlp.b_gate) if self.cfg.gated_mlp else None

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stack(lambda block: block.mlp.b_out)

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_Kᵀ` of every head, `[layer, head, d_model, d_model]`, without rotary positions."""
        return FactoredMatrix(self.W_Q, self._shared(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` of every head, `[layer, head, d_model, d_model]`."""
        return FactoredMatrix(self._shared(self.W_V), self.W_O)

    def _shared(self, weight: Tensor) -> Tensor:
        return repeat_heads(weight, self.cfg.n_heads // self.cfg.n_key_value_heads)

    def all_head_labels(self) -> list[str]:
        """`L0H0, L0H1, …`, layer by layer."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases in the stream before `layer` (before its MLP with `mlp_input`)."""
        return accumulated_bias(self.blocks, layer, mlp_input, include_mlp_biases)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; raises when the model came without one."""
        if self.processor is None:
            raise LensError("this model has no tokenizer; give a processor: HookedLlava.from_hf(model, processor)")
        return self.processor.tokenizer

    def to_tokens(self, text: str | list[str], prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids of a text as it stands (no template), `<image>` expanded, on the model's device.

        `prepend_bos` None leaves the first token to the tokenizer. Rows of several texts are padded on the right, as in
        TransformerLens: causal attention then never looks at padding, even where a tool drops the mask. To generate
        for several texts, which takes left padding, use `prepare`. Raises `LensError` for unknown words.
        """
        return self.encode_text(text, prepend_bos)[0]

    def encode_text(
        self, text: str | list[str], prepend_bos: bool | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """`to_tokens` and the padding mask that goes with it, None where nothing is padded."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(each, str) for each in texts):
            raise LensError(f"expected a text or several, got {text!r}")
        rows = [self._encode_row(each, prepend_bos) for each in texts]
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        tokens = torch.full((len(rows), max(map(len, rows))), next(i for i in known if i is not None))
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        device = self.cfg.device
        return tokens.to(device), None if bool(mask.all()) else mask.to(device)

    def _encode_row(self, text: str, prepend_bos: bool | None) -> list[int]:
        tokenizer, token = self.tokenizer, self.processor.image_token
        if token in text and self.cfg.vision is None:
            raise LensError(f"{token} in {text!r}, but this model has no vision tower")
        ids = encode(self.processor, Prompt(text, (0, len(text)), (-1, -1)), self.cfg).ids
        bos, starts = tokenizer.bos_token_id, text.startswith(tokenizer.bos_token or "\0")
        if prepend_bos and ids[:1] != [bos]:
            if bos is None:
                raise LensError("prepend_bos=True, but the tokenizer has no token that begins a text")
            return [bos, *ids]
        return ids[1:] if prepend_bos is False and ids[:1] == [bos] and not starts else ids

    def to_string(self, tokens: Tensor | list[int]) -> Any:
        """Text of tokens `[pos]`, or a list of texts for `[batch, pos]`."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return [self.tokenizer.decode(row) for row in ids.tolist()]
        return self.tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(self, text: str | Tensor, prepend_bos: bool | None = None) -> list[str]:
        """Each token as a string."""
        ids = text.reshape(-1) if isinstance(text, Tensor) else self.to_tokens(text, prepend_bos)[0]
        return [self.token_string(int(token)) for token in ids]

    def token_string(self, token: int) -> str:
        """One token as a string; `<image>` for the placeholder also where the vocabulary lacks it."""
        return "<image>" if token == self.cfg.image_token_id else self.tokenizer.decode([token])

    def word_ids(self, string: str) -> list[int]:
        """The ids of a string as a text goes on with it: one word is one token, however the tokenizer marks it.

        "Yes" and " Yes" are the same word to a tokenizer that puts a blank before every text. A token with its mark, as
        labels show it ("▁Yes", "Ġgreen"), is that token.
        """
        tokenizer = self.tokenizer
        ids = list(tokenizer(string, add_special_tokens=False)["input_ids"])
        if string.startswith(" ") and len(ids) > 1:
            first, second = tokenizer.convert_ids_to_tokens(ids[:2])
            return ids[1:] if first == "▁" and second.startswith("▁") else ids
        named = self._vocabulary_id(string) if len(ids) > 1 and string.startswith(("▁", "Ġ")) else None
        return ids if named is None else [named]

    def _vocabulary_id(self, token: str) -> int | None:
        """The id of a token by the vocabulary's own spelling."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        return None if found is None or found == self.tokenizer.unk_token_id else found

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token, as `word_ids` reads it; raises with pieces and nearest words if not."""
        ids = self.word_ids(string)
        unknown = ids == [self.tokenizer.unk_token_id] and string != self.tokenizer.unk_token
        if len(ids) != 1 or unknown:
            pieces = self.tokenizer.convert_ids_to_tokens(ids)
            own = self._vocabulary_id(string)
            hint = f"; the vocabulary's own is token {own}"
            hint = nearest(string, self.tokenizer.get_vocab()) if own is None else hint
            count = f"{len(ids)} token{'s' * (len(ids) != 1)}"
            raise LensError(f"{string!r} is {count} {pieces}, expected one that is in the vocabulary{hint}")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        return self.token_string(token)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """Direction whose product with the normalised final stream is the token's logit: `ln_final.w ∘ W_U[:, t]`."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.cfg.device)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.d_vocab:
            raise LensError(f"token {ids.tolist()}: expected 0 … {self.cfg.d_vocab - 1}")
        ids = ids.squeeze(0) if ids.ndim == 1 and len(ids) == 1 else ids
        return self.unembed.weight[ids] * self.ln_final.w
