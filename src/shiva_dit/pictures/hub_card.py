"""The README.md of an adapter that is published: use, figures of its training, provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import ModelCardData

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.demo.tasks import TASKS

TAGS = ["shiva-dit", "token-pruning", "diffusion"]
NOT_KNOWN = "not known"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a card is written from."""

    adapter: ShivaAdapter
    """Without anything that names a place on the user's machine."""
    name: str
    repository: str
    license: str | None
    prompts: tuple[str, ...]
    result: Mapping[str, Any] | None
    """The run's `result.json`; None of an older version's run, or of an adapter without its run."""
    look: Mapping[str, Any] | None
    """The line of the log that tells of the adapter's held-out error."""
    pictures: Sequence[str]
    """Those that lie in the folder."""


def hub_card(facts: Facts) -> str:
    """The card's text, front matter first."""
    parts = [
        f"---\n{front_matter(facts)}\n---",
        f"# {facts.name}",
        _about(facts),
        f"## Use\n\n```python\n{snippet(facts)}```",
        f"## Figures\n\n{_tables(facts, figures)}\n\n{_notes(facts)}".rstrip(),
        _pictures(facts),
        _prompts(facts),
        f"## Provenance\n\n{_tables(facts, origin)}",
        "The schedule and all settings of the training are in `config.json`"
        + (", the recipe in `recipe.toml`." if "recipe.toml" in facts.pictures else "."),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(facts: Facts) -> str:
    """What the Hub reads."""
    config = facts.adapter.config
    data = ModelCardData(
        base_model=config.base_model,
        library_name="diffusers",
        license=facts.license,
        tags=[*TAGS, config.base_model_class],
    )
    given: dict[str, Any] = {}
    if config.base_model is not None:
        given["base_model_relation"] = "adapter"
    if facts.prompts:
        given["widget"] = [{"text": prompt} for prompt in facts.prompts]
    return ModelCardData(**data.to_dict(), **given).to_yaml().strip()


def _tables(facts: Facts, of: Callable[[Facts], Mapping[str, str]]) -> str:
    """A table, or one of each expert under its name."""
    parts = facts.adapter.parts
    if parts is None or parts.grouping.kind != "experts":
        return _table(of(facts))
    names = [parts.grouping.first, *parts.others]
    each = [(name, replace(facts, adapter=facts.adapter.part(name))) for name in names]
    return "\n\n".join(f"### {name}\n\n{_table(of(one))}" for name, one in each)


def _about(facts: Facts) -> str:
    config = facts.adapter.config
    base = config.base_model
    of = f"`{base}`" if base else f"models of the class `{config.base_model_class}`"
    return (
        f"An adapter of `shiva-dit` (Python) for {of}. Each block of "
        "the transformer runs on a learned part of the image tokens, "
        f"{facts.adapter.schedule.mean_keep_ratio:.0%} of them on average over the sampler's steps "
        f"and the blocks that are pruned. What training did to the backbone: {config.backbone}."
        + _both(facts.adapter)
    )


def _both(adapter: ShivaAdapter) -> str:
    """Of an adapter for two transformers, what it is for."""
    if adapter.parts is None or adapter.parts.grouping.kind != "experts":
        return ""
    boundary = adapter.parts.grouping.boundary_ratio
    meet = "" if boundary is None else f", which meet at `boundary_ratio = {boundary:g}`"
    return (
        ' It is for both transformers of the pipeline: these figures are of "high", for the '
        f'noisy steps, "low" for the others stands below{meet}.'
    )


def snippet(facts: Facts) -> str:
    """Python that applies it."""
    scales = facts.adapter.trained_for_guidance
    guidance = "" if scales is None else f", guidance_scale={sum(scales) / 2:g}"
    prompt = facts.prompts[0] if facts.prompts else "a photo of a cat on a bench"
    task = _recipe(facts).get("task")
    if task in TASKS and facts.adapter.config.base_model is None:
        return (
            "import shiva_dit\n"
            "from shiva_dit.demo.base import load_backbone\n"
            "from shiva_dit.demo.tasks import load_task\n\n"
            f'task = load_task("{task}")\n'
            "model = load_backbone(task)\n"
            f'shiva_dit.apply(model, "{facts.repository}")\n'
            "pipe = task.pipeline(model)  # takes prompt_embeds, as task.conditioning makes them\n"
        )
    base = facts.adapter.config.base_model or "the/base-model"
    return (
        "import shiva_dit\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)\n'
        'pipe.to("cuda")\n'
        f'shiva_dit.apply(pipe, "{facts.repository}")\n'
        f"image = pipe({prompt!r}{guidance}).images[0]\n"
    )


def figures(facts: Facts) -> dict[str, str]:
    """What is known of the adapter, by what it is."""
    adapter, result, look = facts.adapter, facts.result or {}, facts.look or {}
    scales, cost = adapter.trained_for_guidance, result.get("cost") or {}
    found = {
        "tokens kept, mean": f"{adapter.schedule.mean_keep_ratio:.1%}",
        "mean over": f"{adapter.schedule.law.name} steps",
        "FLOPs of a forward saved": NOT_KNOWN,
        "held-out error": NOT_KNOWN,
    }
    if adapter.budgets:
        trained = sorted(one.config.keep_ratio for one in (adapter, *adapter.budgets))
        found["for `keep_ratio=`"] = (
            f"{trained[0]:g} to {trained[-1]:g}, between those trained: "
            + ", ".join(f"{ratio:g}" for ratio in trained)
        )
    if "flops_dense" in cost:
        saved = 1.0 - cost["flops_pruned"] / cost["flops_dense"]
        found["FLOPs of a forward saved"] = (
            f"{saved:.1%} ({cost['flops_pruned'] / 1e9:.4g} G of {cost['flops_dense'] / 1e9:.4g} "
            f"G, {cost['num_tokens']} image and {cost['text_tokens']} text tokens)"
        )
    if "held_out" in look:
        found["held-out error"] = f"{look['held_out']:.4g}"
    if "held_out_guided" in look:
        found["held-out error, guided"] = f"{look['held_out_guided']:.4g}"
    if scales is not None:
        found["trained for guidance"] = f"{scales[0]:g} to {scales[1]:g}"
    found["steps of training"] = _steps(facts)
    found["time of training"] = NOT_KNOWN
    if "seconds" in result:
        processes = result.get("processes", 1)
        by = "1 process" if processes == 1 else f"{processes} processes"
        found["time of training"] = f"{_duration(result['seconds'])}, {by} ({result['device']})"
    return found


def _steps(facts: Facts) -> str:
    steps, stop = facts.adapter.training_record.get("steps"), None
    if isinstance(facts.adapter.training_record.get("early_stop"), dict):
        stop = facts.adapter.training_record["early_stop"]
    if steps is None:
        return NOT_KNOWN
    if stop is None:
        return f"{steps:,}"
    ended = "stopped early" if stop.get("stopped_early") else "run to its end"
    return f"{steps:,}, the best of {stop.get('steps_run'):,} ({ended})"


def _notes(facts: Facts) -> str:
    notes = []
    if "held_out" in (facts.look or {}):
        notes.append(
            "The held-out error is the mean squared error of the prediction to the unpruned "
            "model's, on samples that were not trained on."
        )
    else:
        notes.append(
            "No held-out error was measured: the run was not looked at (`watch.every`), or its log "
            "is not at hand."
        )
    if facts.result is None:
        notes.append("The run's `result.json` is not at hand: what it cost and saves isn't known.")
    return " ".join(notes)


def _pictures(facts: Facts) -> str:
    shown = {
        "examples.png": "Prompts by the unpruned model and with the adapter, from the same noise.",
        "look.png": "The last look of the training: unpruned, pruned, and which tokens were kept.",
        "curves.png": "The training.",
    }
    found = [
        f"![{about}](pictures/{name})\n\n{about}"
        for name, about in shown.items()
        if name in facts.pictures
    ]
    return "## Pictures\n\n" + ("\n\n".join(found) or "There are none of this training.")


def _prompts(facts: Facts) -> str:
    if not facts.prompts:
        return ""
    return "## Prompts\n\n" + "\n".join(f"- {prompt}" for prompt in facts.prompts)


def origin(facts: Facts) -> dict[str, str]:
    """Where it came from."""
    record = facts.adapter.training_record
    backbone, data = _dict(record, "backbone"), _dict(record, "data")
    made = _dict(record, "provenance")
    versions = _dict(made, "versions")
    commit = made.get("commit")
    samples = data.get("samples")
    return {
        "base model": f"{backbone.get('class', facts.adapter.config.base_model_class)}, "
        f"weights' SHA-256 {_code(backbone.get('sha256'))}",
        "data": f"{data.get('name') or 'without a name'}, "
        + (f"{samples:,} samples, " if isinstance(samples, int) else "")
        + f"digest {_code(data.get('identity'))}",
        "shiva-dit": f"commit {_code(commit)}" + (" with changes" if made.get("dirty") else ""),
        "versions": ", ".join(f"{n} {v}" for n, v in sorted(versions.items()) if v) or NOT_KNOWN,
        "python": str(made.get("python", NOT_KNOWN)),
        "hardware": str(made.get("device", NOT_KNOWN)),
    }


def _recipe(facts: Facts) -> Mapping[str, Any]:
    return _dict(facts.adapter.training_record, "recipe")


def _dict(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _code(value: Any) -> str:
    return NOT_KNOWN if value in (None, "not given") else f"`{value}`"


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _duration(seconds: float) -> str:
    """In words.

    >>> _duration(5025.3), _duration(42.4)
    ('1 h 24 min', '42 s')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
