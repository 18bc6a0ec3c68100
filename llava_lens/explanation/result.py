"""What an explanation holds, and how it is written: as text, as JSON, in a notebook.

Unusual: all of it is kept as `Scores`, so that each number can be drawn, summed and compared further.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_lens.analysis import markup
from llava_lens.analysis.files import write_together
from llava_lens.analysis.lenses.words import Lens
from llava_lens.analysis.scores import Entry, Scores
from llava_lens.explanation import findings
from llava_lens.roles import Roles


@dataclass(frozen=True)
class Explanation:
    """One answer and where it came from.

    `layers` `[layer, part]`, `heads` `[layer, head]`, `neurons` `[layer, neuron]` (where asked for) and `positions`
    `[position]`, the sum over all heads, are log-probability increases of `answer` in nats; `how` says how exact the
    last are. `map` `[row, col]` is the chosen map of the picture `image`, `about` what it shows. `attention`
    `[position]` is the mean over all heads. `direct` holds what each split adds to the answer's logit, or to its lead
    over `versus`, the answer it is compared with; `lead` is `log p(answer) − log p(versus)`. `lens` `[stream]` reads
    the last position after each layer. `text` is what the model says when it goes on greedily; `likeliest` are its most
    probable first tokens.
    """

    model: str
    question: str
    text: str
    answer: str
    answer_id: int | list[int]
    probability: float
    likeliest: tuple[tuple[str, float], ...]
    layers: Scores
    heads: Scores
    positions: Scores
    attention: Scores
    map: Scores
    about: str
    direct: Mapping[str, Scores]
    neurons: Scores | None
    lens: Lens
    versus: str | None
    lead: float | None
    roles: Roles
    image: int = 0

    @property
    def closure(self) -> float:
        """How far the layers' increases miss `log p(answer)` when they are added up, in nats."""
        return self.layers.closure or 0.0

    @property
    def explained(self) -> str:
        """What the direct contributions add up to, in words."""
        other = "" if self.versus is None else f" − logit({self.versus!r})"
        return f"logit({self.answer!r}){other}"

    @property
    def top_heads(self) -> list[Entry]:
        """The heads with the highest increase."""
        return self.heads.top(findings.LISTED)

    def patches(self, image: int | None = None) -> Scores:
        """What each patch adds to the answer's log-probability through all heads, `[row, col]`."""
        return self.positions.over_image(self.image if image is None else image)

    def patch_attention(self, image: int | None = None) -> Scores:
        """Mean attention `[row, col]` beside it."""
        return self.attention.over_image(self.image if image is None else image)

    @property
    def how(self) -> str:
        """One sentence on how the increases of positions were made."""
        method = self.positions.method
        exact, of = method["exact"], method["of"]
        cells = f"all {of}" if exact == of else f"{exact} of {of}"
        rest = (
            ""
            if exact == of
            else f", the rest to first order: no position is off by more than {method['certified']:.1e}"
        )
        return f"sum over all {self.heads.values.numel()} heads; {cells} head × position cells exact{rest}"

    @property
    def map_title(self) -> str:
        """What stands over the map."""
        if self.summed:
            return f"log-probability increase of “{self.answer}”"
        return f"{self.map.method['score']} of “{self.answer}”" + (f" over “{self.versus}”" if self.versus else "")

    @property
    def how_mapped(self) -> str:
        """One sentence on the map: what it shows, its unit, and how many passes it took."""
        passes = self.map.method["passes"]
        counted = " and ".join(f"{n:g} {way}" for way, n in passes.items() if n)
        unit = f", in {self.map.unit}" if self.map.unit else ""
        return f"{self.map.method['score']}: {self.about}{unit}; passes: {counted or 'none'}"

    @property
    def summed(self) -> bool:
        """Whether the map is the sum of the increases themselves, and not another method's."""
        return self.map.method["score"] == "lpi" and self.versus is None

    def summary(self) -> str:
        """The whole finding as a few lines of text."""
        return findings.summary(self)

    def findings(self) -> str:
        """The heads, the patches, what else was asked for and the check, as text."""
        return findings.findings(self)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; `picture` says which of the original's pixels the patches cover, if known."""
        known = self.roles.picture(self.image).map
        return {
            "model": self.model,
            "question": self.question,
            "text": self.text,
            "answer": self.answer,
            "answer_id": self.answer_id,
            "probability": self.probability,
            "versus": self.versus,
            "lead": self.lead,
            "likeliest": [list(pair) for pair in self.likeliest],
            "how": self.how,
            "closure": self.closure,
            "top_heads": [{"layer": e.place[0], "head": e.place[1], "increase": e.value} for e in self.top_heads],
            "map": {"about": self.about, **_bare(self.map)},
            "patches": _bare(self.patches()),
            "patch_attention": _bare(self.patch_attention()),
            "picture": {
                "image": self.image,
                "size": known and list(known.size),
                "patches_cover": known and list(known.region()),
            },
            "layers": _bare(self.layers),
            "heads": _bare(self.heads),
            "positions": _bare(self.positions),
            "attention": _bare(self.attention),
            "direct": {by: _bare(scores) for by, scores in self.direct.items()},
            "neurons": self.neurons and _bare(self.neurons),
            "lens": [
                {"stream": stream, "log_prob": p, "rank": int(rank), "words": [[w, v] for w, v in best]}
                for stream, p, rank, best in self.readings()
            ],
            "prompt": self.roles.text,
        }

    def readings(self) -> list[tuple[str, float, float, list[tuple[str, float]]]]:
        """What the last position reads as after each layer, from the first to the last.

        Each is the stream's name, the answer's log-probability and rank there, and the likeliest words with their
        log-probabilities.
        """
        lens = self.lens
        values, ranks, best = lens.scores.values.tolist(), lens.ranks.values.tolist(), lens.values.tolist()
        named = zip(lens.scores.labels_of("stream"), values, ranks, lens.words.tolist(), best, strict=True)
        return [(str(stream), p, r, list(zip(words, tops, strict=True))) for stream, p, r, words, tops in named]

    def save(self, folder: str | Path, picture: bytes | None = None, page: str | None = None) -> list[Path]:
        """Write `explanation.json` and, if given, `explanation.png` and `explanation.html` into a folder: all or none.

        `picture` is what `llava_lens.plots.explanation_png` gives, `page` what `llava_lens.page.explanation_page` does.
        Raises `LensError` where nothing can be written.
        """
        text = json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
        contents = {"explanation.json": text.encode()}
        if picture is not None:
            contents["explanation.png"] = picture
        if page is not None:
            contents["explanation.html"] = page.encode()
        return write_together(folder, contents)

    def _repr_html_(self) -> str:
        said = "<br>".join(markup.escaped(line) for line in findings.said(self))
        grid = markup.heat(self.map, lambda row, col: f"row {row}, column {col}")
        heads = markup.heat(self.heads, lambda layer, head: f"L{layer}H{head}", [e.place for e in self.top_heads])
        drawn = "".join(
            f'<figure style="display:inline-block;margin:0 1em 0 0">{each}'
            f"<figcaption>{markup.escaped(name)}</figcaption></figure>"
            for name, each in ((self.how_mapped, grid), ("increase by layer (upwards) and head", heads))
        )
        rows = [[findings.head_name(entry), entry.value] for entry in self.top_heads]
        return f"<div><p>{said}</p>{drawn}{markup.table(('head', 'nats'), rows)}</div>"


def _bare(scores: Scores) -> dict[str, Any]:
    return replace(scores, roles=None).to_json()
