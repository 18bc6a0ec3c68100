"""The parts that both towers are built from: attention, MLPs and the pre-norm block.

Unusual: values that a fast forward never forms (scores, pattern, per-head result) are computed only when
somebody listens, and are spliced back into the forward only where a listener changed them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens import derived, kernels
from llava_lens.activations import activation, quick_gelu
from llava_lens.config import DecoderConfig, TowerConfig
from llava_lens.hooks import Hook, splice
from llava_lens.kv_cache import KVCache
from llava_lens.norms import Stream, adds_as_it_norms
from llava_lens.packing import Packed, is_called_plainly
from llava_lens.regions import Region, any_gradient
from llava_lens.rotary import Angles

Heads = Float[Tensor, "batch pos head d_head"]


class Mask(NamedTuple):
    """Which keys a query may see: `allowed` where given, else all of them, or the earlier ones if `causal`."""

    allowed: Tensor | None = None
    causal: bool = False


class Embedding(nn.Embedding):
    """One vector per id or position."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there torch would import its compiler to draw numbers that nobody gets
            super().reset_parameters()


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
        self.o_proj = nn.Linear(width, cfg.d_model, bias=bool(cfg.attn_out_bias))
        self.hook_q = Hook("batch pos head d_head")
        self.hook_k = Hook("batch pos kv_head d_head")
        self.hook_v = Hook("batch pos kv_head d_head")
        if cfg.positional_embedding_type == "rotary":
            self.hook_rot_q = Hook("batch pos head d_head")
            self.hook_rot_k = Hook("batch pos kv_head d_head")
        self.hook_attn_scores = Hook("batch head query key")
        self.hook_pattern = Hook("batch head query key")
        self.hook_z = Hook("batch pos head d_head")
        self.hook_result = Hook("batch pos head d_model")
        rotated = (self.hook_rot_q, self.hook_rot_k) if cfg.positional_embedding_type == "rotary" else ()
        self.packed = Packed(self, "q_proj", "k_proj", "v_proj")
        usual = all(getattr(type(self), name) is getattr(Attention, name) for name in ("project", "keys_and_values"))
        self.qkv = Region(self.hook_q, self.hook_k, self.hook_v, *rotated, usual=usual, packed=self.packed)
        self.out = Packed(self, "o_proj")

    def forward(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        """What the heads add to the stream."""
        return self.output(self.mix(x, mask, angles, past))

    def mix(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Heads:
        """Each head's mixture of values."""
        q, k, v = self.project(x, angles)
        z = self.attend(q, k, v, mask) if past is None else past.attend(self, q, k, v, mask)
        return self.hook_z(z.transpose(1, 2).contiguous())

    def project(self, x: Stream, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, `[batch, head, pos, d_head]` each."""
        if self.qkv.open(x):
            return self._project_as_one(x, angles)
        q = self.hook_q(self._split(self.q_proj(x))).transpose(1, 2)
        if angles is not None:
            q = self.hook_rot_q(kernels.rotate(q, *angles).transpose(1, 2)).transpose(1, 2)
        return q, *self.keys_and_values(x, angles)

    def _project_as_one(self, x: Stream, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._split(self.packed(x))
        q, k, v = heads.split(self.shares, dim=2)
        for hook, part in ((self.hook_q, q), (self.hook_k, k)):
            if hook.live:
                hook(part if angles is None else part.clone())  # what is shown stays, what is here is rotated in place
        self.hook_v(v)
        if angles is not None:
            kernels.rotate_(heads[:, :, : -self.shares[2]], *angles)
            self.hook_rot_q(q)
            self.hook_rot_k(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @property
    def shares(self) -> list[int]:
        """Heads of queries, keys and values in the joint product."""
        return [self.cfg.n_heads, self.cfg.n_key_value_heads, self.cfg.n_key_value_heads]

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
        fast = self.at_once(q, k, v, mask)
        if fast is not None and not (self.hook_attn_scores.live or self.hook_pattern.live):
            return fast
        decoders = eager and isinstance(self.cfg, DecoderConfig)
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

    def at_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Float[Tensor, "batch head query d_head"] | None:
        """The mixtures without scores and pattern in between; None where those are formed anyhow."""
        return None if self.implementation == "eager" else kernels.attention(q, k, v, self.scale, *mask)

    def output(self, z: Heads) -> Stream:
        """What the heads' mixtures add to the stream."""
        out = self.o_proj(z.reshape(*z.shape[:-2], -1))
        if not self.hook_result.live:
            return out
        if not self.hook_result.needs_value:
            self.offer_result(z)
            return out
        before = derived.per_head(z, self.W_O)
        after, touched = self.hook_result.look(before)
        return splice(out, after.sum(-2) + self.b_O, before, after, over=2) if touched else out

    def offer_result(self, z: Heads) -> None:
        """Tell those who take recipes what each head adds; where nobody needs the value."""
        self.hook_result.offer(lambda: derived.result(z, self.o_proj.weight))

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
        self.cfg = cfg
        self.act = activation(cfg.act_fn)
        self.in_proj = nn.Linear(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.out_proj = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.mlp_bias)
        self.hook_pre = Hook("batch pos d_mlp")
        self.hook_post = Hook("batch pos d_mlp")
        self.neurons = Region(self.hook_pre)
        self.out = Packed(self, "out_proj")

    def forward(self, x: Stream) -> Stream:
        return self.out_proj(self.hidden(x))

    def hidden(self, x: Stream) -> Float[Tensor, "batch pos d_mlp"]:
        """The neurons' values."""
        pre = self.hook_pre(self.in_proj(x))
        quick = self.act is quick_gelu and self.neurons.open(pre)
        return self.hook_post(kernels.quick_gelu(pre) if quick else self.act(pre))

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
        self.packed = Packed(self, "gate_proj", "in_proj")
        self.neurons = Region(self.hook_pre, self.hook_pre_linear, packed=self.packed)

    def hidden(self, x: Stream) -> Float[Tensor, "batch pos d_mlp"]:
        if self.neurons.open(x):
            gate, up = self.packed(x).chunk(2, dim=-1)
            self.hook_pre(gate)
            self.hook_pre_linear(up)
            return self.hook_post(kernels.swiglu(gate, up) if self.act is F.silu else self.act(gate) * up)
        pre = self.hook_pre(self.gate_proj(x))
        pre_linear = self.hook_pre_linear(self.in_proj(x))
        return self.hook_post(self.act(pre) * pre_linear)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate_proj.weight.T

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"]:
        return bias_of(self.gate_proj)


class Block(nn.Module):
    """One pre-norm transformer block; `hook_attn_in` and `hook_mlp_in` touch the branch, the rest the stream."""

    ln1: Any
    ln2: Any
    mlp: Any

    def __init__(
        self,
        cfg: TowerConfig,
        layer: int,
        norm: type[nn.Module],
        mlp: type[nn.Module],
        attention: type[Attention] = Attention,
    ):
        super().__init__()
        self.hook_resid_pre = Hook("batch pos d_model")
        self.hook_attn_in = Hook("batch pos d_model")
        self.ln1 = norm(cfg)
        self.attn = attention(cfg, layer)
        self.hook_attn_out = Hook("batch pos d_model")
        self.hook_resid_mid = Hook("batch pos d_model")
        self.hook_mlp_in = Hook("batch pos d_model")
        self.ln2 = norm(cfg)
        self.mlp = mlp(cfg)
        self.hook_mlp_out = Hook("batch pos d_model")
        self.hook_resid_post = Hook("batch pos d_model")
        self.heads_sum = Region(
            self.attn.hook_result, self.hook_attn_out, packed=self.attn.out, owner=self, around=("attn",)
        )
        self.biased = bool(cfg.attn_out_bias)
        usual = (type(self).first_half, type(self).second_half) == (Block.first_half, Block.second_half)
        usual = usual and adds_as_it_norms(type(self.ln2))
        self.sum_and_norm = Region(*self.heads_sum.hooks, *self.held, usual=usual, owner=self, around=("attn", "ln2"))
        usual = type(self.mlp).forward is MLP.forward
        self.mlp_sum = Region(
            self.hook_mlp_out, usual=usual, packed=self.mlp.out if usual else None, owner=self, around=("mlp",)
        )

    def forward(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        if not self.adds_in_norm(x):
            return self.second_half(self.first_half(x, mask, angles, past), own=True)
        x = self.hook_resid_pre(x)
        out = self.hook_attn_out(self.attn(self.ln1(self.hook_attn_in(x)), mask, angles, past))
        if any_gradient(out, *self.ln2.parameters()):
            return self.second_half(x + out)
        x, normed = self.ln2.after_adding(x, out)
        x = self.hook_mlp_in(self.hook_resid_mid(x))
        return self._add_neurons(x, self.ln2.told(x, normed))

    def first_half(self, x: Stream, mask: Mask, angles: Angles | None = None, past: KVCache | None = None) -> Stream:
        """The stream with the attention's output added."""
        x = self.hook_resid_pre(x)
        normed = self.ln1(self.hook_attn_in(x))
        if not self.heads_sum.open(x):
            return x + self.hook_attn_out(self.attn(normed, mask, angles, past))
        z = self.attn.mix(normed, mask, angles, past)
        if self.heads_sum.live:
            self._show_heads(z)
        return self.attn.out.add(x, z.flatten(-2))

    def second_half(self, x: Stream, own: bool = False) -> Stream:
        """The stream with the MLP's output added; `own` says that nobody else holds it."""
        x = self.hook_resid_mid(x)
        return self._add_neurons(x, self.ln2(self.hook_mlp_in(x)), own)

    def _add_neurons(self, x: Stream, normed: Stream, own: bool = True) -> Stream:
        if not self.mlp_sum.open(x):
            return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(normed)))
        post = self.mlp.hidden(normed)
        if self.mlp_sum.live:
            self._show_sum(self.hook_mlp_out, post, self.mlp.out_proj)
        spend = own and x.is_cuda and is_called_plainly(self.ln2) and not any(hook.live for hook in self.held)
        return self.hook_resid_post(self.mlp.out.add(x, post, spend))

    def _show_heads(self, z: Heads) -> None:
        if self.attn.hook_result.needs_value:
            self.hook_attn_out(self.attn.output(z))
        else:
            self.attn.offer_result(z)
            self._show_sum(self.hook_attn_out, z, self.attn.o_proj)

    def _show_sum(self, hook: Hook, values: Tensor, linear: nn.Linear) -> None:
        """Show what is added inside a product, beside it."""
        if hook.needs_value:
            hook(linear(values.flatten(2)))
        else:
            hook.offer(lambda: derived.linear(values, linear.weight, linear.bias))

    def adds_in_norm(self, *tensors: Tensor) -> bool:
        """Whether the attention's output, which has a bias, is added in one step with the norm behind it."""
        return self.biased and self.sum_and_norm.open(*tensors)

    @property
    def held(self) -> tuple[Hook, ...]:
        """Hooks whose listeners may keep the stream between the halves."""
        return self.hook_resid_mid, self.hook_mlp_in, *(part for part in self.ln2.children() if isinstance(part, Hook))


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
