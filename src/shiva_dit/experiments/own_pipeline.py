"""A pipeline of a user's, and pictures of prompts from a file."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn

from shiva_dit.config import whole_number
from shiva_dit.demo.base import usable_device
from shiva_dit.experiments.scoring import following
from shiva_dit.pictures.generate import Wanted
from shiva_dit.pictures.prompts import Prompt, read_prompts
from shiva_dit.pictures.samplers import Sampler, solver, steps_by
from shiva_dit.provenance import data_digest, file_digest, module_digest


class OwnPipeline:
    """A pipeline of diffusers and its first prompts.

    Args:
        pipeline: Folder or Hub id.
        prompts: A file of prompts, as `pictures.prompts.read_prompts` takes it.
        count: How many of them are needed.
        size: Height and width of its pictures in pixels; its own by default.
        lora: A LoRA as diffusers loads it, a file or a folder.
        device: Where it runs; it goes there when it is first used.

    Raises:
        ValueError: If there is no such device, or there are fewer prompts.
    """

    def __init__(
        self,
        pipeline: str,
        prompts: Path,
        count: int,
        *,
        size: tuple[int, int] | None = None,
        lora: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.prompts = first_prompts(prompts, count)
        self._pipe: Any = DiffusionPipeline.from_pretrained(pipeline)
        self._device = usable_device(device)
        self._lora, self._scheduler = lora, self._pipe.scheduler
        self._size = {}
        if size is not None:
            self._size = dict(zip(("height", "width"), size, strict=True))
            check_size(self._pipe, size)

    @cached_property
    def identity(self) -> str:
        """Digest of all weights and of the prompts; a large pipeline's takes a while."""
        parts = sorted(self._pipe.components.items())
        weights = [module_digest(part) for _, part in parts if isinstance(part, nn.Module)]
        said = [[prompt.id, prompt.text] for prompt in self.prompts]
        return data_digest([weights, said, *lora_digests(self._lora)])

    @property
    def transformer(self) -> Any:
        """As it was loaded, on the device: leave it as it is."""
        return self._pipe.to(self._device).transformer

    def around(self, transformer: Any) -> Any:
        """The pipeline's other parts, on the device, around a transformer."""
        self._pipe.to(self._device)
        made = type(self._pipe)(**{**self._pipe.components, "transformer": transformer})
        made.set_progress_bar_config(disable=True)
        return with_lora(made, self._lora)

    def pictures(
        self,
        pipe: Any,
        places: Sequence[int],
        *,
        seed: int,
        num_steps: int,
        sampler: Sampler,
        guidance: float,
    ) -> Float[Tensor, "N C H W"]:
        """Decoded pictures in [-1, 1], on the CPU; `generate` begins from the same noise.

        Args:
            pipe: From `around`, with or without something on its transformer.
            places: Of which prompts.
            seed: Of all noise.
            num_steps: Sampler steps.
            sampler: How they are made.
            guidance: Guidance scale; 1 is none.
        """
        wanted = [Wanted(self.prompts[place], seed) for place in places]
        pipe.scheduler = solver(self._scheduler, sampler)
        with following(pipe):
            images: Tensor = pipe(
                prompt=[one.prompt.text for one in wanted],
                guidance_scale=guidance,
                generator=[one.generator() for one in wanted],
                output_type="pt",
                **self._size,
                **steps_by(sampler, num_steps),
            ).images
        return 2.0 * images.float().cpu() - 1.0


def check_size(pipe: Any, size: tuple[int, int]) -> None:
    """Raise where a pipeline says by itself that it makes no pictures of a size.

    Raises:
        ValueError: Says which it makes.
    """
    for side in size:
        whole_number("size", side, least=1)
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    known = [*inspect.signature(check).parameters.values()]
    given = {p.name: None for p in known if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    sides = {"prompt": "a picture", "height": size[0], "width": size[1]}
    given |= {name: value for name, value in sides.items() if name in {p.name for p in known}}
    try:
        check(**given)
    except (ValueError, TypeError, AttributeError) as error:  # it may miss what it isn't given
        if "height" in str(error):
            raise ValueError(f"size: {error} (got {size[0]} x {size[1]})") from error


def with_lora(pipe: Any, lora: Path | None) -> Any:
    """The pipeline, with a LoRA of the user's loaded.

    Raises:
        ValueError: If there is none, or diffusers can't load it.
    """
    if lora is None:
        return pipe
    if not lora.exists():
        raise ValueError(f"lora: there is no file or folder {lora}.")
    try:
        pipe.load_lora_weights(lora.parent if lora.is_file() else lora, **_named(lora))
    except Exception as error:  # whatever diffusers and PEFT raise on what is no LoRA of it
        raise ValueError(
            f"lora: diffusers can't load {lora} into this pipeline: {error}"
        ) from error
    return pipe


def _named(lora: Path) -> dict[str, str]:
    return {"weight_name": lora.name} if lora.is_file() else {}


def lora_digests(lora: Path | None) -> list[str]:
    """Of the files of a LoRA; none without one."""
    if lora is None:
        return []
    files = [lora] if lora.is_file() else sorted(lora.glob("*.safetensors"))
    return [file_digest(file) for file in files]


def first_prompts(path: Path, count: int) -> list[Prompt]:
    """The first prompts of a file.

    Raises:
        ValueError: If there are fewer.
    """
    prompts = read_prompts(path)
    if len(prompts) < count:
        raise ValueError(f"{path} has {len(prompts)} prompts, and count asks for {count} pictures.")
    return prompts[:count]


def twin(model: Any, *, own_weights: bool) -> Any:
    """A copy of a model; its tensors are copied, or shared with the model."""
    tensors = () if own_weights else (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
