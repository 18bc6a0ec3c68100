"""`importance_map`: how much each patch matters for an answer, by any known method, under one signature.

Unusual: the methods are a table; a method is a function from a `Case` to one number per patch, and so is one of your
own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava_lens.analysis.attribution.answers import Several, Word
from llava_lens.analysis.attribution.log_prob import joined
from llava_lens.analysis.interventions.study import read, row_of
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast
from llava_lens.maps import attention, causal, direct, floors, flow, gradients, perturbation, relevancy
from llava_lens.maps.case import Case

SCORE = "score"
"""The unit of a map that is counted in what is explained: nats, or logits with a second answer."""


@dataclass(frozen=True)
class Method:
    """One way to make a map: `run(case, **options)` gives one number per patch in reading order.

    `about` says in one line what the number is, `source` where it was published, `unit` what it is counted in (`SCORE`:
    what is explained; with `unit_versus` another one where there is a second answer). `signed`: below zero speaks
    against the answer.
    """

    run: Callable[..., Tensor]
    about: str
    source: str = ""
    unit: str = SCORE
    signed: bool = True
    unit_versus: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options with their defaults."""
        named = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in named if p.kind is p.KEYWORD_ONLY}

    def unit_of(self, case: Case) -> str:
        """What a map of this case is counted in."""
        unit = self.unit if case.versus is None or self.unit_versus is None else self.unit_versus
        return case.unit if unit == SCORE else unit


LPI = "arXiv 2411.10950"
METHODS: dict[str, Method] = {
    "random": Method(floors.random, "drawn evenly from 0 … 1", unit="", signed=False),
    "centre": Method(floors.centre, "falls with the distance from the middle", unit="", signed=False),
    "attention": Method(attention.attention, "the last position's attention, mean of layers and heads", LPI, "", False),
    "rollout": Method(attention.rollout, "attention rolled out through the layers", "arXiv 2005.00928", "", False),
    "relevancy": Method(
        relevancy.relevancy, "attention × its gradient, carried through the layers", "arXiv 2103.15679", "", False
    ),
    "value_norm": Method(
        attention.value_norm, "norm of what each patch writes to the last position", "arXiv 2004.10102", "", False
    ),
    "lpi_linear": Method(direct.lpi_linear, "log-probability increase of all heads, first order", LPI),
    "dla": Method(direct.dla, "direct contribution to the answer's logit", "arXiv 2211.00593", "logits"),
    "lpi": Method(direct.lpi, "log-probability increase, summed over all heads", LPI),
    "lpi_top": Method(direct.lpi_top, "log-probability increase through the k heads with the highest", LPI),
    "logit_lens": Method(
        direct.logit_lens, "the answer read from the patch's own stream", "arXiv 2410.02762", "probability", False,
        "logits",
    ),
    "gradient": Method(gradients.gradient, "gradient × input", "arXiv 1704.02685"),
    "integrated_gradients": Method(
        gradients.integrated_gradients, "gradients along the way from a masked picture", "arXiv 1703.01365"
    ),
    "occlusion": Method(perturbation.occlusion, "fall of the score without the patch", "arXiv 1311.2901"),
    "rise": Method(
        perturbation.rise, "expected answer under random masks that keep the patch", "arXiv 1806.07421", "probability",
        False, "logits",
    ),
    "causal_tracing": Method(
        causal.causal_tracing, "what the patch's clean state brings back in a noisy run", "arXiv 2202.05262",
        "probability", True, "logits",
    ),
    "value_path": Method(
        flow.value_path, "what each patch moves towards the answer's logit through all layers' values",
        "arXiv 2402.05602", "logits",
    ),
    "flow": Method(
        flow.flow, "what flows from the patch to the answer, through all layers' values, in dimmed pictures",
        "this library", "probability", True, "logits",
    ),
    "attribution_patching": Method(
        causal.attribution_patching, "gradient × (clean − corrupt) at the image token", "arXiv 2403.00745"
    ),
}  # fmt: skip
"""Name → method."""


def importance_map(
    model: Any,
    inputs: Any,
    method: str | Callable[..., Tensor] = "lpi",
    answer: Word = None,
    versus: Word = None,
    *,
    row: int | None = None,
    image: int = 0,
    several: Several = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """How much each patch of a picture matters for an answer: `Scores[row, col]`, higher for the answer.

    `method` is a name in `METHODS`, or a function of your own `fn(case, **options)` that gives one number per patch in
    reading order. `answer` (a token id or a string that is one token, by default the model's own choice) is what the
    last position predicts; with `versus` its lead over another one is explained. Of a batch every row gets a map, with
    an axis `batch`, or one `row`. `seed` draws what is random.

    `unit` and `closure` are the method's; `method` names the score, the answer, the options and the number of forward
    and backward `passes` (a run that chose the answer is not counted). Raises `LensError` for a method or an option
    that does not exist, no picture, an answer of several tokens without `several="first"`, and numbers that are not
    finite.
    """
    name, chosen = method_of(method)
    check_options(name, chosen, options)
    inputs = read(model, inputs)
    rows = range(inputs.batch_size) if row is None else [row_of(inputs, row)]
    how = {"image": image, "several": several, "seed": seed, "progress": progress}
    with torch.inference_mode(False), torch.no_grad():
        cases = [Case.of(model, inputs, answer, versus, row=i, **how) for i in rows]
        return joined([scores_of(case, name, chosen, options) for case in cases])


def scores_of(case: Case, name: str, method: Method, options: dict[str, Any]) -> Scores:
    """One case's map, with what it has to say of itself."""
    values = method.run(case, **options)
    n = len(case.patches)
    if not isinstance(values, Tensor) or tuple(values.shape) not in ((n,), case.grid):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise LensError(f"method {name!r} gave {got}; expected one number for each of the {n} patches, [{n}]")
    values = upcast(values.detach().cpu()).reshape(case.grid)
    if not bool(values.isfinite().all()):
        raise LensError(f"method {name!r} gave numbers that are not finite; expected one for each patch")
    told = {option: plain(value) for option, value in {**method.options, **options}.items()}
    said = {"score": name, **case.facts, "image": case.image, **told, **case.notes, "passes": dict(case.passes)}
    unit = case.counted or method.unit_of(case)
    return Scores(values, ("row", "col"), {}, unit, said, case.closure, (case.roles,))


def plain(value: Any) -> Any:
    """An option as a result keeps it, which can be written as JSON."""
    if isinstance(value, list | tuple | range):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def method_of(method: str | Callable[..., Tensor]) -> tuple[str, Method]:
    """A method and its name; raises `LensError` with the nearest names for one that does not exist."""
    if isinstance(method, str):
        if method not in METHODS:
            known = ", ".join(METHODS)
            raise LensError(f"method {method!r}{nearest(method, METHODS)}; expected {known}, or a function of a case")
        return method, METHODS[method]
    if not callable(method):
        raise LensError(f"method of type {type(method).__name__}; expected a name or a function of a case")
    named = method.func if isinstance(method, functools.partial) else method
    name = getattr(named, "__name__", type(named).__name__)
    return name, Method(method, (inspect.getdoc(named) or name).partition("\n")[0], unit="")


def check_options(name: str, method: Method, options: dict[str, Any]) -> None:
    """Raise `LensError` with the known options for one that the method does not take."""
    parameters = list(inspect.signature(method.run).parameters.values())[1:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        takes = ", ".join(known) or "none"
        raise LensError(f"method {name!r} has no option {unknown!r}{nearest(unknown, known)}; it takes: {takes}")
