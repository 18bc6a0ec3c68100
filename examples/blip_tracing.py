"""Which states of BLIP bring its answer back? The published causal tracing: noise on the picture, one state restored.

    python examples/blip_tracing.py [PICTURE.png] [CHECKPOINT]

CHECKPOINT is a folder or an id such as Salesforce/blip-vqa-base. Without one, a small random BLIP is made, saved and
loaded: it shows how the study runs, and its numbers mean nothing.
"""

import sys
import tempfile

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BlipConfig, BlipForQuestionAnswering, PreTrainedTokenizerFast

from llava_lens.analysis import prob
from llava_lens.analysis.interventions.corruptions import gaussian
from llava_lens.models.blip import HookedBlip
from llava_lens.models.blip_tracing import blip_trace
from llava_lens.plots import grid, new_figure, png
from llava_lens.tiny import render_scene

KINDS = {
    "encoder.resid_post": "the question's stream",
    "encoder.cross_attn_out": "what it sees of the picture",
    "decoder.cross_attn_out": "what the answer reads of it",
}


def random_checkpoint(folder: str) -> str:
    """A small BLIP with random weights and a tokenizer of few words, as transformers saves them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "color", "is", "the", "circle", "?", "red", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    tokenizer.post_processor = processors.TemplateProcessing(**marks)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3)
    text = dict(vocab_size=13, max_position_embeddings=16, bos_token_id=12, sep_token_id=3, pad_token_id=0)
    torch.manual_seed(0)
    picture = dict(image_size=48, patch_size=16)
    config = BlipConfig(text_config=size | text, vision_config=size | picture, initializer_range=0.3)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def main(out: str | None = None, checkpoint: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = HookedBlip.from_pretrained(checkpoint or random_checkpoint(folder))
    inputs = model.prepare("what color is the circle ?", render_scene(1_000_003).image)
    metric, noise = prob("red"), gaussian(3.0, at="all")
    found = {kind: blip_trace(model, inputs, noise, kind, metric=metric, repeats=5) for kind in KINDS}
    for kind, scores in found.items():
        print(KINDS[kind], scores, sep="\n", end="\n\n")
    if out is not None:
        figure = new_figure(14, 3.6)
        for ax, (kind, scores) in zip(figure.subplots(1, 3), found.items(), strict=True):
            grid(scores.effect(), ax=ax, title=KINDS[kind])
        with open(out, "wb") as file:
            file.write(png(figure))


if __name__ == "__main__":
    main(*sys.argv[1:3])
