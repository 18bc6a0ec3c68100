"""Maps of causes: what a patch's clean state brings back in a corrupted run, exactly or by first order.

Unusual: both are the library's own studies, asked about the patches of one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.attribution_patch import attribution_patch
from llava_lens.analysis.interventions.corruptions import Corruption, gaussian
from llava_lens.analysis.interventions.study import Direction
from llava_lens.analysis.interventions.trace import causal_trace
from llava_lens.errors import LensError
from llava_lens.maps.case import Case
from llava_lens.maps.masking import masked_pictures
from llava_lens.sweep.engine import N_FLOORS
from llava_lens.sweep.metrics import Metric, log_prob, logit_diff, prob


def causal_tracing(
    case: Case,
    *,
    layer: int | Sequence[int] | str = 0,
    restore: str = "resid_pre",
    sigma: int | float = 3.0,
    repeats: int = 10,
    corruption: Corruption | None = None,
) -> Float[Tensor, " patch"]:
    """What the answer's probability gains over a noisy run when one patch's clean state is put back (arXiv 2202.05262).

    The noise is Gaussian, `sigma` standard deviations, on all image tokens, drawn `repeats` times; or give another
    `corruption`. `restore` is the state put back at `layer`; of several layers, or "mean" for all, the gains are
    averaged. With a second answer it is the lead in logits that is gained. Rows of a batch share the noise. A run that
    starts at the layer restored counts as a pass, and so do the sweep's control runs.
    """
    metric = prob(case.token) if case.versus is None else logit_diff(case.token, case.versus)
    how: dict[str, Any] = {"metric": metric, "image": case.image, "repeats": repeats, "seed": case.seed}
    how |= {"progress": case.progress, "layers": None if layer == "mean" else layer}
    if isinstance(layer, str) and layer != "mean":
        raise LensError(f"layer={layer!r}; expected a layer, several, or 'mean'")
    noise = gaussian(sigma) if corruption is None else corruption
    found = causal_trace(case.model, case.inputs, noise, restore, ("layer", "patch"), **how)
    said = found.method
    draws = said.get("repeats", 1)
    controls = draws * min(N_FLOORS, said["ran"] // draws)
    clean = 1 if said["path"] == "shortened runs" else draws  # full passes share nothing between repeats
    case.count(forward=clean + draws + said["ran"] + controls)
    case.notes |= {name: said[name] for name in ("corruption", "path", "noise_floor")}
    case.notes |= {f"{metric.kind}_{name}": said[name] for name in ("clean", "corrupt")}
    return (found.values - said["baseline"]).mean(0).flatten()


def attribution_patching(case: Case, *, corrupt: Any = None, direction: Direction = "noise") -> Float[Tensor, " patch"]:
    """Gradient × (clean − corrupt) at each image token that enters the decoder (arXiv 2403.00745, eq. 4).

    `corrupt` are other inputs of the same layout, by default the same ones with the picture in its mean colour. The
    gradient is that of the clean run ("noise": what putting the corrupt token there would cost), or of the corrupt one
    ("denoise": what the clean token would bring back).
    """
    metric: Metric = log_prob(case.token) if case.versus is None else logit_diff(case.token, case.versus)
    how: dict[str, Any] = {"metric": metric, "image": case.image, "direction": direction, "progress": False}
    other = blank(case) if corrupt is None else corrupt
    found = attribution_patch(case.model, case.inputs, other, "resid_pre", "patch", layers=0, top_k=0, **how).estimate
    case.count(forward=3, backward=1)
    case.notes |= {f"{metric.kind}_{name}": found.method[name] for name in ("clean", "corrupt")}
    effect = found.values - found.method["baseline"]
    return (effect if direction == "denoise" else -effect).flatten()


def blank(case: Case) -> Any:
    """The same inputs with the picture in its mean colour."""
    assert case.inputs.pixels is not None
    pixels = case.inputs.pixels.clone()
    pixels[case.image] = masked_pictures(case, ~case.all_kept())[0]
    return replace(case.inputs, pixels=pixels)
