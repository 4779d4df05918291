"""vLLM-Omni's interface as far as the plugin meets it, without vLLM.

`python -m tests.omni FOLDER` tries the plugin with the engine's own wrapper of pipelines: FOLDER is
where a wheel of vLLM-Omni was unpacked.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DiffusionPipeline

import shiva_dit
from shiva_dit.engines import vllm_omni
from tests import load, tiny

ROOT = "vllm_omni.diffusion"
ADAPTER = f"{ROOT}.models.diffusers_adapter"


@dataclass
class Config:
    """The fields of `OmniDiffusionConfig` that are read here."""

    model: str
    custom_pipeline_args: Any = None
    dtype: Any = torch.float32
    model_class_name: str = "ShivaDiffusersPipeline"
    diffusers_load_kwargs: dict[str, Any] = field(default_factory=dict)
    diffusers_call_kwargs: dict[str, Any] = field(default_factory=dict)
    parallel_config: Any = field(
        default_factory=lambda: types.SimpleNamespace(
            tensor_parallel_size=1, cfg_parallel_size=1, sequence_parallel_size=1
        )
    )
    diffusion_attention_config: Any = field(
        default_factory=lambda: types.SimpleNamespace(
            default=types.SimpleNamespace(backend="TORCH_SDPA")
        )
    )

    def __getattr__(self, name: str) -> Any:
        """What nobody has asked for."""
        if name.startswith("__"):
            raise AttributeError(name)
        return "none" if name == "cache_backend" else None


class Wrapper(torch.nn.Module):
    """What the plugin needs of `DiffusersAdapterPipeline`: it loads, and calls, a pipeline."""

    def __init__(self, *, od_config: Any, device: Any = None) -> None:
        super().__init__()
        self.od_config, self.device = od_config, device

    def load_weights(self) -> None:
        self._pipeline = DiffusionPipeline.from_pretrained(
            self.od_config.model, torch_dtype=self.od_config.dtype
        ).to(self.device)

    def forward(self, req: Any) -> Any:
        with torch.inference_mode():
            return types.SimpleNamespace(output=self._pipeline(**vars(req)).images)


@contextmanager
def engine(wrapper: Any, **modules: Any) -> Iterator[dict[str, tuple[str, str]]]:
    """Within: the engine's modules can be imported; what is registered lands in the dictionary."""
    found: dict[str, tuple[str, str]] = {}
    held: dict[str, dict[str, Any]] = {
        f"{ROOT}.registry": {
            "register_diffusion_model": lambda arch, module, name: found.update(
                {arch: (module, name)}
            )
        },
        f"{ROOT}.distributed.utils": {"get_local_device": lambda: torch.device("cpu")},
        ADAPTER: {"DiffusersAdapterPipeline": wrapper},
        **modules,
    }
    names = {name.rsplit(".", cut)[0] for name in held for cut in range(name.count(".") + 1)}
    made: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    for name, values in held.items():
        vars(made[name]).update(values)
    with mock.patch.dict(sys.modules, made):
        vllm_omni.pipeline_class.cache_clear()
        yield found
    vllm_omni.pipeline_class.cache_clear()


def saved(folder: Path) -> tuple[Config, Any, Any]:
    """A pipeline and an adapter in folders, what names both, and the two."""
    pipe = load.build(folder)
    pipe.save_pretrained(folder / "pipeline")
    adapter = tiny.adapter(pipe.transformer)
    adapter.save_pretrained(folder / "adapter")
    asked = {"shiva_dit": {"adapter": str(folder / "adapter"), "keep_ratio": 0.5}}
    return Config(str(folder / "pipeline"), asked), pipe, adapter


def real_wrapper(source: Path) -> Any:
    """The engine's own class, from its file; what that takes from vLLM stands in."""

    class Given:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    class Profiler:
        def setup_diffusion_pipeline_profiler(self, **options: Any) -> None:
            assert not options["enable_diffusion_pipeline_profiler"]

    def given(**values: Any) -> Any:
        return values

    held = {
        f"{ROOT}.data": given(
            DiffusionOutput=Given, OmniDiffusionConfig=Config, resolve_video_num_frames=None
        ),
        f"{ROOT}.request": given(resolve_video_num_frames=None),
        f"{ROOT}.profiler.diffusion_pipeline_profiler": given(
            DiffusionPipelineProfilerMixin=Profiler
        ),
        f"{ROOT}.worker.request_batch": given(DiffusionRequestBatch=Given),
        "vllm_omni.inputs.data": given(
            OmniPromptType=Given, OmniTextPrompt=dict, OmniDiffusionSamplingParams=Given
        ),
        "vllm_omni.platforms": given(current_omni_platform=None),
        "vllm_omni.quantization": {},
    }
    folder = source / "vllm_omni" / "diffusion" / "models" / "diffusers_adapter"
    with engine(None, **held):
        for name in ("quantization_utils", "pipeline_utils", "pipeline_diffusers_adapter"):
            spec = importlib.util.spec_from_file_location(
                f"{ADAPTER}.{name}", folder / f"{name}.py"
            )
            assert spec is not None
            assert spec.loader is not None
            sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module.DiffusersAdapterPipeline, held


def main(source: Path) -> None:
    """Make a picture through the engine's own wrapper, and hold it to the pipeline's."""
    wrapper, held = real_wrapper(source)
    with tempfile.TemporaryDirectory() as made:
        config, pipe, adapter = saved(Path(made))
        with engine(wrapper, **held):
            served = vllm_omni.ShivaDiffusersPipeline(od_config=config)
            served.load_weights(iter(()))
            sampling = types.SimpleNamespace(
                height=32,
                width=32,
                num_inference_steps=3,
                guidance_scale=3.0,
                max_sequence_length=load.TEXT_TOKENS,
                output_type="np",
                num_outputs_per_prompt=1,
                generator=torch.Generator().manual_seed(1),
                seed=None,
                enable_frame_interpolation=False,
            )
            request = types.SimpleNamespace(sampling_params=sampling, prompts=["a fox"])
            picture = served.forward(request).output
        shiva_dit.apply(pipe, adapter, keep_ratio=0.5)
        given = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0}
        alone = pipe(
            "a fox",
            **given,
            max_sequence_length=load.TEXT_TOKENS,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        assert (picture == alone).all()
    sys.stdout.write(f"the picture is the pipeline's, to the bit: {shiva_dit.summary(pipe)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
