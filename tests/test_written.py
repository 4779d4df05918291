"""Writes into tuned weights are seen before a forward; what merely moves them is not refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import Tensor, nn

import shiva_dit
from shiva_dit.models import tuned, written
from shiva_dit.models.attach import attachment_of
from shiva_dit.models.rounding import is_rounding, paths_between
from shiva_dit.models.written import Written, digests
from tests import tiny
from tests.test_backbone import add_users_lora, near, same_state, state_of

KINDS = ["lora", "dora", "full"]
kinds = pytest.mark.parametrize("kind", KINDS)


def applied(kind: str, model: Any = None, **options: Any) -> Any:
    model = tiny.sd3() if model is None else model
    made = tiny.adapter(
        tiny.sd3(), tiny.from_counts([[64, 20, 9, 33]]), backbone=kind, lora_rank=tiny.LORA_RANK
    )
    made.backbone_weights, _ = tiny.tuned(kind)
    return shiva_dit.apply(model, made, **options)


def weight_of(model: Any) -> nn.Parameter:
    return model.transformer_blocks[2].attn.to_k.weight


def load(model: Any) -> None:
    model.load_state_dict(tiny.sd3(seed=5).state_dict())


def load_assigning(model: Any) -> None:
    model.load_state_dict(tiny.sd3(seed=5).state_dict(), assign=True)


def copy(model: Any) -> None:
    with torch.no_grad():
        weight_of(model).copy_(torch.ones(32, 32))


def negate(model: Any) -> None:
    with torch.no_grad():
        weight_of(model).neg_()


def roll(model: Any) -> None:
    with torch.no_grad():
        weight_of(model).copy_(weight_of(model).roll(1, 0))


def step(model: Any) -> None:
    weight = weight_of(model)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=1e-3).step()


def other_data(model: Any) -> None:
    weight_of(model).data = torch.ones(32, 32)


def swap(model: Any) -> None:
    """As averages are swapped in: the own values are kept for later."""
    model.kept = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = 0.9 * parameter.data


def average(model: Any) -> None:
    """As diffusers' averages are copied in: no count of writes tells."""
    for parameter in model.parameters():
        parameter.data.copy_(0.9 * parameter.data)


def row_of_data(model: Any) -> None:
    weight_of(model).data[7].mul_(1.5)


WRITES = [average, row_of_data, load, load_assigning, copy, negate, roll, step, other_data, swap]


@kinds
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_what_is_written_is_seen_before_the_next_forward(
    write: Callable[[Any], None], kind: str
) -> None:
    model = applied(kind)
    tiny.run(model, tiny.inputs())
    before = state_of(model)
    write(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"was changed while the adapter's weights were on"):
            tiny.run(model, tiny.inputs())
    with pytest.raises(RuntimeError, match="can't be given back"):
        shiva_dit.remove(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    assert tiny.run(model, tiny.inputs()).isfinite().all()
    shiva_dit.remove(model)
    assert same_state(model, tiny.sd3().state_dict())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_in_whatever_mode_it_is_written_and_run(mode: Any) -> None:
    expected = tiny.run(applied("lora"), tiny.inputs())
    with mode():
        model: Any = tiny.sd3()  # its tensors are of that mode
        applied("lora", model)
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
        with shiva_dit.disabled(model):
            assert torch.equal(tiny.run(model, tiny.inputs()), tiny.run(tiny.sd3(), tiny.inputs()))
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
        weight_of(model).mul_(2)  # counted by nothing
        with pytest.raises(RuntimeError, match="was changed while"):
            tiny.run(model, tiny.inputs())
        weight_of(model).div_(2)
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
        weight_of(model).data = torch.ones(32, 32)
        with pytest.raises(RuntimeError, match="was changed while"):
            tiny.run(model, tiny.inputs())


@kinds
def test_values_are_read_once_in_a_run_of_a_pipeline(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.pipeline(tiny.sd3())
    applied(kind, pipe)
    reads: list[int] = []
    sampled = Written._sampled

    def counted(self: Written) -> list[int]:
        reads.append(len(self._tensors))
        return sampled(self)

    monkeypatch.setattr(Written, "_sampled", counted)
    for _ in range(2):
        tiny.generate(pipe, 1.0)
    assert len([many for many in reads if many]) == 2
    average(pipe.transformer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was changed while"):
            tiny.generate(pipe, 1.0)


def test_tensors_that_count_no_writes() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(3)
    seen = Written([tensor, torch.zeros(2)])
    assert not seen.any()
    assert seen.which() == []
    tensor.data = torch.ones(3)
    assert seen.any()
    assert seen.which() == [0]


def test_what_was_freed_is_not_taken_for_what_lies_there_now() -> None:
    memory = bytearray(64)
    tensor, other = torch.frombuffer(memory, dtype=torch.float32), torch.zeros(16)
    seen, address = Written([other, tensor]), tensor.data_ptr()
    assert not seen.any()
    tensor.data = torch.frombuffer(memory, dtype=torch.float32)
    assert tensor.data_ptr() == address
    assert seen.any()
    assert seen.which() == [1]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (16, 8)])
def test_digests_are_of_all_bits_and_places(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(shape, generator=generator) + 1.5
    values = wide.to(dtype)
    others = [(-wide).to(dtype), (2 * wide).to(dtype), torch.zeros(shape, dtype=dtype)]
    if shape:
        others.append(wide.roll(1, 0).to(dtype))
    found = digests([values, values.clone(), *others])
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1
    apart = torch.cat([wide.flatten()[:1], wide.flatten()]).to(dtype)[1:].view(shape)
    assert digests([apart]) == found[:1]  # wherever they begin


def test_digests_of_many_words_see_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(64, 9, generator=torch.Generator().manual_seed(0))
    whole = digests([values])
    monkeypatch.setattr(written, "CACHED", 7)
    assert digests([values]) == whole
    for place in (0, 100, -1):
        other = values.clone()
        other.view(-1)[place] *= -1
        assert digests([other]) != whole


# --- what moves weights -----------------------------------------------------------------------


class Counting:
    """Tensors whose digests were computed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.reads = 0, 0

        def counted(tensors: list[Tensor]) -> list[int]:
            self.count += len(tensors)
            self.reads += 1
            return written.digests(tensors)

        patch.setattr(tuned, "digests", counted)


@kinds
def test_one_look_at_what_was_moved_and_none_after(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = applied(kind)
    expected = tiny.run(model, tiny.inputs())
    looks = Counting(monkeypatch)
    tiny.run(model, tiny.inputs())
    assert looks.count == 0
    for parameter in model.parameters():  # as `to` another device and back does
        parameter.data = parameter.data.clone()
    for _ in range(3):
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    backbone: Any = attachment_of(model).backbone  # type: ignore[union-attr]
    assert (looks.reads, looks.count) == (1, len(backbone._merged))
    with shiva_dit.disabled(model):
        tiny.run(model, tiny.inputs())
    for _ in range(3):
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    assert looks.reads == 2


@kinds
@pytest.mark.parametrize("how", ["group", "casting", "model"])
def test_what_moves_at_each_forward_is_not_digested_each_time(
    how: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = applied(kind)
    if how == "casting":
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    elif how == "model":
        cpu_offload_with_hook(model, torch.device("cpu"))
    else:
        cpu = torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    expected = tiny.run(model, tiny.inputs())
    looks = Counting(monkeypatch)
    for _ in range(3):
        for parameter in model.parameters():  # what offloading to another device does each time
            parameter.data = parameter.data.clone()
        assert torch.equal(tiny.run(model, tiny.inputs()), expected)
    assert looks.reads <= 1  # the first one sees that the hooks have come
    weight_of(model).data = torch.ones(32, 32).to(weight_of(model))
    with pytest.raises(RuntimeError, match="was changed while"):
        tiny.run(model, tiny.inputs())


@kinds
def test_written_where_sequential_offloading_keeps_it(kind: str) -> None:
    model: Any = tiny.sd3()
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    applied(kind, model)
    tiny.run(model, tiny.inputs())
    backbone: Any = attachment_of(model).backbone  # type: ignore[union-attr]
    values, key = backbone._merged[3].place.entry()
    values[key].mul_(2)
    with pytest.raises(RuntimeError, match="was changed while"):
        tiny.run(model, tiny.inputs())


def test_a_dora_beside_a_weight_that_is_written() -> None:
    """Its factors are of the weight that it was put beside."""
    model = applied("dora", merge=False)
    tiny.run(model, tiny.inputs())
    model.to(torch.bfloat16).float()  # rounding alone changes no norm by much
    expected = tiny.run(model, tiny.inputs())
    copy(model)
    with pytest.raises(RuntimeError, match=r"to_k was changed while .*DoRA.*apply again"):
        tiny.run(model, tiny.inputs())
    again = applied("dora", model, merge=False)
    assert not near(tiny.run(again, tiny.inputs()), expected)


@kinds
def test_under_autocast_weights_are_merged_and_checked_as_without(kind: str) -> None:
    plain, model = applied(kind), tiny.sd3()
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    with torch.autocast("cpu", torch.bfloat16):
        applied(kind, model)
        for path, values in plain.state_dict().items():
            parent, _, leaf = path.rpartition(".")
            layer = model.get_submodule(parent)
            layer = getattr(layer, "base_layer", layer)
            assert torch.equal(getattr(layer, leaf), values), path
        model.fuse_lora()
        model.unfuse_lora()
        assert tiny.run(model, tiny.inputs()).isfinite().all()
        shiva_dit.remove(model)


# --- rounding ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("path", [[torch.float16], [torch.bfloat16], [torch.half, torch.bfloat16]])
def test_a_model_that_was_rounded_is_given_back_rounded(path: list[torch.dtype], kind: str) -> None:
    model, bare = applied(kind), tiny.sd3()
    for each in (model, bare):
        for dtype in path:
            each.to(dtype)
        each.float()
    after = tiny.run(model, tiny.inputs())
    with shiva_dit.disabled(model):
        assert torch.equal(tiny.run(model, tiny.inputs()), tiny.run(bare, tiny.inputs()))
    assert near(tiny.run(model, tiny.inputs()), after, 0.02)  # merged anew, from rounded weights
    shiva_dit.remove(model)
    assert same_state(model, bare.state_dict())
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: p.dtype for name, p in bare.named_parameters()
    }


def test_which_way_values_were_rounded() -> None:
    expected = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    half, narrow = torch.float16, torch.bfloat16
    assert paths_between(expected, expected)[0] == ()
    assert paths_between(expected, expected.half().float())[0] == (half,)
    assert paths_between(expected, expected.half())[0] == ()
    assert paths_between(expected, expected.half().bfloat16().float())[0] == (half, narrow)
    found = expected.bfloat16().float()
    assert paths_between(expected, found)[0] == (narrow,)
    found[3, 5] *= 1.001
    assert paths_between(expected, found) == []


def weight(rows: int, columns: int, uneven: bool, generator: torch.Generator) -> Tensor:
    values = 0.03 * torch.randn(rows, columns, generator=generator)
    if uneven:
        values *= torch.randn(rows, 1, generator=generator).exp()
        values *= (0.7 * torch.randn(1, columns, generator=generator)).exp()
    return values


def lora(values: Tensor, rank: int, share: float, uneven: bool, draw: torch.Generator) -> Tensor:
    """Of a given share of the weight's norm."""
    a = weight(rank, values.shape[1], uneven, draw)
    change = weight(values.shape[0], rank, uneven, draw) @ a
    change *= share * values.float().norm() / change.norm()
    return change.to(values.dtype)


SIZES = [
    (64, 64),
    (256, 64),
    (64, 512),
    (512, 512),
    pytest.param((1536, 1024), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("uneven", [False, True])
def test_fusing_and_unfusing_is_rounding(
    uneven: bool, size: tuple[int, int], dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(0)
    expected = weight(*size, uneven, draw).to(dtype)
    for times, rank in [(1, 1), (3, 4), (2, 32)]:
        for scale in (0.1, 0.5, 1.0, 2.0):
            for share in (0.01, 0.1, 0.25):
                changes = [lora(expected, rank, scale * share, uneven, draw) for _ in range(2)]
                found = expected
                for _ in range(times):
                    for change in changes:
                        found = found + change
                    for change in changes[:: -1 if times > 1 else 1]:
                        found = found - change
                assert is_rounding(found, expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("uneven", [False, True])
def test_a_small_lora_left_in_is_no_rounding(uneven: bool, size: tuple[int, int]) -> None:
    """In bfloat16, whose rounding may be as large."""
    draw, eps = torch.Generator().manual_seed(0), torch.finfo(torch.bfloat16).eps
    expected = weight(*size, uneven, draw).bfloat16()
    for rank in (1, 4, 16, 32):
        for share in (0.002, 0.003, 0.005, 0.01, 0.03):
            # Small ones of a rank near the width have no direction, and can't be told from noise.
            if share < 0.01 and rank * 16 > min(size):
                continue
            found = expected + lora(expected, rank, share, False, draw)
            assert not is_rounding(found, expected, eps), (rank, share)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_a_small_lora_that_was_fused_and_unloaded_is_not_lost(
    kind: str, dtype: torch.dtype
) -> None:
    model = applied(kind, tiny.sd3().to(dtype))
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    layer = model.transformer_blocks[1].attn.to_q
    with torch.no_grad():
        share = layer.get_delta_weight("mine").norm() / layer.base_layer.weight.norm()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.004 / share)
    model.fuse_lora()
    model.unload_lora()
    with pytest.raises(RuntimeError, match=r"can't be given back.*unloaded"):
        shiva_dit.remove(model)


@pytest.mark.parametrize(
    "scale", [0.1, 1.0, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (0.5, 2.0))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@kinds
def test_fused_and_unfused_often(kind: str, dtype: torch.dtype, scale: float) -> None:
    model = applied(kind, tiny.sd3().to(dtype))
    given = {n: v if n == "timestep" else v.to(dtype) for n, v in tiny.inputs().items()}
    add_users_lora(model, "mine", ["to_q", "to_k"], seed=8)
    with torch.no_grad():  # to about 0.4 of the weights
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    for _ in range(3):
        model.set_adapters("mine", 1.0)  # fusing multiplies the scale, and leaves it
        model.fuse_lora(lora_scale=scale)
        tiny.run(model, given)
        model.unfuse_lora()
        tiny.run(model, given)
    model.unload_lora()
    shiva_dit.remove(model)
    assert same_state(model, tiny.sd3().to(dtype).state_dict())
