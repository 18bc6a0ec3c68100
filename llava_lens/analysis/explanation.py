"""The main question about one picture: what is the answer, and which heads and patches produced it?

Unusual: the map sums all heads instead of drawing the single top one. On the embedded model's colour questions (242
held-out scenes) the strongest patch then lies on the asked object in 99.2 % (Wilson 95 %: 97.0–99.8 %); summed over the
10, 5 and 1 heads with the highest increase in 98.3, 95.5 and 88.0 %, by mean attention in 82.2 %, by chance in 14.0 %.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution import Answer, log_prob_increase, mean_attention, names_for
from llava_lens.analysis.files import write_together
from llava_lens.analysis.scores import Entry, Scores
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.roles import Roles

TOP_CELLS = 4096
"""How many head × position cells of the map are computed exactly unless told otherwise."""
LISTED = 5
"""How many heads and patches are listed."""


@dataclass(frozen=True)
class Explanation:
    """One answer and where it came from; scores are log-probability increases of `answer`, in nats.

    `layers` `[layer, part]` and `heads` `[layer, head]` are exact. `positions` `[position]` is the sum over all heads;
    `how` says how many of its cells are exact. `attention` `[position]` is the mean over all heads. `text` is what the
    model says when it goes on greedily, of which `answer` is the first token unless another was asked for; `likeliest`
    are its most probable first tokens.
    """

    model: str
    question: str
    text: str
    answer: str
    answer_id: int
    probability: float
    likeliest: tuple[tuple[str, float], ...]
    layers: Scores
    heads: Scores
    positions: Scores
    attention: Scores
    roles: Roles

    @property
    def closure(self) -> float:
        """How far the layers' increases miss `log p(answer)` when they are added up, in nats."""
        return self.layers.closure or 0.0

    @property
    def top_heads(self) -> list[Entry]:
        """The heads with the highest increase."""
        return self.heads.top(LISTED)

    def patches(self, image: int = 0) -> Scores:
        """The map `[row, col]`: what each patch adds to the answer through all heads."""
        return self.positions.over_image(image)

    def patch_attention(self, image: int = 0) -> Scores:
        """Mean attention `[row, col]` beside it."""
        return self.attention.over_image(image)

    @property
    def how(self) -> str:
        """One sentence on how the map was made."""
        exact, of = self.positions.method["exact"], self.positions.method["of"]
        cells = f"all {of}" if exact == of else f"the {exact} largest of {of}"
        rest = "" if exact == of else ", the rest by its linear bound"
        return f"sum over all {self.heads.values.numel()} heads; {cells} head × position cells exact{rest}"

    def summary(self) -> str:
        """The whole finding as a few lines of text."""
        return "\n".join([*self._said(), "", self.findings()])

    def findings(self) -> str:
        """The heads, the patches and the check, as text."""
        check = f"Check: the layers' increases add up to log p({self.answer!r}) within {self.closure:.1e} nats"
        return "\n".join([*self._heads_lines(), "", *self._patch_lines(), "", check])

    def _said(self) -> list[str]:
        others = ", ".join(f"{word} {p:.1%}" for word, p in self.likeliest if word != self.answer)
        lines = [
            f"Question  {self.question}",
            f"Answer    {self.text or self.answer}",
            f"Explained {self.answer!r}, probability {self.probability:.1%}" + (f" (next: {others})" if others else ""),
        ]
        if self.text and self.text.lower() != self.answer.strip().lower():
            lines.append("          one token; to explain a later one, give the start of the answer up to it")
        return lines

    def _heads_lines(self) -> list[str]:
        rows = [f"  {head_name(entry):<8}{entry.value:+9.4f}" for entry in self.top_heads]
        return [f"Heads that raise log p({self.answer!r}) most, in nats", *rows]

    def _patch_lines(self) -> list[str]:
        patches, attention = self.patches(), self.patch_attention()
        rows = []
        for entry in patches.top(LISTED):
            left, top, right, bottom = (round(edge) for edge in self.roles.box_of_patch(*entry.place))
            where = f"row {entry.place[0]:>2}, column {entry.place[1]:>2}"
            rows.append(f"  {where}{entry.value:+9.4f}   pixels x {left}–{right}, y {top}–{bottom}")
        image = float(patches.values.sum())
        text = float(self.positions.sum().values) - image
        rows.append(f"  all {patches.values.numel()} patches{image:+9.4f}   text {text:+.4f}")
        share, most = float(attention.values.sum()), attention.top(1)[0]
        return [
            "Image patches that carry it, in nats",
            f"  ({self.how})",
            *rows,
            f"Mean attention: {share:.1%} on the image, most on row {most.place[0]}, column {most.place[1]}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; every patch with its box in pixels of the original picture."""
        return {
            "model": self.model,
            "question": self.question,
            "text": self.text,
            "answer": self.answer,
            "answer_id": self.answer_id,
            "probability": self.probability,
            "likeliest": [list(pair) for pair in self.likeliest],
            "how": self.how,
            "closure": self.closure,
            "top_heads": [{"layer": e.place[0], "head": e.place[1], "increase": e.value} for e in self.top_heads],
            "patches": _bare(self.patches()),
            "patch_attention": _bare(self.patch_attention()),
            "picture": {"size": list(self.roles.image_size()), "patches_cover": list(self.roles.region())},
            "layers": _bare(self.layers),
            "heads": _bare(self.heads),
            "positions": _bare(self.positions),
            "attention": _bare(self.attention),
            "prompt": self.roles.text,
        }

    def save(self, folder: str | Path, picture: bytes | None = None) -> list[Path]:
        """Write `explanation.json` and, if given, the drawn `explanation.png` into a folder: both or none.

        `picture` is what `llava_lens.plots.explanation_png` gives. Raises `LensError` where nothing can be written.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        contents = {"explanation.json": text.encode()}
        if picture is not None:
            contents["explanation.png"] = picture
        return write_together(folder, contents)


def _bare(scores: Scores) -> dict[str, Any]:
    return replace(scores, roles=None).to_json()


def head_name(entry: Entry) -> str:
    """`L3H5` for a score of `[layer, head]`."""
    return f"L{entry.place[0]}H{entry.place[1]}"


@torch.no_grad()
def explain(
    model: Any, inputs: Inputs, answer: Answer = None, *, top_k: int = TOP_CELLS, max_new_tokens: int = 16
) -> Explanation:
    """Answer a question about a picture and say which heads and patches produced the answer's next token.

    All heads are scored by log-probability increase, and the map over the patches sums them (arXiv 2411.10950 draws the
    single top head); the `top_k` largest head × position cells are computed exactly. `answer` is the token to explain,
    an id or a string that is one token, by default the model's own choice. `inputs` come from `model.prepare`, one row
    with one picture or more; a given start of the answer moves what is explained to the token after it.

    Raises `LensError` for several rows, no picture, a string of several tokens.
    """
    roles = _one_row(inputs)
    logits, cache = model.run_with_cache(inputs, names_filter=names_for(model, "layer", "head", "position"))
    heads = log_prob_increase(cache, answer, by="head", exact=True)
    token = int(heads.method["answer_id"])
    probs: Float[Tensor, " d_vocab"] = logits[0, roles.last].double().softmax(-1)
    best = probs.topk(min(LISTED, len(probs)))
    return Explanation(
        model=model.cfg.model_name,
        question=_question(roles),
        text=_greedy(model, inputs, max_new_tokens),
        answer=model.token_string(token),
        answer_id=token,
        probability=float(probs[token]),
        likeliest=tuple((model.token_string(int(i)), float(p)) for p, i in zip(best.values, best.indices, strict=True)),
        layers=log_prob_increase(cache, token, by="layer"),
        heads=heads,
        positions=log_prob_increase(cache, token, by="position", top_k=top_k),
        attention=mean_attention(cache),
        roles=roles,
    )


def _one_row(inputs: Inputs) -> Roles:
    if inputs.batch_size != 1:
        raise LensError(f"a batch of {inputs.batch_size}; explain one at a time: inputs.row(0)")
    if inputs.pixels is None:
        raise LensError("no picture: pixels are missing; make the inputs with model.prepare(question, image)")
    return inputs.roles_of()


def _question(roles: Roles) -> str:
    spans = [span for span, label in zip(roles.spans, roles.labels, strict=False) if label == "question"]
    return roles.text[min(s for s, _ in spans) : max(e for _, e in spans)] if spans else roles.text


def _greedy(model: Any, inputs: Inputs, max_new_tokens: int) -> str:
    """What the model says, as far as the context has room for it."""
    room = max_new_tokens
    if model.cfg.max_positions is not None:
        room = min(room, model.cfg.max_positions - inputs.n_pos)
    return model.generate(inputs, max_new_tokens=room, return_type="text")[0] if room > 0 else ""
