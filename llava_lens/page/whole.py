"""An explanation as one HTML file: what was answered, where it came from, whether the sums close, how it was made.

Unusual: maps are pictures of one pixel per patch that the browser enlarges, laid over the picture where their pixels
came from; so they stay sharp, small, and can be faded.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import llava_lens
from llava_lens.analysis import markup
from llava_lens.analysis.markup import escaped, table
from llava_lens.analysis.scores import Scores
from llava_lens.explanation import Explanation
from llava_lens.explanation.findings import LISTED, head_name, part_name
from llava_lens.page.parts import bars, scene, stage
from llava_lens.plots.pictures import picture_of


def explanation_page(explanation: Explanation, image: Any, command: str = "") -> str:
    """One self-contained page of HTML: picture and maps, heads, layers, lens, tables, the check and how it was made.

    `image` is the picture that the inputs were made from (path, PIL image or array); `command` is what makes the page
    again. The page reads in light and dark and on a phone; without scripts only fading and pointing are missing. Raises
    `LensError` for another picture's size.
    """
    e = explanation
    parts = (_top(e), _maps(e, image), _layers(e), _heads(e), _direct(e), _lens(e), _patches(e), _made(e, command))
    style, script = (files("llava_lens.page").joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(e.question)} → {escaped(e.answer)}</title><style>{style}</style></head>\n"
        f"<body><main>{''.join(part + chr(10) for part in parts)}</main><script>{script}</script></body></html>\n"
    )


def _top(e: Explanation) -> str:
    others = ", ".join(f"<bdi>{escaped(word)}</bdi> {p:.1%}" for word, p in e.likeliest if word != e.answer)
    lines = [f'<h1 dir="auto">{escaped(e.question)}</h1><p class="answer">→ <b>{escaped(e.text or e.answer)}</b></p>']
    lines.append(f"<p>Explained: <b>{escaped(e.answer)}</b>, probability <b>{e.probability:.1%}</b>")
    lines.append(f' <span class="faint">(next: {others})</span></p>' if others else "</p>")
    if e.versus is not None:
        lines.append(
            f"<p>Compared with <b>{escaped(e.versus)}</b>: log p({escaped(e.answer)}) − log p({escaped(e.versus)}) "
            f"= <b>{e.lead:+.3f}</b> nats</p>"
        )
    return "".join(lines)


def _maps(e: Explanation, image: Any) -> str:
    picture = picture_of(image, e.roles, e.image)
    panels = [
        scene(e, picture, "the picture; framed: the map's strongest patch"),
        stage(e, picture, e.map, e.map_title),
        stage(e, picture, e.patch_attention(), "mean attention of all heads"),
    ]
    fade = '<label>Fade the maps <input type="range" min="0" max="1" step="0.01" value="0.75"></label>'
    return f'<h2>Where in the picture</h2>{fade}<div class="row">{"".join(panels)}</div><p class="faint">{_on(e)}</p>'


def _on(e: Explanation) -> str:
    """How much comes from the picture and how much from elsewhere."""
    image = float(e.patches().values.sum())
    text = float(e.positions.sum().values) - image
    share = float(e.patch_attention().values.sum())
    return (
        f"Through the attention heads all {e.map.values.numel()} patches add {image:+.3f} nats to "
        f"log p({escaped(e.answer)}), all other positions {text:+.3f}. "
        f"{share:.1%} of mean attention lies on the picture."
    )


def _layers(e: Explanation) -> str:
    cards = [_card(f"log p({e.answer}) gains by layer, in nats", bars(e.layers))]
    if "layer" in e.direct:
        cards.append(_card(f"{e.explained} by layer, in logits", bars(e.direct["layer"])))
    return f'<h2>Layers</h2><div class="row">{"".join(cards)}</div>'


def _heads(e: Explanation) -> str:
    grid = _heat(e.heads, [entry.place for entry in e.top_heads])
    rows = [[head_name(entry), entry.value] for entry in e.top_heads]
    cards = [_card(f"log p({e.answer}) gains by head, in nats", grid + table(("head", "nats"), rows))]
    if "head" in e.direct:
        direct = e.direct["head"]
        top = direct.top(LISTED)
        rows = [[head_name(entry), entry.value] for entry in top]
        grid = _heat(direct, [entry.place for entry in top])
        cards.append(_card(f"{e.explained} by head, in logits", grid + table(("head", "logits"), rows)))
    return f'<h2>Heads</h2><div class="row">{"".join(cards)}</div>'


def _heat(heads: Scores, marked: list[tuple[int, ...]]) -> str:
    side = f"clamp(5px, calc(76vw / {heads.length('head')}), 20px)"
    drawn = markup.heat(heads, lambda layer, head: f"L{layer}H{head}", marked, side)
    return (
        f'{drawn}<p class="faint">layers upwards, heads to the right; red raises, blue lowers; framed: the highest</p>'
    )


def _direct(e: Explanation) -> str:
    """What no layer and no head shows: sources and neurons."""
    cards = []
    if e.neurons is not None:
        rows = [[part_name("neuron", entry), entry.value] for entry in e.neurons.top(LISTED)]
        cards.append(_card(f"log p({e.answer}) gains by MLP neuron", table(("neuron", "nats"), rows)))
    for by in ("neuron", "source"):
        if by in e.direct:
            rows = [[part_name(by, entry), entry.value] for entry in e.direct[by].top(LISTED)]
            cards.append(_card(f"{e.explained} by {by}", table((by, "logits"), rows)))
    return f'<h2>Neurons and sources</h2><div class="row">{"".join(cards)}</div>' if cards else ""


def _lens(e: Explanation) -> str:
    rows = [
        [stream, f"{_probability(p)}", f"{rank:.0f}", ", ".join(f"{word} {_probability(q)}" for word, q in best)]
        for stream, p, rank, best in e.readings()
    ]
    head = ("stream", f"p({e.lens.scores.method['answer']})", "rank", "likeliest words")
    caption = "the last position's stream read as the next word before each layer and at the end (logit lens)"
    return f'<h2>Layer by layer</h2><div class="card">{table(head, rows, caption)}</div>'


def _probability(log_p: float) -> str:
    return f"{2.718281828459045**log_p:.1%}"


def _patches(e: Explanation) -> str:
    rows = []
    for entry in e.map.top(LISTED):
        row, col = entry.place
        left, top, right, bottom = (round(edge) for edge in e.roles.box_of_patch(row, col, e.image))
        rows.append([row, col, entry.value, f"x {left}–{right}, y {top}–{bottom}"])
    head = ("row", "column", e.map.unit or "score", "pixels")
    return f'<h2>Strongest patches</h2><div class="card">{table(head, rows, e.how_mapped)}</div>'


def _made(e: Explanation, command: str) -> str:
    checks = [f"the layers' increases add up to log p({e.answer}) within {e.closure:.1e} nats"]
    checks += [
        f"{e.explained} by {by} adds up to the model's own within {scores.closure:.1e}"
        for by, scores in e.direct.items()
        if scores.closure is not None
    ]
    listed = "".join(f"<li>{escaped(check)}</li>" for check in checks)
    again = f"<p>Again:</p><pre>{escaped(command)}</pre>" if command else ""
    return (
        f"<h2>Check, and how it was made</h2><ul>{listed}</ul>"
        f"<p>Map: {escaped(e.how_mapped)}. Increases: {escaped(e.how)}.</p>"
        f'<p class="faint">Model {escaped(e.model)}, llava_lens {escaped(llava_lens.__version__)}. Prompt:</p>'
        f"<pre>{escaped(e.roles.text)}</pre>{again}"
    )


def _card(title: str, inside: str) -> str:
    return f'<div class="card"><h3>{escaped(title)}</h3>{inside}</div>'
