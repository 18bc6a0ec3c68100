"""What BLIP is built from: its ViT, and the BERT stacks that read the question and the answer.

Unusual: the ViT's queries, keys and values come from one matrix, as in the checkpoint, and the BERT blocks norm the
stream after every part that was added to it, so their streams are no sums; hook names are TransformerLens's for both.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lens import kernels
from llava_lens.activations import activation
from llava_lens.config import TowerConfig, VisionConfig
from llava_lens.facts import is_whole
from llava_lens.hooks import Hook
from llava_lens.layers import MLP, Attention, Block, Embedding, Mask, accumulated_bias
from llava_lens.models.blip_config import BlipTextConfig
from llava_lens.norms import LayerNorm, Stream


class JointAttention(Attention):
    """Attention whose queries, keys and values are one product, in the checkpoint's layout; `W_*` are views of it."""

    def __init__(self, cfg: TowerConfig, layer: int):
        super().__init__(cfg, layer)
        self.implementation = "eager"
        del self.q_proj, self.k_proj, self.v_proj
        self.qkv_proj = nn.Linear(cfg.d_model, 3 * cfg.n_heads * cfg.d_head)

    def project(self, x: Stream, angles: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `[batch, head, pos, d_head]` each."""
        parts = self._split(self.qkv_proj(x)).split(self.shares, dim=2)
        hooks = (self.hook_q, self.hook_k, self.hook_v)
        q, k, v = (hook(part).transpose(1, 2) for hook, part in zip(hooks, parts, strict=True))
        return q, k, v

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight(2)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self._bias(0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        return self._bias(1)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        return self._bias(2)

    def _weight(self, part: int) -> Tensor:
        rows = self.qkv_proj.weight.chunk(3)[part]
        return rearrange(rows, "(head d_head) d_model -> head d_model d_head", d_head=self.cfg.d_head)

    def _bias(self, part: int) -> Tensor:
        return rearrange(self.qkv_proj.bias.chunk(3)[part], "(head d_head) -> head d_head", d_head=self.cfg.d_head)


class PictureBlock(Block):
    """A pre-norm block with joint attention."""

    def __init__(self, cfg: VisionConfig, layer: int):
        super().__init__(cfg, layer, LayerNorm, MLP)
        self.attn = JointAttention(cfg, layer)  # the fused ways, which know the other kind, are never switched on here


class BlipVision(nn.Module):
    """BLIP's ViT. Position 0 is the class token; patch `(row, col)` is at position `1 + row * columns + col`."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_pixels = Hook("batch channel height width")
        self.patch_embed = nn.Conv2d(cfg.n_channels, cfg.d_model, cfg.patch_size, stride=cfg.patch_size)
        self.class_embed = nn.Parameter(torch.zeros(1, 1, cfg.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.n_ctx, cfg.d_model))
        self.hook_patch_embed = Hook("batch patch d_model")
        self.hook_class_embed = Hook("batch 1 d_model")
        self.hook_pos_embed = Hook("batch pos d_model")
        self.hook_embed = Hook("batch pos d_model")
        self.blocks = nn.ModuleList(PictureBlock(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = LayerNorm(cfg)
        self.hook_features = Hook("batch pos d_model")

    def forward(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """What the question encoder gets to see of each picture."""
        x = self.embed(self.hook_pixels(pixels))
        for block in self.blocks:
            x = block(x, Mask())
        return self.hook_features(self.ln_final(x))

    def embed(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """Class token and patches with their positions added."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        patches = self.hook_patch_embed(rearrange(patches, "image d row col -> image (row col) d"))
        class_token = self.hook_class_embed(self.class_embed.expand(len(pixels), 1, -1))
        positions = self.pos_embed
        if self.hook_pos_embed.live:
            positions = self.hook_pos_embed(positions.expand(len(pixels), -1, -1))
        return self.hook_embed(torch.cat((class_token, patches), dim=1) + positions)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases in the stream before `layer` (before its MLP with `mlp_input`)."""
        return accumulated_bias(self.blocks, layer, mlp_input, include_mlp_biases)


# ---- the texts


class BertAttention(Attention):
    """BERT's attention, of a text to itself or (`source`) to the vectors of another stack."""

    def __init__(self, cfg: TowerConfig, layer: int, crosses: bool, caches: bool):
        super().__init__(cfg, layer)
        self.implementation = "eager"
        self.caches = caches
        if crosses:
            self.hook_k = Hook("batch source kv_head d_head")
            self.hook_v = Hook("batch source kv_head d_head")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Stream, mask: Mask, source: Float[Tensor, "batch source d_model"] | None = None
    ) -> Stream:
        """What the heads add to the stream."""
        q = self.hook_q(self._split(self.q_proj(x))).transpose(1, 2)
        k, v = self.keys_and_values(x if source is None else source, None)
        if self.caches:
            k, v = k.contiguous(), v.contiguous()  # as Hugging Face's always present cache lays them out
        z = self.attend(q, k, v, mask)
        return self.output(self.hook_z(z.transpose(1, 2).contiguous()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Float[Tensor, "batch head query d_head"]:
        """Mix the values; the scores are divided by √d_head, which rounds otherwise than multiplying does."""
        scores = kernels.attention_scores(q, k, 1.0, *mask, uniform_dead_rows=True) / self.cfg.d_head**0.5
        scores, _ = self.hook_attn_scores.look(scores)
        pattern, _ = self.hook_pattern.look(kernels.attention_pattern(scores))
        return kernels.mix_values(pattern, v)


class BertBlock(nn.Module):
    """One post-norm block: self-attention, cross-attention, MLP, each added and then normed.

    `hook_resid_mid`, `hook_resid_mid_cross` and `hook_resid_post` are the sums before their norms, as TransformerLens
    has them; the block's output is `hook_normalized_resid_post`.
    """

    def __init__(self, cfg: BlipTextConfig, layer: int, caches: bool):
        super().__init__()
        self.hook_resid_pre = Hook("batch pos d_model")
        self.hook_attn_in = Hook("batch pos d_model")
        self.attn = BertAttention(cfg, layer, crosses=False, caches=caches)
        self.hook_attn_out = Hook("batch pos d_model")
        self.hook_resid_mid = Hook("batch pos d_model")
        self.ln1 = LayerNorm(cfg)
        self.hook_cross_attn_in = Hook("batch pos d_model")
        self.cross_attn = BertAttention(cfg, layer, crosses=True, caches=caches)
        self.hook_cross_attn_out = Hook("batch pos d_model")
        self.hook_resid_mid_cross = Hook("batch pos d_model")
        self.ln_cross = LayerNorm(cfg)
        self.hook_mlp_in = Hook("batch pos d_model")
        self.mlp = MLP(cfg)
        self.hook_mlp_out = Hook("batch pos d_model")
        self.hook_resid_post = Hook("batch pos d_model")
        self.ln2 = LayerNorm(cfg)
        self.hook_normalized_resid_post = Hook("batch pos d_model")

    def forward(self, x: Stream, mask: Mask, source: Float[Tensor, "batch source d_model"]) -> Stream:
        x = self.hook_resid_pre(x)
        x = self.ln1(self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.hook_attn_in(x), mask))))
        crossed = self.hook_cross_attn_out(self.cross_attn(self.hook_cross_attn_in(x), Mask(), source))
        x = self.ln_cross(self.hook_resid_mid_cross(x + crossed))
        x = self.ln2(self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.hook_mlp_in(x)))))
        return self.hook_normalized_resid_post(x)


class BertStack(nn.Module):
    """A text, each of whose blocks looks at another stack's vectors: the question encoder."""

    causal = False

    def __init__(self, cfg: BlipTextConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = Embedding(cfg.d_vocab, cfg.d_model)
        self.pos_embed = Embedding(cfg.n_ctx, cfg.d_model)
        self.hook_embed = Hook("batch pos d_model")
        self.hook_pos_embed = Hook("batch pos d_model")
        self.ln_embed = LayerNorm(cfg)
        self.hook_full_embed = Hook("batch pos d_model")
        self.blocks = nn.ModuleList(BertBlock(cfg, layer, self.causal) for layer in range(cfg.n_layers))

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        source: Float[Tensor, "batch source d_model"],
        attention_mask: Tensor | None = None,
    ) -> Stream:
        """The last block's output; `attention_mask` `[batch, pos]` has zeros for padding. All of `source` is seen."""
        mask = mask_of(attention_mask, self.causal)
        x = self.start(tokens)
        for block in self.blocks:
            x = block(x, mask, source)
        return x

    def start(self, tokens: Int[Tensor, "batch pos"]) -> Stream:
        """Words with their positions added, normed: the stream before the first block."""
        positions = self.pos_embed.weight[None, : tokens.shape[1]]
        if self.hook_pos_embed.live:
            positions = self.hook_pos_embed(positions.expand(len(tokens), -1, -1).clone())
        return self.hook_full_embed(self.ln_embed(self.hook_embed(self.embed(tokens)) + positions))


class AnswerHead(nn.Module):
    """What lies between the answer decoder's stream and its unembedding: a layer of neurons and a norm."""

    def __init__(self, cfg: BlipTextConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.d_model, cfg.d_model)
        self.act = activation(cfg.act_fn)
        self.hook_pre = Hook("batch pos d_model")
        self.hook_post = Hook("batch pos d_model")
        self.ln = LayerNorm(cfg)

    def forward(self, x: Stream) -> Stream:
        return self.ln(self.hook_post(self.act(self.hook_pre(self.dense(x)))))


class AnswerDecoder(BertStack):
    """The answer, causal, whose blocks look at the question; `read_out` gives its logits."""

    causal = True

    def __init__(self, cfg: BlipTextConfig):
        super().__init__(cfg)
        self.head = AnswerHead(cfg)
        self.unembed = nn.Linear(cfg.d_model, cfg.d_vocab)
        self.unembed.weight = self.embed.weight
        self.bias = self.unembed.bias  # published under both names

    def read_out(self, x: Stream) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the next token at every position."""
        return self.unembed(self.head(x))


def mask_of(attention_mask: Int[Tensor, "batch pos"] | None, causal: bool) -> Mask:
    """What each position may see of a text whose padding has zeros in `attention_mask`."""
    if attention_mask is None or is_whole(attention_mask):
        return Mask(causal=causal)
    allowed = attention_mask[:, None, None].bool().expand(-1, -1, attention_mask.shape[1], -1)
    return Mask(allowed.tril() if causal else allowed)
