"""What a sweep measures: one number from the logits of a run.

Unusual: a user's own function is watched once on the logits of every position. If it reads only the last row of them,
only that is computed from then on; otherwise it gets them all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast

Word = int | str | None
Kind = Literal["log_prob", "prob", "logit", "logit_diff", "kl"]
UNITS = {"log_prob": "nats", "prob": "probability", "logit": "logits", "logit_diff": "logits", "kl": "nats"}


@dataclass(frozen=True)
class Metric:
    """A way to score runs. `answer` and `versus` are token ids or strings; None is the clean run's own choice.

    A sequence of answers gives each row of a batch its own. An answer of several tokens is scored by teacher forcing:
    its tokens follow the prompt, and their log-probabilities are added up.
    """

    kind: Kind
    answer: Word | Sequence[Word] = None
    versus: Word | Sequence[Word] = None
    recover: bool = False

    @property
    def unit(self) -> str:
        return "recovered" if self.recover else UNITS[self.kind]

    def of_row(self, i: int, n: int) -> Metric:
        """The metric of one row of a batch of `n`."""
        chosen = {}
        for name in ("answer", "versus"):
            given = getattr(self, name)
            if isinstance(given, list | tuple):
                if len(given) != n:
                    raise LensError(f"{len(given)} entries in {name}=, {n} rows; expected one per row")
                chosen[name] = given[i]
        return replace(self, **chosen)


def log_prob(answer: Word | Sequence[Word] = None) -> Metric:
    """Log-probability of the answer, in nats; of several tokens together by teacher forcing."""
    return Metric("log_prob", answer)


def prob(answer: Word | Sequence[Word] = None) -> Metric:
    """Probability of the answer; of several tokens together by teacher forcing."""
    return Metric("prob", answer)


def logit(answer: Word | Sequence[Word] = None) -> Metric:
    """Logit of a one-token answer."""
    return Metric("logit", answer)


def logit_diff(answer: Word | Sequence[Word], versus: Word | Sequence[Word]) -> Metric:
    """Logit of one token minus that of another."""
    return Metric("logit_diff", answer, versus)


def kl() -> Metric:
    """KL divergence from the clean run's distribution, `Σ p_clean (log p_clean − log p)`, in nats."""
    return Metric("kl")


def recovery(metric: Metric | str = "log_prob") -> Metric:
    """`(m − m_corrupt) / (m_clean − m_corrupt)`: 0 as corrupt, 1 as clean."""
    return replace(metric_of(metric), recover=True)


def metric_of(given: Any) -> Any:
    """A metric from its name, itself, or a function of logits `[1, pos, d_vocab]`; None is the log-probability."""
    if given is None:
        return log_prob()
    if isinstance(given, str):
        if given not in UNITS or given == "logit_diff":
            known = [name for name in UNITS if name != "logit_diff"]
            hint = "; a difference needs both tokens: logit_diff(answer, versus)" if given == "logit_diff" else ""
            raise LensError(f"metric {given!r}{nearest(given, known)}; expected {', '.join(known)}{hint}")
        return Metric(given)  # type: ignore[arg-type]
    if isinstance(given, Metric) or callable(given):
        return given
    raise LensError(f"metric of type {type(given).__name__}; expected a name, log_prob(…) … or a function of logits")


def ids_of(model: Any, word: Any, what: str = "answer") -> list[int]:
    """The token ids of an answer; raises `LensError` for an empty string, unknown words and ids that are not there."""
    if not isinstance(word, str):
        if isinstance(word, bool) or not hasattr(word, "__index__"):
            raise LensError(f"{what} of type {type(word).__name__}; expected a token id or a string")
        word = operator.index(word)
        if not 0 <= word < model.cfg.d_vocab:
            raise LensError(f"{what} {word}; expected a token id, 0 … {model.cfg.d_vocab - 1}")
        return [word]
    ids = model.word_ids(word)
    if len(ids) < 2 or model.tokenizer.unk_token_id in ids:
        return [model.to_single_token(word)]
    return ids


def one_id(model: Any, word: Any, what: str) -> int:
    """The id of an answer that must be one token."""
    ids = ids_of(model, word, what)
    if len(ids) > 1:
        raise LensError(f"{what} {word!r} is {len(ids)} tokens; this metric takes one: use log_prob or prob")
    return ids[0]


@dataclass
class Bound:
    """A metric for one row: which places it reads, and the number it makes of their logits.

    `ids` are the answer's tokens, of which all but the last follow the prompt in every run.
    """

    metric: Any
    ids: list[int] = field(default_factory=list)
    versus: int | None = None
    everywhere: bool = False
    whole: Tensor | None = None
    clean: Tensor | None = None
    span: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """What a result says of its metric."""
        if isinstance(self.metric, Metric):
            inner = self.metric.kind
            return f"recovery({inner})" if self.metric.recover else inner
        return getattr(self.metric, "__name__", type(self.metric).__name__)

    @property
    def unit(self) -> str:
        return self.metric.unit if isinstance(self.metric, Metric) else ""

    def places(self, n: int) -> list[int]:
        """The places that are read, of a row with `n`."""
        return list(range(n)) if self.everywhere else list(range(n - max(len(self.ids), 1), n))

    def __call__(self, logits: Float[Tensor, "run read d_vocab"]) -> Float[Tensor, " run"]:
        """One number per run, in float64."""
        values = self._scored(upcast(logits)) if isinstance(self.metric, Metric) else self._asked(logits)
        values = values.double()
        if self.span is not None:
            corrupt, clean = self.span
            values = (values - corrupt) / (clean - corrupt)
        return values

    def _scored(self, logits: Tensor) -> Tensor:
        kind = self.metric.kind
        if kind in ("logit", "logit_diff"):
            values = logits[:, -1, self.ids[0]]
            return values if self.versus is None else values - logits[:, -1, self.versus]
        log_p = logits.log_softmax(-1)
        if kind == "kl":
            assert self.clean is not None
            return (self.clean.exp() * (self.clean - log_p)).sum((-1, -2))
        total = torch.stack([log_p[:, i, token] for i, token in enumerate(self.ids)]).sum(0)
        return total.exp() if kind == "prob" else total

    def _asked(self, logits: Tensor) -> Tensor:
        """The user's function, run by run."""
        values = []
        for run in logits:
            if self.whole is not None:
                self.whole[0, -1] = run[-1]
                run = self.whole[0]
            values.append(scalar(self.metric(run[None]), self.name))
        return torch.tensor(values, dtype=torch.float64)


def scalar(value: Any, name: str) -> float:
    """A metric's value as a number; raises `LensError` for anything else."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise LensError(f"the metric {name!r} returned a tensor {list(value.shape)}; expected one number per run")
        return float(value)
    if isinstance(value, int | float):
        return float(value)
    raise LensError(f"the metric {name!r} returned {type(value).__name__}; expected one number per run")


def probe(fn: Callable[[Tensor], Any], logits: Float[Tensor, "pos d_vocab"], name: str) -> tuple[bool, Tensor | None]:
    """Whether a user's function needs every position, and the buffer to show it the end in (None: the end alone)."""
    whole = logits[None].detach().clone()
    with Watch(whole) as watch:
        value = scalar(fn(whole), name)
    if watch.saw_more:
        return True, None
    try:
        if scalar(fn(whole[:, -1:].clone()), name) == value:
            return False, None
    except (IndexError, RuntimeError, ValueError):
        pass  # it counts positions from the front
    buffer = torch.full_like(whole, torch.nan)
    buffer[:, -1] = whole[:, -1]
    return False, buffer


class Watch(TorchDispatchMode):
    """Notes whether anything is read of logits `[1, pos, d_vocab]` but their last row.

    Looking at a part is no reading; what is done with the part is. A function that leaves torch (`numpy`, `tolist`)
    counts as reading all that it took along.
    """

    def __init__(self, logits: Tensor):
        super().__init__()
        self.memory = logits.untyped_storage().data_ptr()
        self.last = (logits.shape[1] - 1) * logits.shape[2]
        self.saw_more = False
        self.leaving = Leaving(self)

    def __enter__(self) -> Watch:
        super().__enter__()
        self.leaving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.leaving.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not looks:
            self.note(args)
            self.note(tuple((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def note(self, values: Any) -> None:
        """Take in what is read."""
        for value in values:
            if isinstance(value, list | tuple):
                self.note(value)
            elif isinstance(value, Tensor) and value.untyped_storage().data_ptr() == self.memory:
                self.saw_more |= bool(value.numel()) and value.storage_offset() < self.last


class Leaving(TorchFunctionMode):
    """Tells a `Watch` of tensors that are handed on to what torch does not see."""

    WAYS = ("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage", "untyped_storage")

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.WAYS:
            with torch._C.DisableTorchFunction():
                self.watch.note(args)
        return func(*args, **(kwargs or {}))
