"""From what a user has (a question and a picture, a processor's output, tokens, a text) to `Inputs`.

Unusual: a picture can be held (`looking_at`) for tools that pass only tokens, so that they do not run without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from llava_lens.errors import LensError, nearest
from llava_lens.facts import token_facts
from llava_lens.inputs import Inputs, copied
from llava_lens.preparation import prepare
from llava_lens.surface import TransformerLensSurface

INPUTS = ("input_ids", "pixel_values", "attention_mask", "roles")
"""The names of what every model takes; a class's `extra_inputs` come beside them."""
R = TypeVar("R", bound="InputReader")


class InputReader(TransformerLensSurface):
    """How a model takes its inputs, and the picture that it is looking at."""

    Processor: Any
    extra_inputs: tuple[str, ...] = ()
    """Names of further tensors of Hugging Face's that the model takes, `image_sizes` for instance."""
    _held: Inputs | None = None

    def prepare(self, question: str | list[str], image: Any = None, answer: str | list[str] = "", **how: Any) -> Inputs:
        """Question and picture(s) to `Inputs` on the model's device, through the checkpoint's own template.

        `image` is a PIL image, path or array, a list of them, or None; `answer` a start that the model continues.
        See `llava_lens.preparation.prepare` for the rest and for the errors.
        """
        if self.processor is None:
            raise LensError("this model has no processor; give one: HookedLlava.from_hf(model, processor)")
        processor = self.Processor.from_hf(self.processor, self.cfg)
        return prepare(processor, self.cfg, question, image, answer=answer, **how).to(self.cfg.device)

    @contextmanager
    def looking_at(self: R, inputs: Inputs) -> Iterator[R]:
        """Hold a picture for tools that pass only tokens, TransformerLens's patching for instance."""
        before, self._held = self._held, inputs
        try:
            yield self
        finally:
            self._held = before

    def read_inputs(
        self,
        input: Inputs | Mapping[str, Any] | Tensor | str | list[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        roles: Any = None,
        **extras: Any,
    ) -> Inputs:
        """What `forward` was given, as `Inputs` on the model's device; a picture held stands in for a missing one.

        What lies elsewhere is checked there before it moves: the host need not wait for a device to check it.
        """
        self._refuse_unknown(extras)
        named = {"pixel_values": pixel_values, "attention_mask": attention_mask, "roles": roles, **extras}
        twice = [name for name, value in {"input_ids": input_ids, **named}.items() if value is not None]
        if isinstance(input, Inputs | Mapping) and twice:
            raise LensError(f"{', '.join(twice)} given beside {type(input).__name__}, which holds the whole input")
        if isinstance(input, Inputs):
            return self._placed(input)
        if isinstance(input, Mapping):
            return self.read_inputs(**input)
        tokens = input_ids if input is None else input
        if isinstance(tokens, str | list):
            tokens, padding = self.encode_text(tokens)
            attention_mask = padding if attention_mask is None else attention_mask
        if not isinstance(tokens, Tensor):
            raise LensError(f"expected Inputs, tokens or text, got {type(tokens).__name__}")
        tokens = tokens if tokens.ndim == 2 else tokens[None]
        given = {name: value for name, value in extras.items() if value is not None}
        if pixel_values is None and (pixel_values := self._held_pixels(tokens)) is not None:
            given = self._held_extras(tokens) | given
        if attention_mask is None and self._resembles_held(tokens):
            attention_mask = self._held_mask(tokens)
        pixel_values, given = self.from_hf_layout(pixel_values, given)
        return self._placed(Inputs(tokens, pixel_values, attention_mask, roles, given))

    def _refuse_unknown(self, extras: Mapping[str, Any]) -> None:
        known = (*INPUTS, *self.extra_inputs)
        unknown = next((name for name in extras if name not in known), None)
        if unknown is not None:
            raise LensError(f"unknown input {unknown!r}{nearest(unknown, known)}; known: {', '.join(known)}")

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Pixel values as a processor of transformers lays them out, as pictures `[picture, channel, height, width]`.

        Both come back; what is in this form already stays as it is. A subclass says how its processor lays them out.
        """
        return pixels, extras

    def for_hf(self, inputs: Inputs) -> dict[str, Tensor]:
        """The tensors of inputs as the model of transformers takes them."""
        return inputs.for_hf()

    def inputs_beside(self, named: Mapping[str, Any]) -> Inputs:
        """The inputs that a stream comes from: given by name beside it, or those looked at."""
        if named.get("input_ids") is not None:
            return self.read_inputs(**named)
        if self._held is None:
            raise LensError("positions and mask of this model depend on its inputs: pass **inputs beside the stream")
        return self._held

    def _placed(self, inputs: Inputs) -> Inputs:
        device = self.cfg.device
        held = (inputs.tokens, inputs.pixels, inputs.attention_mask, *inputs.extras.values())
        here = all(tensor is None or tensor.device == device for tensor in held)
        return inputs if here else inputs.check(self.cfg).to(device)

    def _held_pixels(self, tokens: Tensor) -> Tensor | None:
        """The pictures looked at, once per copy of the batch; None for tokens without image slots (a cached step)."""
        if (
            self._held is None
            or self._held.pixels is None
            or not any(token_facts(tokens, self.cfg.image_token_id).slots)
        ):
            return None
        return self._held.pixels.repeat(self._copies(tokens), 1, 1, 1)

    def _held_extras(self, tokens: Tensor) -> dict[str, Tensor]:
        """The extras of the inputs looked at, once per copy of the batch; tokens may go on behind theirs."""
        assert self._held is not None
        return copied(self._held.extras_over(tokens.shape[1]), self._copies(tokens))

    def _resembles_held(self, tokens: Tensor) -> bool:
        """Whether tokens have their pictures and padding where the inputs looked at have them."""
        held = self._held
        if held is None or held.n_pos != tokens.shape[1]:
            return False
        theirs = held.tokens.repeat(self._copies(tokens), 1).to(tokens.device)
        same = (theirs == self.cfg.image_token_id) == (tokens == self.cfg.image_token_id)
        mask = self._held_mask(tokens)
        return bool(same.all()) and (mask is None or bool((theirs == tokens)[mask.to(tokens.device) == 0].all()))

    def _held_mask(self, like: Tensor) -> Tensor | None:
        """The padding of the inputs looked at, for tokens or a stream of their length."""
        held = self._held
        if held is None or held.attention_mask is None or held.n_pos != like.shape[1]:
            return None
        return held.attention_mask.repeat(self._copies(like), 1)

    def _copies(self, batch: Tensor) -> int:
        rows = len(self._held.tokens) if self._held is not None else 1
        if len(batch) % rows:
            raise LensError(f"{len(batch)} sequences cannot share the pictures of the {rows} looked at")
        return len(batch) // rows

    def read_stream(
        self,
        x: Any,
        *,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        roles: Any = None,
        **extras: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream that `start_at_layer` goes on from, with the tokens (for a loss) and the padding it came from.

        So `**inputs` may stand beside the stream; the pictures are part of it already and are not looked at again.
        """
        self._refuse_unknown(extras)
        if not (isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] == self.cfg.d_model):
            raise LensError(f"start_at_layer needs the stream [batch, pos, {self.cfg.d_model}], got {_brief(x)}")
        return x, input_ids, self._held_mask(x) if attention_mask is None else attention_mask


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
