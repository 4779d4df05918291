"""What an adapter can be put on: wrapped models, pipelines of two transformers, and their sizes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import CogVideoXTransformer3DModel, UniPCMultistepScheduler, WanPipeline
from peft import LoraConfig, PeftModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shiva_dit
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.families import model_spec
from shiva_dit.models.target import unwrapped
from tests import families, running, tiny
from tests.matrix import sampled

COUNTS = [[64, 5, 30, 17], [64, 33, 2, 48], [64, 63, 20, 9]]
ABSENT: Any = None


def adapter(model: Any, counts: list[list[int]] = COUNTS) -> Any:
    return tiny.adapter(model, families.schedule(model, counts))


# --- wrappers -----------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Any] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "distributed": DistributedDataParallel,
    "compiled, distributed": lambda model: torch.compile(
        DistributedDataParallel(model), backend="eager"
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_seen_through(wrapper: str, group: None) -> None:
    model = tiny.sd3()
    made = adapter(model)
    bare = tiny.run(model, tiny.inputs())
    wrapped = WRAPPERS[wrapper](model)
    before = tiny.footprint(model)
    assert shiva_dit.apply(wrapped, made) is wrapped
    assert unwrapped(wrapped) is model
    attachment = attachment_of(model)
    assert attachment is not None
    pruned = tiny.run(model, tiny.inputs())
    assert not torch.equal(pruned, bare)
    assert shiva_dit.summary(wrapped).num_tokens == 64
    with shiva_dit.disabled(wrapped):
        assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    with shiva_dit.guided(wrapped, passes="both"):
        assert not torch.equal(tiny.run(model, tiny.inputs()), pruned)
    shiva_dit.compile(wrapped, backend="eager")
    assert all("_compiled_call_impl" in block.__dict__ for block in attachment.blocks)
    shiva_dit.apply(wrapped, made)
    assert attachment_of(model) is not attachment
    assert torch.equal(tiny.run(model, tiny.inputs()), pruned)
    shiva_dit.remove(wrapped)
    assert attachment_of(model) is None
    assert tiny.footprint(model) == before


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: PeftModel(model, LoraConfig(r=2, target_modules=["to_q"])), r"add_adapter"),
        (nn.DataParallel, r"pass the model itself \(.module\)"),
    ],
)
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_wrappers_that_call_past_the_model_are_refused(
    in_pipeline: bool, wrap: Any, message: str
) -> None:
    model = tiny.sd3()
    made, wrapped = adapter(model), wrap(model)
    before = tiny.footprint(model)
    target = wrapped
    if in_pipeline:
        target = tiny.pipeline(tiny.sd3())
        target.transformer = wrapped
    with pytest.raises(ValueError, match=rf"is in a {type(wrapped).__name__}, which.*{message}"):
        shiva_dit.apply(target, made)
    assert tiny.footprint(model) == before


def test_a_peft_models_base_is_a_model() -> None:
    wrapped = PeftModel(tiny.sd3(), LoraConfig(r=2, target_modules=["to_q"]))
    base: Any = wrapped.get_base_model()
    bare = tiny.run(base, tiny.inputs())
    shiva_dit.apply(base, adapter(tiny.sd3()))
    assert not torch.equal(tiny.run(base, tiny.inputs()), bare)
    shiva_dit.remove(base)
    assert torch.equal(tiny.run(base, tiny.inputs()), bare)


# --- a second transformer -----------------------------------------------------------------------


def experts() -> Any:
    """Wan 2.2: one transformer for the noisy steps, another for the others."""
    second = families.made("wan")
    tiny.randomize(second, seed=11)
    pipe = WanPipeline(
        tokenizer=ABSENT,
        text_encoder=ABSENT,
        vae=ABSENT,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=families.made("wan"),
        transformer_2=second,
        boundary_ratio=0.6,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def videos(pipe: Any) -> Any:
    return running.call("WanPipeline", pipe, num_inference_steps=4).frames


def kept(model: Any) -> list[tuple[int, int]]:
    """Where an observer writes the block and the number of tokens of each choice."""
    seen: list[tuple[int, int]] = []
    attachment = attachment_of(model)
    assert attachment is not None
    attachment.forwards.observer = lambda block, chosen: seen.append((block, chosen.shape[1]))
    return seen


def test_each_transformer_gets_an_adapter_of_its_own() -> None:
    pipe = experts()
    bare = videos(pipe)
    models = pipe.transformer, pipe.transformer_2
    before = [tiny.footprint(model) for model in models]
    first, second = adapter(models[0]), adapter(models[1], [[64, 8, 8, 8]])
    shiva_dit.apply(pipe, first, transformer_2=second)
    seen = [kept(model) for model in models]
    pruned = videos(pipe)
    assert not torch.equal(pruned, bare)
    assert {k for _, k in seen[1]} == {8}
    assert seen[0]
    for model in models:
        attachment = attachment_of(model)
        assert attachment is not None
        assert attachment.counts.clock is not None  # the pipeline's scheduler tells both
        attachment.forwards.observer = None
    summary = shiva_dit.summary(pipe)
    assert summary.transformer_2 is not None
    assert summary.transformer_2.keep_ratio == 8 / 64
    assert str(summary).count("image tokens") == 2
    with shiva_dit.disabled(pipe):
        assert torch.equal(videos(pipe), bare)
    shiva_dit.compile(pipe, backend="eager")
    assert all("_compiled_call_impl" in model.blocks[1].__dict__ for model in models)
    shiva_dit.remove(pipe)
    assert torch.equal(videos(pipe), bare)
    assert [tiny.footprint(model) for model in models] == before


def test_one_adapter_leaves_the_other_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    pipe = experts()
    with caplog.at_level(logging.WARNING, "shiva_dit"):
        shiva_dit.apply(pipe, adapter(pipe.transformer))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "second transformer stays dense" in said[0]
    assert "transformer_2=" in said[0]
    assert attachment_of(pipe.transformer_2) is None
    assert shiva_dit.summary(pipe, num_tokens=64).transformer_2 is None


def test_both_or_none() -> None:
    pipe = experts()
    good, wrong = adapter(pipe.transformer), adapter(families.made("flux"))
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        shiva_dit.apply(pipe, good, transformer_2=wrong)
    with pytest.raises(ValueError, match="timesteps name the calls of one model"):
        shiva_dit.apply(pipe, good, transformer_2=good, timesteps=[1000.0, 500.0])
    for model in (pipe.transformer, pipe.transformer_2):
        assert attachment_of(model) is None
    single = tiny.pipeline(tiny.sd3())
    made = adapter(single.transformer)
    with pytest.raises(ValueError, match="transformer_2 was passed, but StableDiffusion3Pipeline"):
        shiva_dit.apply(single, made, transformer_2=made)
    assert attachment_of(single.transformer) is None


def test_options_hold_for_both() -> None:
    pipe = experts()
    shiva_dit.apply(
        pipe,
        adapter(pipe.transformer),
        transformer_2=adapter(pipe.transformer_2),
        keep_ratio=0.5,
        multiple=8,
    )
    first, second = (attachment_of(m) for m in (pipe.transformer, pipe.transformer_2))
    assert first is not None
    assert second is not None
    assert first.counts.table(64).counts == second.counts.table(64).counts
    assert {k % 8 for row in second.counts.table(64).counts for k in row} == {0}


def test_a_pipeline_whose_first_transformer_is_left_out() -> None:
    """Wan 2.2's second expert alone, for the last steps of a video."""
    pipe = experts()
    pipe.transformer = None
    shiva_dit.apply(pipe, adapter(pipe.transformer_2))
    assert attachment_of(pipe.transformer_2) is not None
    shiva_dit.remove(pipe)
    assert attachment_of(pipe.transformer_2) is None


# --- sizes --------------------------------------------------------------------------------------


@sampled("name")
def test_a_summary_needs_no_number_after_a_forward(name: str) -> None:
    model = families.made(name)
    spec = model_spec(model)
    shiva_dit.apply(model, adapter(model), multiple=spec.least_tokens)
    own = spec.own_tokens(model)
    if own is None:
        with pytest.raises(ValueError, match=r"states no size.*pass num_tokens, or generate once"):
            shiva_dit.summary(model)
    else:
        assert shiva_dit.summary(model).num_tokens == own
    given = families.arguments(name)
    narrow = families.FAMILIES[name].narrow
    for arguments, tokens in ((given, 64), ({**given, **(narrow or dict)(given)}, 32)):
        if tokens == 64 or narrow is not None:
            with torch.no_grad():
                families.run(model, arguments)
            assert shiva_dit.summary(model).num_tokens == tokens
    assert shiva_dit.summary(model, num_tokens=128).num_tokens == 128


def test_own_sizes_of_real_configurations() -> None:
    with torch.device("meta"):
        two, fifteen = (
            CogVideoXTransformer3DModel(num_layers=1, **options)
            for options in ({}, {"sample_frames": 81, "patch_size_t": 2, "patch_bias": False})
        )
    assert model_spec(two).own_tokens(two) == 13 * 30 * 45
    assert model_spec(fifteen).own_tokens(fifteen) == 11 * 30 * 45  # 21 frames, two to a token


def test_of_modules_that_are_none_the_class_is_named() -> None:
    with pytest.raises(ValueError, match="Linear is not supported"):
        shiva_dit.remove(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="str has no transformer"):
        shiva_dit.remove("a string")


# --- times and rows by token --------------------------------------------------------------------

BY_TOKEN = {"wan": 64, "ltx": 64, "skyreels": 4}


def by_token(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The same call with a time for every token or frame."""
    times = given["timestep"][:, None].expand(-1, BY_TOKEN[name])
    forcing = {"enable_diffusion_forcing": True} if "skyreels" in name else {}
    return {**given, "timestep": times, **forcing}


@pytest.mark.parametrize("name", ["wan", "ltx", "skyreels"])
def test_times_that_are_equal_by_token_are_one_time(name: str) -> None:
    """The same tokens, and the same output up to the order of sums, also with pruned rows."""
    model, given = families.made(name), families.arguments(name)
    shiva_dit.apply(model, adapter(model))
    attachment = attachment_of(model)
    assert attachment is not None
    chosen: list[Any] = []
    attachment.forwards.observer = lambda block, tokens: chosen.append(tokens)
    with torch.no_grad():
        once = families.run(model, given)
        each = families.run(model, by_token(name, given))
    assert all(torch.equal(a, b) for a, b in zip(chosen[:3], chosen[3:], strict=True))
    assert torch.allclose(each, once, atol=1e-5)
    wrong = by_token(name, given)
    wrong["timestep"] = wrong["timestep"].clone()
    wrong["timestep"][1, 0] = 0.0
    with pytest.raises(ValueError, match=r"different times for the tokens of a sample, \(2, "):
        families.run(model, wrong)


def test_as_many_tokens_as_modulations_are_no_rows() -> None:
    """Wan's blocks are modulated by (B, 6, D): at six tokens that was gathered like tokens."""
    model, given = families.made("wan"), families.arguments("wan")
    given["hidden_states"] = given["hidden_states"][:, :, :1, :4, :6]
    shiva_dit.apply(model, adapter(model), keep_ratio=0.5)
    attachment = attachment_of(model)
    assert attachment is not None
    chosen: list[Any] = []
    attachment.forwards.observer = lambda block, tokens: chosen.append(tokens)
    with torch.no_grad():
        found = families.run(model, given)
        assert {tokens.shape[1] for tokens in chosen} <= set(range(1, 6))
        times = given["timestep"][:, None].expand(-1, 6)
        by_rows = families.run(model, {**given, "timestep": times})
    # By token the modulation is (B, 6, 6, D) and is gathered: up to the order of sums the same.
    assert torch.allclose(found, by_rows, atol=1e-5)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-image", "qwen-image-edit", "wan"])
def test_one_time_for_all_samples_is_everyones(name: str) -> None:
    """Modular Flux calls so; Qwen's edit model embeds time 0 behind the times that it is given."""
    model, given = families.made(name), families.arguments(name)
    shiva_dit.apply(model, adapter(model))
    attachment = attachment_of(model)
    assert attachment is not None
    chosen: list[Any] = []
    attachment.forwards.observer = lambda block, tokens: chosen.append(tokens)
    with torch.no_grad():
        families.run(model, given)
        families.run(model, {**given, "timestep": given["timestep"][:1]})
    assert all(torch.equal(a, b) for a, b in zip(chosen[:3], chosen[3:], strict=True))


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_remove_takes_both_off_or_none(
    failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = experts()
    first, second = pipe.transformer, pipe.transformer_2
    shiva_dit.apply(pipe, adapter(first), transformer_2=adapter(second, [[64, 8, 8, 8]]))
    expected = videos(pipe)
    attachment = attachment_of(second)
    assert attachment is not None

    def fail() -> None:
        raise failure

    monkeypatch.setattr(attachment, "_take_weights_off", fail)
    with pytest.raises(failure):
        shiva_dit.remove(pipe)
    monkeypatch.undo()
    assert attachment_of(first) is not None
    assert attachment_of(second) is attachment
    assert torch.equal(videos(pipe), expected)
