"""The seam on tiny real SD3 transformers, plain and with dual attention."""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

import shiva_dit
from shiva_dit.core.estimators import EstimatorConfig
from shiva_dit.core.schedule import Schedule
from shiva_dit.methods import plans
from shiva_dit.methods.fixed_map import FixedMapSelector
from shiva_dit.methods.gates import SelectionGates
from shiva_dit.methods.norm import NormSelector
from shiva_dit.methods.random_tokens import RandomSelector
from shiva_dit.methods.shiva import ShivaSelector
from shiva_dit.models import block_hook as seam
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.attachment import Attachment
from shiva_dit.models.cost import pruned_flops
from shiva_dit.models.families import block_spec
from shiva_dit.models.forward import Forwards
from shiva_dit.models.gating import GatedForward
from shiva_dit.models.guidance import Pass
from shiva_dit.models.spec import argument_place
from tests import families, tiny

# k by time bin (t in [0, 1/3], ...) and block: all different, the first block full.
COUNTS = [[64, 5, 30, 17], [64, 33, 1, 48], [64, 63, 20, 9]]
TIMES = (1 / 6, 0.5, 5 / 6)

kinds = pytest.mark.parametrize("kind", tiny.KINDS)


def shiva(model: Any, counts: list[list[int]] = COUNTS, **options: Any) -> Attachment:
    selector = tiny.adapter(model).selector()
    return attach(model, selector, tiny.from_counts(counts), **options)


@contextmanager
def chosen_tokens(attachment: Attachment) -> Iterator[list[tuple[int, Tensor]]]:
    """Within: (block, tokens chosen) of every pruned block that runs."""
    seen: list[tuple[int, Tensor]] = []
    attachment.forwards.observer = lambda block, chosen: seen.append((block, chosen))
    try:
        yield seen
    finally:
        attachment.forwards.observer = None


def keeps_nothing(attachment: Attachment) -> bool:
    states = [hook.slot.state for hook in attachment.hooks]
    empty = all(s.dense and s.terms is None and s.gates is None for s in states)
    return empty and attachment.forwards._context is None


# --- what runs ------------------------------------------------------------------------------


@kinds
def test_ratio_one_is_the_bare_model_to_the_bit(kind: str) -> None:
    model = tiny.sd3(kind)
    bare = tiny.run(model, tiny.inputs())
    attachment = attach(
        model, tiny.adapter(model).selector(), Schedule.uniform(1.0, num_blocks=4, full_blocks=())
    )
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    attachment.detach()
    shiva(model)
    assert not torch.equal(tiny.run(model, tiny.inputs()), bare)


@kinds
def test_gathering_all_tokens_in_any_order_changes_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.sd3(kind)
    bare = tiny.run(model, tiny.inputs())
    generator = torch.Generator().manual_seed(4)
    orders: list[Tensor] = []

    def permutation(scores: Tensor, k: int) -> Tensor:
        assert k == tiny.NUM_TOKENS
        order = torch.rand(scores.shape, generator=generator).argsort(dim=-1)
        orders.append(order)
        return order

    all_tokens = Schedule.uniform(1.0, num_blocks=4, full_blocks=())
    attachment = attach(model, tiny.adapter(model).selector(), all_tokens)

    attachment.forwards.always_select = True
    monkeypatch.setattr(seam, "best_tokens", permutation)
    permuted = tiny.run(model, tiny.inputs())
    assert len(orders) == 4
    assert all(order.sort(-1).values.eq(torch.arange(64)).all() for order in orders)
    # Sums over tokens run in another order. Measured: 1.3e-7 (plain), 1.2e-7 (dual).
    assert (permuted - bare).norm() <= 2e-6 * bare.norm()

    # The check bites: with one token's output put in another's place it is far off.
    monkeypatch.setattr(plans, "scatter_tokens", lambda x, chosen, y: y)
    assert (tiny.run(model, tiny.inputs()) - bare).norm() > 1e-2 * bare.norm()


def count_tokens(model: Any, seen: list[tuple[int, str, int]]) -> Callable[[], None]:
    """Count the image tokens that reach attention and feed-forward of every block."""
    handles = []
    for index, block in enumerate(model.transformer_blocks):
        parts = {"attn": block.attn.to_q, "ff": block.ff}
        if block.attn2 is not None:
            parts["attn2"] = block.attn2.to_q
        for name, part in parts.items():

            def count(
                module: nn.Module, args: Any, output: Tensor, index: int = index, name: str = name
            ) -> None:
                seen.append((index, name, output.shape[1]))

            handles.append(part.register_forward_hook(count))
    return lambda: [handle.remove() for handle in handles] and None


@kinds
def test_exactly_k_tokens_run_in_every_layer_and_step(kind: str) -> None:
    model = tiny.sd3(kind)
    seen: list[tuple[int, str, int]] = []
    count_tokens(model, seen)
    attachment = shiva(model)
    for t, counts in zip(TIMES, COUNTS, strict=True):
        seen.clear()
        with chosen_tokens(attachment) as chosen:
            tiny.run(model, tiny.inputs(t=t))
        parts = {0: 3, 1: 3} if kind == "dual" else {}
        expected = [(b, k) for b, k in enumerate(counts) for _ in range(parts.get(b, 2))]
        assert [(block, k) for block, _, k in seen] == expected
        # ... and they are k different ones of the 64, the same in none of the two samples' order.
        assert [block for block, _ in chosen] == [1, 2, 3]
        for block, indices in chosen:
            assert indices.shape == (2, counts[block])
            assert all(len(set(row)) == counts[block] for row in indices.tolist())
            assert 0 <= indices.min() <= indices.max() < tiny.NUM_TOKENS


@pytest.mark.parametrize("rejected", ["identity", "low_rank"])
@kinds
def test_rejected_tokens_pass_the_block_by_and_chosen_ones_do_not(kind: str, rejected: Any) -> None:
    """Unchanged, or with the cheap update where there is one."""
    model = tiny.sd3(kind)
    made = tiny.adapter(model, rejected=rejected)
    attachment = attach(model, made.selector(), tiny.from_counts(COUNTS), updates=made.updates)
    block = model.transformer_blocks[2]
    tokens: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tokens["text before"], tokens["before"] = (
            kwargs["encoder_hidden_states"],
            kwargs["hidden_states"],
        )
        tokens["text after"], tokens["after"] = output

    block.register_forward_hook(keep, with_kwargs=True)
    embedder = model.time_text_embed.timestep_embedder
    embedder.register_forward_hook(lambda module, args, output: tokens.update(time=output))
    with chosen_tokens(attachment) as chosen:
        tiny.run(model, tiny.inputs(t=TIMES[0]))
    indices = dict(chosen)[2]
    kept = torch.zeros(2, tiny.NUM_TOKENS, dtype=torch.bool).scatter(1, indices, True)
    assert kept.sum(1).tolist() == [30, 30]
    passed_by = tokens["before"]
    if made.updates is not None:
        pooled = tiny.inputs()["pooled_projections"]
        condition = made.updates.condition(tokens["time"], pooled)[2]
        passed_by = passed_by + made.updates.group(2)(passed_by, condition)
        assert (passed_by != tokens["before"]).any(-1).all()
    assert torch.equal((tokens["after"] != passed_by).any(-1), kept)
    assert (tokens["text after"] != tokens["text before"]).any(-1).all()


@kinds
def test_the_highest_scores_are_chosen(kind: str) -> None:
    model = tiny.sd3(kind)
    maps = torch.randn(4, tiny.NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    attachment = attach(model, FixedMapSelector(maps), tiny.from_counts(COUNTS))
    with chosen_tokens(attachment) as chosen:
        tiny.run(model, tiny.inputs(t=TIMES[1]))
    for block, indices in chosen:
        best = maps[block].topk(COUNTS[1][block]).indices.sort().values
        assert torch.equal(indices, best.expand(2, -1))


@kinds
def test_a_batch_of_four_equals_four_singles(kind: str) -> None:
    model = tiny.sd3(kind)
    attachment = shiva(model)
    batch = tiny.inputs(batch=4)
    with chosen_tokens(attachment) as together:
        output = tiny.run(model, batch)
    assert not torch.equal(together[0][1][0], together[0][1][1])  # each sample has its own tokens
    for i in range(4):
        with chosen_tokens(attachment) as alone:
            single = tiny.run(model, {name: value[i : i + 1] for name, value in batch.items()})
        # Tokens, not numbers: at the borders two scores differ by 7e-4 of the largest at least.
        for (_, many), (_, one) in zip(together, alone, strict=True):
            assert torch.equal(many[i : i + 1], one)
        # Matrix products of other sizes sum in another order. Measured: at most 1.8e-7.
        assert (single - output[i : i + 1]).norm() <= 2e-6 * single.norm()


@pytest.mark.parametrize(
    "selector",
    [
        NormSelector(),
        RandomSelector(torch.Generator().manual_seed(0)),
        FixedMapSelector.centre(4, 8, 8),
    ],
    ids=lambda selector: type(selector).__name__,
)
def test_selectors_without_a_router_attach_too(selector: Any) -> None:
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    attachment = attach(model, selector, tiny.from_counts(COUNTS))
    with chosen_tokens(attachment) as chosen:
        output = tiny.run(model, tiny.inputs())
    assert [(block, i.shape[1]) for block, i in chosen] == [(1, 33), (2, 1), (3, 48)]
    assert not torch.equal(output, bare)


def test_a_multiple_of_tokens_is_kept() -> None:
    model = tiny.sd3()
    attachment = shiva(model, multiple=8)
    table = attachment.counts.table(tiny.NUM_TOKENS)
    assert {k % 8 for row in table.counts for k in row} == {0}
    # One step of one of the 9 prunable entries is 8 / (9 * 64); the mean is within half of it.
    target = sum(k for row in COUNTS for k in row[1:]) / (9 * 64)
    assert abs(table.mean_keep_ratio - target) <= 0.5 * 8 / (9 * 64)


@kinds
def test_skipped_layers_do_not_shift_the_others(kind: str) -> None:
    model = tiny.sd3(kind)
    attachment = shiva(model)
    with torch.no_grad(), chosen_tokens(attachment) as chosen:
        model(**tiny.inputs(t=TIMES[0]), skip_layers=[1])
    assert [(block, i.shape[1]) for block, i in chosen] == [(2, 30), (3, 17)]


def test_arguments_may_come_by_position() -> None:
    model = tiny.sd3()
    shiva(model)
    named = tiny.inputs(t=TIMES[2])
    with torch.no_grad():
        positional = model(*named.values()).sample
    assert torch.equal(positional, tiny.run(model, named))


def test_autocast_runs_and_stays_near() -> None:
    model = tiny.sd3()
    shiva(model)
    exact = tiny.run(model, tiny.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny.run(model, tiny.inputs())
    assert torch.isfinite(output).all()
    # bfloat16 has 8 bits, and tokens near the border change places. Measured: 0.014.
    assert (output.float() - exact).norm() <= 0.05 * exact.norm()


# --- time -----------------------------------------------------------------------------------


def test_samples_of_one_forward_share_their_time_bin() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    mixed = {**tiny.inputs(), "timestep": torch.tensor([100.0, 900.0])}
    with pytest.raises(ValueError, match=r"share their time bin.*0\.1.*0\.9.*Split the batch"):
        tiny.run(model, mixed)
    assert keeps_nothing(attachment)
    near = {**tiny.inputs(), "timestep": torch.tensor([400.0, 600.0])}
    with chosen_tokens(attachment) as chosen:
        tiny.run(model, near)
    assert [i.shape[1] for _, i in chosen] == [33, 1, 48]


def test_with_one_bin_any_times_may_be_mixed() -> None:
    model = tiny.sd3()
    attachment = shiva(model, [[64, 10, 20, 30]])
    with chosen_tokens(attachment) as chosen:
        tiny.run(model, {**tiny.inputs(), "timestep": torch.tensor([1.0, 999.0])})
    assert [i.shape[1] for _, i in chosen] == [10, 20, 30]


def test_a_time_outside_the_range_is_refused() -> None:
    model = tiny.sd3()
    shiva(model)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        tiny.run(model, tiny.inputs(t=1.5))


# --- on and off -----------------------------------------------------------------------------


@kinds
def test_detach_leaves_nothing_behind(kind: str) -> None:
    model = tiny.sd3(kind)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    attachment = shiva(model, gate_values=True)
    tiny.run(model, tiny.inputs())
    assert tiny.footprint(model) != before
    assert attachment_of(model) is attachment
    attachment.detach()
    assert tiny.footprint(model) == before
    assert attachment_of(model) is None
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    attachment.detach()
    assert tiny.footprint(model) == before


@kinds
def test_detach_leaves_nothing_behind_after_checkpointing_and_compile(kind: str) -> None:
    model = tiny.sd3(kind)
    model.enable_gradient_checkpointing()
    before = tiny.footprint(model)
    attachment = shiva(model)
    model(**tiny.inputs()).sample.sum().backward()
    model.zero_grad()
    attachment.compile(backend="eager")
    attachment.detach()
    assert tiny.footprint(model) == before


def test_detach_gives_back_the_callers_own_compiled_blocks() -> None:
    model = tiny.sd3()
    block = model.transformer_blocks[1]
    block.compile(backend="eager")
    before = tiny.footprint(model)
    attachment = shiva(model)
    attachment.compile(backend="eager")
    attachment.detach()
    assert tiny.footprint(model) == before


@kinds
def test_the_state_dict_is_the_models_own_while_attached(kind: str) -> None:
    model = tiny.sd3(kind)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    shiva(model, gate_values=True)
    tiny.run(model, tiny.inputs())
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert [name for name, _ in model.named_modules()] == names


def test_other_hooks_stay() -> None:
    model = tiny.sd3()
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    class Note(ModelHook):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.name)
            return args, kwargs

    def add(when: str) -> None:
        block = model.transformer_blocks[1]
        model.register_forward_hook(note(f"model {when}"))
        block.register_forward_pre_hook(note(f"block {when}"))
        registry = HookRegistry.check_if_exists_or_initialize(block)
        registry.register_hook(Note(f"diffusers {when}"), when)

    add("before")
    bare = tiny.run(model, tiny.inputs())
    attachment = shiva(model)
    add("after")
    tiny.run(model, tiny.inputs())
    attachment.detach()
    calls.clear()
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert sorted(calls) == sorted(
        f"{where} {when}"
        for where in ("model", "block", "diffusers")
        for when in ("before", "after")
    )


@kinds
def test_attaching_again_replaces(kind: str) -> None:
    model = tiny.sd3(kind)
    bare, before = tiny.run(model, tiny.inputs()), tiny.footprint(model)
    second = [[64, 40, 40, 40]]
    attachment = shiva(model, second)
    alone = tiny.run(model, tiny.inputs())
    attachment.detach()

    shiva(model)
    first = tiny.run(model, tiny.inputs())
    attachment = shiva(model, second)
    assert torch.equal(tiny.run(model, tiny.inputs()), alone)
    assert not torch.equal(first, alone)
    attachment.detach()
    assert tiny.footprint(model) == before
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)


def test_nothing_is_kept_between_forwards() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    first = tiny.run(model, tiny.inputs(t=TIMES[0]))
    assert keeps_nothing(attachment)
    tiny.run(model, tiny.inputs(batch=3, t=TIMES[1], seed=1))
    assert torch.equal(tiny.run(model, tiny.inputs(t=TIMES[0])), first)


class BoomError(Exception):
    pass


@kinds
@pytest.mark.parametrize("where", ["block", "embedder"])
def test_an_exception_inside_leaves_no_state(kind: str, where: str) -> None:
    model = tiny.sd3(kind)
    attachment = shiva(model)
    expected = tiny.run(model, tiny.inputs())

    def fail(*_: Any) -> None:
        raise BoomError

    part = model.transformer_blocks[2].ff if where == "block" else model.time_text_embed
    handle = part.register_forward_hook(fail)
    with pytest.raises(BoomError):
        tiny.run(model, tiny.inputs())
    handle.remove()
    assert keeps_nothing(attachment)
    assert torch.equal(tiny.run(model, tiny.inputs()), expected)


def test_an_interrupted_forward_does_not_reach_the_dense_model() -> None:
    """Ctrl-C skips torch's hooks; the next forward must not meet the state it left."""
    model = tiny.sd3()
    bare = tiny.run(model, tiny.inputs())
    attachment = shiva(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(model, tiny.inputs())
    handle.remove()
    attachment.enabled = False
    assert torch.equal(tiny.run(model, tiny.inputs()), bare)
    assert keeps_nothing(attachment)


def test_an_exception_while_attaching_leaves_nothing_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)
    real = HookRegistry.register_hook

    def fail_on_third(self: HookRegistry, hook: Any, name: str) -> None:
        if hook.index == 2:
            raise BoomError
        real(self, hook, name)

    monkeypatch.setattr(HookRegistry, "register_hook", fail_on_third)
    with pytest.raises(BoomError):
        shiva(model)
    assert tiny.footprint(model) == before
    assert attachment_of(model) is None


def test_an_attached_model_cannot_be_copied_and_a_detached_one_can() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    with pytest.raises(RuntimeError, match=r"cannot be deep-copied.*shiva_dit\.remove"):
        copy.deepcopy(model)
    attachment.detach()
    twin = copy.deepcopy(model)
    tiny.randomize(twin, seed=9)
    assert torch.equal(tiny.run(twin, tiny.inputs()), tiny.run(tiny.sd3(seed=9), tiny.inputs()))


# --- errors ---------------------------------------------------------------------------------


def test_a_schedule_of_another_depth_is_refused() -> None:
    model = tiny.sd3()
    before = tiny.footprint(model)
    with pytest.raises(ValueError, match=r"schedule is for 5 blocks, SD3Transformer2DModel has 4"):
        attach(model, NormSelector(), Schedule.uniform(0.5, num_blocks=5))
    assert tiny.footprint(model) == before


def test_an_unsupported_model_is_refused_with_the_reason() -> None:
    sana = families.unsupported()
    message = "SanaTransformer2DModel can't be served: its feed-forward is a convolution"
    for call in (attachment_of, lambda m: attach(m, NormSelector(), tiny.from_counts(COUNTS))):
        with pytest.raises(ValueError, match=message):
            call(sana)
    with pytest.raises(ValueError, match="class SanaTransformerBlock are not supported"):
        block_spec(sana.transformer_blocks[0])
    message = r"Linear is not supported\. Supported: .*, SD3Transformer2DModel"
    with pytest.raises(ValueError, match=message):
        attachment_of(nn.Linear(1, 1))


def test_a_block_without_the_expected_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear.forward has no argument 'hidden_states'.*input"):
        argument_place(nn.Linear(1, 1), "hidden_states")


def test_a_subclass_of_a_supported_model_is_supported() -> None:
    model = tiny.sd3()
    model.__class__ = type("Renamed", (type(model),), {})  # as FSDP2 does
    for block in model.transformer_blocks:
        block.__class__ = type("RenamedBlock", (type(block),), {})
    attachment = shiva(model)
    with chosen_tokens(attachment) as chosen:
        tiny.run(model, tiny.inputs(t=TIMES[0]))
    assert [i.shape[1] for _, i in chosen] == [5, 30, 17]


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (65, r"k must lie in \[1, N\] = \[1, 64\], got 65"),
        (0, r"k must lie in \[1, N\] = \[1, 64\], got 0"),
    ],
)
def test_k_outside_its_range_is_refused(k: int, message: str) -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    forward = GatedForward(counts=[64, k, 10, 10], gates=lambda block: None)
    with pytest.raises(ValueError, match=message), attachment.forwards.gated(forward):
        tiny.run(model, tiny.inputs())
    assert keeps_nothing(attachment)


def test_counts_for_another_depth_are_refused() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    forward = GatedForward(counts=[64, 10], gates=lambda block: None)
    message = "expected k for 4 blocks, got 2 values"
    with pytest.raises(ValueError, match=message), attachment.forwards.gated(forward):
        tiny.run(model, tiny.inputs())
    assert keeps_nothing(attachment)


@pytest.mark.parametrize("name", ["hidden_states", "pooled_projections", "timestep"])
def test_a_call_without_what_the_hooks_need_is_refused(name: str) -> None:
    attachment = shiva(tiny.sd3())
    arguments = tiny.inputs()
    del arguments[name]
    with pytest.raises(ValueError, match=f"SD3Transformer2DModel was called without '{name}'"):
        tiny.run(attachment.model, arguments)
    assert keeps_nothing(attachment)


def test_a_second_thread_is_refused_and_does_not_disturb_the_first() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    expected = tiny.run(model, tiny.inputs(t=TIMES[0]))
    errors: list[str] = []

    def other() -> None:
        try:
            tiny.run(model, tiny.inputs(t=TIMES[1]))
        except RuntimeError as error:
            errors.append(str(error))

    def meanwhile(block: int, chosen: Tensor) -> None:
        if block == 1:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    attachment.forwards.observer = meanwhile
    assert torch.equal(tiny.run(model, tiny.inputs(t=TIMES[0])), expected)
    assert len(errors) == 1
    assert "serves one forward at a time" in errors[0]
    attachment.forwards.observer = None
    other()  # in turn they may: the first has left
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1


def test_sharing_needs_an_even_batch() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    told = attachment.passes.told(Pass.BOTH)
    with told, pytest.raises(ValueError, match="even batch, got 3"):
        tiny.run(model, tiny.inputs(batch=3))
    assert keeps_nothing(attachment)


def test_halves_share_by_the_maximum_of_their_scores() -> None:
    model = tiny.sd3()
    attachment = shiva(model)
    with attachment.passes.told(Pass.BOTH), chosen_tokens(attachment) as shared:
        tiny.run(model, tiny.inputs(batch=4))
    for _, indices in shared:
        assert torch.equal(indices[:2], indices[2:])
        assert not torch.equal(indices[0], indices[1])
    with chosen_tokens(attachment) as apart:
        tiny.run(model, tiny.inputs(batch=4))
    assert not any(torch.equal(indices[:2], indices[2:]) for _, indices in apart)


# --- training -------------------------------------------------------------------------------

ESTIMATORS = {
    "paper": EstimatorConfig(kind="paper"),
    "residual": EstimatorConfig(kind="residual", rejected="ridge", kv_gate=True),
}


class Training:
    """One gated forward of a fresh model, and everything that receives a gradient."""

    def __init__(self, kind: str, estimator: str) -> None:
        self.model = tiny.sd3(kind)
        made = tiny.adapter(self.model)
        self.router = made.router
        self.estimator = ESTIMATORS[estimator]
        self.soft_k = torch.full((), 20.0, requires_grad=True)
        self.generator = torch.Generator().manual_seed(5)
        self.selector = ShivaSelector(self.router)

    def attach(self) -> Attachment:
        gate_values = self.estimator.needs_value_gate
        return attach(self.model, self.selector, tiny.from_counts(COUNTS), gate_values=gate_values)

    def gates(self, block: int) -> SelectionGates:
        return SelectionGates(
            config=self.estimator,
            tau_rank=0.5,
            tau_select=0.1,
            soft_k=self.soft_k,
            noise_std=0.5,
            generator=self.generator,
        )

    def forward(self, attachment: Attachment, counts: list[int], seed: int = 0) -> Tensor:
        with attachment.forwards.gated(GatedForward(counts=counts, gates=self.gates)):
            return self.model(**tiny.inputs(seed=seed)).sample

    def gradients(self) -> dict[str, Tensor]:
        named = [*self.model.named_parameters(), *self.router.named_parameters()]
        found = {name: p.grad for name, p in named if p.grad is not None}
        assert self.soft_k.grad is not None
        return {**found, "soft_k": self.soft_k.grad}


@kinds
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("order", ["checkpoint first", "attach first"])
def test_checkpointing_gives_the_same_gradients_even_if_k_changes_before_backward(
    kind: str, estimator: str, order: str
) -> None:
    counts = [64, 20, 33, 11]
    plain = Training(kind, estimator)
    output = plain.forward(plain.attach(), counts)
    output.square().mean().backward()

    trained = Training(kind, estimator)
    if order == "checkpoint first":
        trained.model.enable_gradient_checkpointing()
        attachment = trained.attach()
    else:
        attachment = trained.attach()
        trained.model.enable_gradient_checkpointing()
    calls: list[int] = []
    for index, block in enumerate(trained.model.transformer_blocks):
        block.ff.register_forward_hook(lambda *_, index=index: calls.append(index))
    checkpointed = trained.forward(attachment, counts)
    assert torch.equal(checkpointed, output)
    # Two more forwards in between, one with gates and one of the schedule, with other k and input.
    trained.forward(attachment, [64, 50, 2, 64], seed=1)
    trained.model(**tiny.inputs(t=TIMES[0], seed=2))
    calls.clear()
    checkpointed.square().mean().backward()
    assert sorted(calls) == [0, 1, 2, 3]  # every block was recomputed
    assert keeps_nothing(attachment)

    expected, found = plain.gradients(), trained.gradients()
    assert expected.keys() == found.keys()
    learned = {n for n, p in plain.router.named_parameters() if p.requires_grad}
    assert learned <= expected.keys()
    for name in ("groups.0.project_tokens.weight", "groups.1.score.weight", "soft_k"):
        assert expected[name].abs().max() > 0
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_without_the_snapshot_a_changed_k_would_break_the_recomputation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the test above guards against is real."""
    monkeypatch.setattr(Forwards, "_snapshot_checkpoints", lambda self, model: None)
    training = Training("plain", "residual")
    training.model.enable_gradient_checkpointing()
    attachment = training.attach()
    output = training.forward(attachment, [64, 20, 33, 11])
    training.forward(attachment, [64, 50, 2, 64], seed=1)
    with pytest.raises((CheckpointError, RuntimeError)):
        output.square().mean().backward()


def test_a_callers_own_checkpointing_function_is_used_and_given_back() -> None:
    model = tiny.sd3()
    calls: list[Any] = []

    def own(module: Any, *args: Any) -> Any:
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(own)
    before = tiny.footprint(model)
    attachment = shiva(model)
    model(**tiny.inputs()).sample.sum().backward()
    model.zero_grad()
    assert len(calls) == 4
    attachment.detach()
    assert model._gradient_checkpointing_func is own
    assert tiny.footprint(model) == before


@kinds
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gates_change_no_value(kind: str, estimator: str, dtype: torch.dtype) -> None:
    """A gated forward without noise is the pruned forward of inference, bit by bit."""
    training = Training(kind, estimator)
    training.model.to(dtype)
    attachment = training.attach()
    bins = attachment.counts.table(tiny.NUM_TOKENS).counts
    gates = training.gates
    arguments = {name: value.to(dtype) for name, value in tiny.inputs(t=TIMES[1]).items()}

    def quiet(block: int) -> SelectionGates:
        made = gates(block)
        made.noise_std = 0.0
        return made

    with attachment.forwards.gated(GatedForward(counts=bins[1], gates=quiet)):
        gated = training.model(**arguments).sample
    assert gated.dtype == dtype
    assert torch.equal(gated, tiny.run(training.model, arguments))


def test_a_block_that_keeps_all_its_tokens_is_judged_too() -> None:
    """Its k gets a gradient (Eq. 24): else a ratio that has reached 1 would not come back."""
    training = Training("plain", "residual")
    attachment = training.attach()
    made: dict[int, SelectionGates] = {}

    def gates(block: int) -> SelectionGates:
        made[block] = training.gates(block)
        made[block].soft_k = torch.tensor(64.0, requires_grad=True)
        return made[block]

    counts = [64, 64, 33, 64]
    with attachment.forwards.gated(GatedForward(counts=counts, gates=gates)):
        training.model(**tiny.inputs()).sample.square().mean().backward()
    assert set(made) == {1, 2, 3}  # the first is never pruned, so there is nothing to learn
    for block in made:
        soft_k = made[block].soft_k
        assert isinstance(soft_k, Tensor)
        assert soft_k.grad is not None
        assert soft_k.grad.abs() > 0


def test_fused_projections_are_refused_by_the_value_gate() -> None:
    training = Training("plain", "residual")
    attachment = attach(training.model, training.selector, tiny.from_counts(COUNTS))
    with pytest.raises(RuntimeError, match="without calling its value projection"):
        training.forward(attachment, COUNTS[0])
    assert keeps_nothing(attachment)


# --- blocks that share their scores ------------------------------------------------------------


@contextmanager
def scorings(attachment: Attachment) -> Iterator[list[int]]:
    """Within: the blocks whose routers run."""
    seen: list[int] = []
    before = [hook.scores for hook in attachment.hooks]
    for hook, scores in zip(attachment.hooks, before, strict=True):

        def counting(x: Any, condition: Any, scores: Any = scores, block: int = hook.index) -> Any:
            seen.append(block)
            return scores(x, condition)

        hook.scores = counting
    try:
        yield seen
    finally:
        for hook, scores in zip(attachment.hooks, before, strict=True):
            hook.scores = scores


def test_a_pair_of_blocks_shares_the_scores_of_its_first() -> None:
    """Equal numbers of tokens are the same tokens, fewer are some of them."""
    model = tiny.sd3(num_layers=6)
    rows = [[64, 20, 20, 30, 10, 12]]
    attachment = shiva(model, rows, select_every=2)
    with scorings(attachment) as scored, chosen_tokens(attachment) as seen:
        tiny.run(model, tiny.inputs())
    assert scored == [1, 3, 5]
    chosen = dict(seen)
    assert torch.equal(chosen[1], chosen[2])
    assert chosen[4].shape == (2, 10)
    for few, many in zip(chosen[4].tolist(), chosen[3].tolist(), strict=True):
        assert set(few) < set(many)
    alone = shiva(model, rows)
    with chosen_tokens(alone) as seen:
        tiny.run(model, tiny.inputs())
    by_itself = dict(seen)
    assert torch.equal(by_itself[1], chosen[1])
    assert not torch.equal(by_itself[2], chosen[2])


def test_a_block_whose_leader_did_not_run_or_kept_all_scores_by_itself() -> None:
    model = tiny.sd3(num_layers=6)
    attachment = shiva(model, [[64, 20, 20, 64, 10, 12], [64] * 3 + [30] * 3], select_every=2)
    with scorings(attachment) as scored, torch.no_grad():
        model(**tiny.inputs(t=0.1), skip_layers=[1])
    assert scored == [2, 4, 5]
    assert attachment.counts.leader(4, (64, 20, 20, 64, 10, 12), 64) is None


def test_flops_count_a_shared_router_once() -> None:
    model = tiny.sd3(num_layers=6)
    counts = [64, 20, 20, 30, 10, 12]
    single, paired = (
        pruned_flops(shiva(model, [counts], select_every=every), 64, 7, counts) for every in (1, 2)
    )
    selector = tiny.adapter(model).selector()
    assert single - paired == 2 * selector.flops(64)


def test_select_every_is_positive() -> None:
    with pytest.raises(ValueError, match="select_every must be at least 1, got 0"):
        shiva(tiny.sd3(), select_every=0)


# --- what a pruned block adds -----------------------------------------------------------------

VIEWS = {"select", "slice", "unsqueeze", "view", "detach", "unbind", "expand", "to", "t", "movedim"}


class Operators(TorchDispatchMode):
    """Counts operators that compute, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_pruned_block_adds_eight_operators() -> None:
    """For one picture in float32: norm, projection, SiLU, norm, score; sort, gather, scatter."""

    def operators(num_pruned: int) -> Counter[str]:
        model = tiny.sd3(num_layers=6)
        shiva_dit.apply(
            model,
            tiny.adapter(model),
            schedule=tiny.from_counts([[64] * (6 - num_pruned) + [30] * num_pruned]),
        )
        inputs = {name: value[:1] for name, value in tiny.inputs().items()}
        with torch.inference_mode():
            model(**inputs)  # weights are stacked once
            with Operators() as seen:
                model(**inputs)
        return seen.count

    added = operators(5) - operators(2)
    assert added == {
        "layer_norm": 6,
        "linear": 6,
        "silu": 3,
        "sort": 3,
        "index_select": 3,
        "index_copy": 3,
    }
