"""The parts that both towers are built from: rotary positions, attention, MLPs and the pre-norm block.

Unusual: values that a fast forward never forms (scores, pattern, per-head result) are computed only when
somebody listens, and are spliced back into the forward only where a listener changed them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lens import derived, kernels
from llava_lens.config import ACTIVATIONS, DecoderConfig, TowerConfig
from llava_lens.hooks import Hook, splice
from llava_lens.norms import Stream

Heads = Float[Tensor, "batch pos head d_head"]


class Mask(NamedTuple):
    """Which keys a query may see: `allowed` where given, else all of them, or the earlier ones if `causal`."""

    allowed: Tensor | None = None
    causal: bool = False


class Angles(NamedTuple):
    """Rotary cosines and sines, `[#batch, 1, pos, d_head]` each."""

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Cosines and sines for token positions, in float32 whatever the model's dtype is, for every rope scaling."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.cfg = cfg
        self._frequencies: dict[int | None, tuple[Tensor, float]] = {}

    def forward(self, positions: Int[Tensor, "#batch pos"], dtype: torch.dtype) -> Angles:
        length = self.cfg.rope_length(int(positions.max()) + 1) if self._depends_on_length else None
        if length not in self._frequencies:
            self._frequencies[length] = self.cfg.rope_frequencies(length)
        inv_freq, factor = self._frequencies[length]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inv_freq = inv_freq.to(positions.device, wide)
        angles = positions[:, None, :, None].to(wide) * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return Angles((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))

    @property
    def _depends_on_length(self) -> bool:
        return self.cfg.rope.get("rope_type", "default") in ("dynamic", "longrope")


class KVCache:
    """Rotated keys and values of the tokens seen so far, `[batch, kv_head, pos, d_head]` per layer."""

    def __init__(self, n_layers: int):
        self.entries: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.attention_mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions held, by any layer (a run that starts at a later one leaves the earlier ones empty)."""
        return next((entry[0].shape[2] for entry in self.entries if entry is not None), 0)

    def extend_mask(self, mask: Tensor | None, new: Int[Tensor, "batch pos"] | Stream) -> Tensor | None:
        """The mask `[batch, past + pos]`; one of the new positions alone, or None, goes behind the remembered one."""
        past, (batch, length) = self.attention_mask, new.shape[:2]
        if self.length and not (mask is None and past is None) and (mask is None or mask.shape[1] == length):
            mask = torch.ones(batch, length, dtype=torch.long, device=new.device) if mask is None else mask
            past = mask.new_ones(batch, self.length) if past is None else past
            mask = torch.cat((past, mask), dim=-1)
        self.attention_mask = mask
        return mask

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; returns all of them."""
        held = self.entries[layer]
        if held is not None:
            k, v = torch.cat((held[0], k), dim=2), torch.cat((held[1], v), dim=2)
        self.entries[layer] = (k, v)
        return k, v

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Mix the values of all positions, those held and the new ones, which are held from now on."""
        k, v = self.extend(attention.layer, k, v)
        return attention.attend(q, k, v, mask)


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads. Weights keep the checkpoint's layout; `W_*` are views."""

    def __init__(self, cfg: TowerConfig, layer: int):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.implementation = "sdpa"
        width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
        self.q_proj = nn.Linear(cfg.d_model, width, bias=cfg.attn_bias)
        self.k_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.attn_bias)
        self.v_proj = nn.Linear(cfg.d_model, kv_width, bias=cfg.attn_bias)
        self.o_proj = nn.Linear(width, cfg.d_model, bias=cfg.attn_bias)
        self.hook_q = Hook("batch pos head d_head")
        self.hook_k = Hook("batch pos kv_head d_head")
        self.hook_v = Hook("batch pos kv_head d_head")
        if isinstance(cfg, DecoderConfig):
            self.hook_rot_q = Hook("batch pos head d_head")
            self.hook_rot_k = Hook("batch pos kv_head d_head")
        self.hook_attn_scores = Hook("batch head query key")
        self.hook_pattern = Hook("batch head query key")
        self.hook_z = Hook("batch pos head d_head")
        self.hook_result = Hook("batch pos head d_model")

    def forward(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        q = self.hook_q(self._split(self.q_proj(x))).transpose(1, 2)
        if angles is not None:
            q = self.hook_rot_q(kernels.rotate(q, *angles).transpose(1, 2)).transpose(1, 2)
        k, v = self.keys_and_values(x, angles)
        z = self.attend(q, k, v, mask) if past is None else past.attend(self, q, k, v, mask)
        return self.output(self.hook_z(z.transpose(1, 2).contiguous()))

    def keys_and_values(self, x: Stream, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of normed rows, `[batch, kv_head, pos, d_head]` each."""
        k = self.hook_k(self._split(self.k_proj(x))).transpose(1, 2)
        v = self.hook_v(self._split(self.v_proj(x))).transpose(1, 2)
        if angles is not None:
            k = self.hook_rot_k(kernels.rotate(k, *angles).transpose(1, 2)).transpose(1, 2)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Float[Tensor, "batch head query d_head"]:
        """Mix the values; scores and pattern are formed for listeners, or because the eager path needs them."""
        eager = self.implementation == "eager"
        fast = None if eager else kernels.attention(q, k, v, self.scale, *mask)
        if fast is not None and not (self.hook_attn_scores.live or self.hook_pattern.live):
            return fast
        decoders = eager and hasattr(self, "hook_rot_k")
        how = dict(uniform=eager, contiguous=decoders)
        scores_of, pattern_of = (
            partial(derived.attention, kind, q, k, self.scale, *mask, **how) for kind in ("scores", "pattern")
        )
        if fast is not None and not (self.hook_attn_scores.needs_value or self.hook_pattern.needs_value):
            self.hook_attn_scores.offer(scores_of)
            self.hook_pattern.offer(pattern_of)
            return fast
        if decoders:
            k, v = k.contiguous(), v.contiguous()  # as Hugging Face's always present cache lays them out
        scores = kernels.attention_scores(q, k, self.scale, *mask, uniform_dead_rows=eager)
        before = kernels.attention_pattern(scores)
        seen, touched_scores = self.hook_attn_scores.look(scores, scores_of)
        after = kernels.attention_pattern(seen) if touched_scores else before
        after, touched_pattern = self.hook_pattern.look(after, None if touched_scores else pattern_of)
        if fast is None:
            return kernels.mix_values(after, v)
        if not (touched_scores or touched_pattern):
            return fast
        return splice(fast, kernels.mix_values(after, v), before, after)

    def output(self, z: Heads) -> Stream:
        """What the heads' mixtures add to the stream."""
        out = self.o_proj(z.reshape(*z.shape[:-2], -1))
        if not self.hook_result.needs_value:
            self.hook_result.offer(lambda: derived.result(z, self.o_proj.weight))
            return out
        before = derived.per_head(z, self.W_O)
        after, touched = self.hook_result.look(before)
        return splice(out, after.sum(-2) + self.b_O, before, after, over=2) if touched else out

    def _split(self, x: Tensor) -> Heads:
        return x.view(*x.shape[:-1], -1, self.cfg.d_head)

    @property
    def scale(self) -> float:
        """Factor on the dot products, 1/√d_head."""
        return self.cfg.d_head**-0.5

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(self.q_proj.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return rearrange(self.k_proj.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return rearrange(self.v_proj.weight, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return rearrange(self.o_proj.weight, "d_model (head d_head) -> head d_head d_model", d_head=self.cfg.d_head)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self._head_bias(self.q_proj)

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return self._head_bias(self.k_proj)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return self._head_bias(self.v_proj)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return bias_of(self.o_proj)

    def _head_bias(self, linear: nn.Linear) -> Tensor:
        return rearrange(bias_of(linear), "(head d_head) -> head d_head", d_head=self.cfg.d_head)


class MLP(nn.Module):
    """`act(x W_in) W_out`, as in the vision tower."""

    def __init__(self, cfg: TowerConfig):
        super().__init__()
        self.act = ACTIVATIONS[cfg.act_fn]
        self.in_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.out_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.hook_pre = Hook("batch pos d_mlp")
        self.hook_post = Hook("batch pos d_mlp")

    def forward(self, x: Stream) -> Stream:
        return self.out_proj(self.hook_post(self.act(self.hook_pre(self.in_proj(x)))))

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.in_proj.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.out_proj.weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        return bias_of(self.in_proj)

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        return bias_of(self.out_proj)


class GatedMLP(MLP):
    """`(act(x W_gate) ∘ x W_in) W_out`, as in Llama; `hook_pre` is the gate's input to the activation."""

    def __init__(self, cfg: TowerConfig):
        super().__init__(cfg)
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.hook_pre_linear = Hook("batch pos d_mlp")

    def forward(self, x: Stream) -> Stream:
        pre = self.hook_pre(self.gate_proj(x))
        pre_linear = self.hook_pre_linear(self.in_proj(x))
        return self.out_proj(self.hook_post(self.act(pre) * pre_linear))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate_proj.weight.T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        return bias_of(self.gate_proj)


class Block(nn.Module):
    """One pre-norm transformer block; `hook_attn_in` and `hook_mlp_in` touch the branch, the rest the stream."""

    def __init__(self, cfg: TowerConfig, layer: int, norm: type[nn.Module], mlp: type[nn.Module]):
        super().__init__()
        self.hook_resid_pre = Hook("batch pos d_model")
        self.hook_attn_in = Hook("batch pos d_model")
        self.ln1 = norm(cfg)
        self.attn = Attention(cfg, layer)
        self.hook_attn_out = Hook("batch pos d_model")
        self.hook_resid_mid = Hook("batch pos d_model")
        self.hook_mlp_in = Hook("batch pos d_model")
        self.ln2 = norm(cfg)
        self.mlp = mlp(cfg)
        self.hook_mlp_out = Hook("batch pos d_model")
        self.hook_resid_post = Hook("batch pos d_model")

    def forward(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        return self.second_half(self.first_half(x, mask, angles, past))

    def first_half(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        """The stream with the attention's output added."""
        x = self.hook_resid_pre(x)
        return x + self.hook_attn_out(self.attn(self.ln1(self.hook_attn_in(x)), mask, angles, past))

    def second_half(self, x: Stream) -> Stream:
        """The stream with the MLP's output added."""
        x = self.hook_resid_mid(x)
        x = x + self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(x))))
        return self.hook_resid_post(x)


def bias_of(linear: nn.Linear) -> Tensor:
    """A linear layer's bias, zeros where it has none."""
    return linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)


def accumulated_bias(blocks: Any, layer: int, mlp_input: bool, include_mlp_biases: bool) -> Tensor:
    """Sum of the output biases that reach the stream before `layer` (or before its MLP), `[d_model]`."""
    total = torch.zeros_like(blocks[0].attn.b_O) if len(blocks) else torch.zeros(())
    for block in blocks[:layer]:
        total = total + block.attn.b_O
        if include_mlp_biases:
            total = total + block.mlp.b_out
    return total + blocks[layer].attn.b_O if mlp_input else total
