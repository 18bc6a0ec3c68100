"""An explanation as a few lines of text.

Unusual: every list names its unit and what it adds up to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_lens.analysis.scores import Entry

if TYPE_CHECKING:
    from llava_lens.explanation.result import Explanation

LISTED = 5
"""How many heads, patches and neurons are listed."""


def summary(e: Explanation) -> str:
    """The whole finding as a few lines of text."""
    return "\n".join([*said(e), "", findings(e)])


def findings(e: Explanation) -> str:
    """The heads, the patches, what else was asked for and the check, as text."""
    check = f"Check: the layers' increases add up to log p({e.answer!r}) within {e.closure:.1e} nats"
    if e.direct:
        worst = max(scores.closure or 0.0 for scores in e.direct.values())
        check += f", direct contributions to {e.explained} within {worst:.1e}"
    parts = [heads_lines(e), patch_lines(e), *direct_lines(e), neuron_lines(e), [check]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def said(e: Explanation) -> list[str]:
    others = ", ".join(f"{word} {p:.1%}" for word, p in e.likeliest if word != e.answer)
    lines = [
        f"Question  {e.question}",
        f"Answer    {e.text or e.answer}",
        f"Explained {e.answer!r}, probability {e.probability:.1%}" + (f" (next: {others})" if others else ""),
    ]
    if e.versus is not None:
        lines.append(f"Versus    {e.versus!r}: log p({e.answer!r}) − log p({e.versus!r}) = {e.lead:+.3f}")
    if "scored" in e.heads.method:
        lines.append(f"          {e.heads.method['scored']} of what was given")
    elif e.text and e.text.lower() != e.answer.strip().lower() and isinstance(e.answer_id, int):
        lines.append("          one token; to explain a later one, give the start of the answer up to it")
    return lines


def heads_lines(e: Explanation) -> list[str]:
    rows = [f"  {head_name(entry):<8}{entry.value:+9.4f}" for entry in e.top_heads]
    return [f"Heads that raise log p({e.answer!r}) most, in nats", *rows]


def patch_lines(e: Explanation) -> list[str]:
    grid, attention = e.map, e.patch_attention()
    rows = []
    for entry in grid.top(LISTED):
        row, col = entry.place
        pixels = ""
        if e.roles.picture(e.image).map is not None:
            left, top, right, bottom = (round(edge) for edge in e.roles.box_of_patch(row, col, e.image))
            pixels = f"   pixels x {left}–{right}, y {top}–{bottom}"
        rows.append(f"  row {row:>2}, column {col:>2}{entry.value:+9.4f}{pixels}")
    share, most = float(attention.values.sum()), attention.top(1)[0]
    image = float(e.patches().values.sum())
    text = float(e.positions.sum().values) - image
    unit = f", in {grid.unit}" if grid.unit else ""
    return [
        f"Image patches that carry it{unit}",
        f"  ({e.how if e.summed else e.how_mapped})",
        *rows,
        f"Through the heads: all {grid.values.numel()} patches {image:+.4f} nats, everything else {text:+.4f}",
        f"Mean attention: {share:.1%} on the image, most on row {most.place[0]}, column {most.place[1]}",
    ]


def direct_lines(e: Explanation) -> list[list[str]]:
    blocks = []
    for by, scores in e.direct.items():
        if by == "head" and e.versus is None:
            continue  # the heads by their increase stand there already
        rows = [f"  {part_name(by, entry):<22}{entry.value:+9.4f}" for entry in scores.top(LISTED)]
        blocks.append([f"Direct contributions to {e.explained} by {by}", *rows])
    return blocks


def neuron_lines(e: Explanation) -> list[str]:
    if e.neurons is None:
        return []
    rows = [f"  {part_name('neuron', entry):<22}{entry.value:+9.4f}" for entry in e.neurons.top(LISTED)]
    return [f"MLP neurons that raise log p({e.answer!r}) most, in nats", *rows]


def head_name(entry: Entry) -> str:
    """`L3H5` for a score of `[layer, head]`."""
    return f"L{entry.place[0]}H{entry.place[1]}"


def part_name(by: str, entry: Entry) -> str:
    """A place of one split in short: `L3 mlp`, `L3H5`, `L3 neuron 17`, `L3H5 ← patch (2, 4)`."""
    if by == "layer":
        return f"L{entry.place[0]} {entry.labels[1]}"
    if by == "neuron":
        return f"L{entry.place[0]} neuron {entry.place[1]}"
    return head_name(entry) if by == "head" else f"{head_name(entry)} ← {entry.labels[2]}"
