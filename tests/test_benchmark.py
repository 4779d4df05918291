"""The benchmark: real configurations, arms in turn, records and tables."""

import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.autograd import DeviceType
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import shiva_dit
from shiva_dit.benchmark import operators, pairs, records, run, steps, timing
from shiva_dit.benchmark.config import BenchmarkConfig
from shiva_dit.benchmark.operators import (
    OPERATORS,
    _self_times,
    operator_kind,
    time_operators,
)
from shiva_dit.benchmark.pairs import run_pair
from shiva_dit.benchmark.records import check_record_place, record_path, save_record
from shiva_dit.benchmark.run import ADAPTER, DENSE, FORCED, run_benchmark, run_scaling
from shiva_dit.benchmark.steps import ALONE, PLAIN, TAUGHT, run_step_benchmark
from shiva_dit.benchmark.tables import benchmark_rows, scaling_rows
from shiva_dit.benchmark.timing import Samples, interleaved, peak_mib, saved_bytes
from shiva_dit.benchmark.workloads import WORKLOADS, workload
from shiva_dit.cli import main
from shiva_dit.experiments.plots import draw_scaling
from shiva_dit.models.attach import attach, attachment_of
from shiva_dit.models.counted import model_flops
from shiva_dit.models.families import model_spec
from shiva_dit.report.timing import benchmark_table, operators_table
from tests import tiny

META = torch.device("meta")
# Millions of parameters and 10^12 FLOPs at the sizes that the models are known by: parameters as
# published (Wan's name rounds its own), FLOPs by torch's counter.
KNOWN = {
    "sd35-medium": (2243.17, 11.250, 4096),
    "sd3-medium": (2028.33, 8.904, 4096),
    "flux-dev": (11901.41, 74.385, 4096),
    "pixart-sigma": (610.86, 6.634, 4096),
    "dit-xl-2": (749.83, 1.049, 1024),
    "wan-1.3b": (1419.00, 283.002, 32760),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_configurations_are_the_real_ones(name: str) -> None:
    parameters, flops, num_tokens = KNOWN[name]
    load = workload(name)
    grid = load.grid()
    model = load.build(grid, torch.bfloat16, META)
    spec = model_spec(model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert load.num_tokens(grid) == num_tokens
    inputs = load.inputs(model, 1, grid, load.text_tokens, torch.bfloat16)
    inputs[spec.timestep] = torch.full((1,), 1.0, device=META)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, return_dict=False)
    assert counter.get_total_flops() / 1e12 == pytest.approx(flops, abs=0.0005)
    ours = model_flops(model, num_tokens, load.text_tokens).dense()
    assert ours == counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_other_sizes_and_batches_run_pruned(name: str) -> None:
    load = workload(name)
    grid = load.grid((512, 512))
    model = load.build(grid, torch.bfloat16, META)
    spec, num_tokens = model_spec(model), load.num_tokens(grid)
    blocks = spec.blocks(model)
    kept: dict[int, int] = {}
    adapter = shiva_dit.ShivaAdapter(shiva_dit.ShivaConfig.for_model(model)).to(META)
    schedule = shiva_dit.Schedule.uniform(0.6, num_blocks=len(blocks))
    attachment = attach(model, adapter.selector(), schedule)
    attachment.forwards.observer = lambda block, chosen: kept.update({block: chosen.shape[1]})
    inputs = load.inputs(model, 2, grid, 32, torch.bfloat16)
    inputs[spec.timestep] = torch.full((2,), 1.0, device=META)
    with torch.no_grad():
        (output,) = model(**inputs, return_dict=False)
    assert output.shape[0] == 2
    counts = attachment.counts.table(num_tokens).counts[0]
    assert kept == {block: k for block, k in enumerate(counts) if block > 0}


def test_wrong_names_and_sizes_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="Did you mean sd35-medium"):
        workload("sd35-medum")
    with pytest.raises(ValueError, match="multiples of 16 pixels, got 1000x1024"):
        workload("flux-dev").grid((1000, 1024))
    load = workload("dit-xl-2")
    with pytest.raises(ValueError, match="for squares"):
        load.build(load.grid((256, 512)), torch.float32, META)


def test_arms_take_turns_and_times_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    wall = cpu = 0.0

    def call(name: str, seconds: float, on_cpu: float) -> None:
        nonlocal wall, cpu
        order.append(name)
        wall, cpu = wall + seconds, cpu + on_cpu

    clocks = types.SimpleNamespace(perf_counter=lambda: wall, process_time=lambda: cpu)
    monkeypatch.setattr(timing, "time", clocks)
    arms = {
        "a": lambda: call("a", 0.02, 0.0),  # asleep
        "b": lambda: call("b", 0.001, 0.004),  # on four threads
        "c": lambda: call("c", 0.0, 0.0),
    }
    found = interleaved(arms, repeats=3, device=torch.device("cpu"), calls=2)
    assert "".join(order) == "aabbccbbccaaccaabb"
    assert found["a"].latency_ms == pytest.approx([20.0] * 3)
    assert found["a"].cpu_ms == found["c"].latency_ms == [0.0] * 3
    assert found["b"].latency_ms == pytest.approx([1.0] * 3)
    assert found["b"].cpu_ms == pytest.approx([4.0] * 3)
    assert peak_mib(lambda: None, torch.device("cpu")) is None


SMALL: dict[str, Any] = {
    "model": "sd3-tiny",
    "dtype": "float32",
    "mode": "eager",
    "device": "cpu",
    "repeats": 2,
}


def test_a_record_holds_every_arm_and_its_table() -> None:
    record = run_benchmark(BenchmarkConfig(**SMALL | {"repeats": 3}, keep=(0.5,)))
    dense, forced, half = record["rows"]
    assert [row["arm"] for row in record["rows"]] == [DENSE, FORCED, "keep 0.5"]
    assert all(len(row["latency_ms"]) == len(row["cpu_ms"]) == 3 for row in record["rows"])
    assert dense["speed_up"] == dense["efficiency"] == 1.0
    assert dense["flops"] == forced["flops"] == WORKLOADS_FLOPS
    assert half["keep_ratio"] == 0.5
    assert half["efficiency"] == pytest.approx(half["speed_up"] * half["flops"] / dense["flops"])
    assert half["dense_steps_at_equal_time"] == pytest.approx(28 / half["speed_up"])
    assert set(half["parts_ms"]) == {"router", "selection", "gather", "scatter"}
    assert min(half["parts_ms"].values()) > 0
    assert all(sum(row["operators_ms"].values()) > 0 for row in record["rows"])
    table = benchmark_table(json.loads(json.dumps(record)))
    assert "| keep 0.5 |" in table
    assert "64 image and 7 text tokens, batch 1, float32, all arms eager" in table
    pays = "pays below a keep ratio" if record["break_even"] else "pays at no ratio"
    assert pays in table


def test_blocks_that_share_scores_are_said_and_timed(tmp_path: Path) -> None:
    config = BenchmarkConfig(**SMALL, keep=(0.5,), select_every=2)
    record = run_benchmark(config)
    assert "2 in a row share their scores" in benchmark_table(record)
    assert f"-eager-every2-{torch.get_num_threads()}thread" in record_path(record, tmp_path).name
    half = record["rows"][2]
    assert half["flops"] < run_benchmark(replace(config, select_every=None))["rows"][2]["flops"]
    assert half["parts_ms"]["router"] > 0


WORKLOADS_FLOPS = 7_671_680  # by torch's counter


def test_forced_selection_keeps_all_tokens_and_dense_selects_none() -> None:
    """The dense arm pays nothing, the forced one all of the selection."""
    load = workload("sd3-tiny")
    model = load.build(load.grid(), torch.float32, torch.device("cpu"))
    tiny.randomize(model, seed=0)
    adapter = shiva_dit.ShivaAdapter(shiva_dit.ShivaConfig.for_model(model))
    inputs = load.inputs(model, 1, load.grid(), 7, torch.float32)
    inputs["timestep"] = torch.tensor([500.0])
    with torch.no_grad():
        (dense,) = model(**inputs, return_dict=False)
        shiva_dit.apply(model, adapter, keep_ratio=1.0)
        attachment = attachment_of(model)
        assert attachment is not None
        seen: dict[int, int] = {}
        attachment.forwards.observer = lambda block, chosen: seen.update({block: chosen.shape[1]})
        model(**inputs, return_dict=False)
        assert seen == {}
        attachment.forwards.always_select = True
        (forced,) = model(**inputs, return_dict=False)
    assert seen == {1: 64, 2: 64}
    # All tokens, the best first: attention sums in another order.
    assert (forced - dense).abs().max() <= 1e-5 * dense.abs().max()


def test_an_adapter_is_timed_by_its_own_schedule(tmp_path: Path) -> None:
    load = workload("sd3-tiny")
    model = load.build(load.grid(), torch.float32, torch.device("cpu"))
    config = shiva_dit.ShivaConfig.for_model(model, num_bins=4)
    schedule = tiny.from_counts([[64, 8, 16], [64, 16, 24], [64, 32, 40], [64, 48, 56]])
    shiva_dit.ShivaAdapter(config, schedule).save_pretrained(tmp_path)
    record = run_benchmark(config_of(tmp_path))
    (row,) = [row for row in record["rows"] if row["arm"] == ADAPTER]
    assert row["distinct_rows"] == 4
    assert row["keep_ratio"] == pytest.approx(30 / 64)
    assert record["forwards_per_time"] == 4  # one for each row
    with run.made_bench(config_of(tmp_path, forwards=8)) as bench:
        assert len(bench.times) == 8


def config_of(adapter: Path, **options: Any) -> BenchmarkConfig:
    return BenchmarkConfig(**SMALL | {"repeats": 1}, keep=(), adapter=str(adapter), **options)


def test_records_are_named_by_what_they_hold_and_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    today = types.SimpleNamespace(today=lambda: date(2026, 1, 2))
    monkeypatch.setattr(records, "datetime", types.SimpleNamespace(date=today))
    record = run_benchmark(BenchmarkConfig(**SMALL | {"repeats": 1}, keep=(0.5,)))
    path = save_record(record, tmp_path)
    threads = torch.get_num_threads()
    assert path.name.startswith(f"speed-sd3-tiny-128-batch1-float32-eager-{threads}thread--")
    assert path.name.endswith("--2026-01-02.json")
    assert json.loads(path.read_text(encoding="utf-8"))["rows"][2]["arm"] == "keep 0.5"
    with pytest.raises(ValueError, match="is there already"):
        save_record(record, tmp_path)
    same = BenchmarkConfig(**SMALL | {"repeats": 1}, keep=(0.6,))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is there already"):
        check_record_place(same, (), tmp_path)  # before anything is measured
    for config, sides in (
        (same, (64, 128)),
        (replace(same, train="lora"), ()),
        (replace(same, beside="mag_cache"), ()),
        (replace(same, batch=3), ()),
    ):
        check_record_place(config, sides, tmp_path)
    record["config"]["size"] = [832, 480]
    assert "sd3-tiny-832x480-" in record_path(record, tmp_path).name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": (1.5,)}, "the share KEPT"),
        ({"keep": ()}, "nothing to time"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"forwards": 0}, "forwards must be at least 1"),
        ({"text_tokens": 0}, "text_tokens must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"beside": "int8", "train": "full"}, "one of them at a time"),
        ({"beside": "compile"}, "needs a mode that compiles"),
        ({"beside": "mag_cache", "mode": "compiled"}, "out of the compiler"),
    ],
)
def test_bad_settings_are_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**SMALL | changed)


def test_scaling_times_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "sd3-tiny", "--mode", "eager", "--dtype", "float32", "--repeats", "1"]
    arguments += ["--keep", "0.5", "--out", str(tmp_path)]
    assert main([*arguments, "--scaling", "64", "128"]) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("scaling-sd3-tiny-64to128-")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [row[0] for row in scaling_rows(record)] == ["image tokens", "16", "64"]
    assert "keep 0.5: by FLOPs" in capsys.readouterr().out
    draw_scaling(record, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] > 1000
    assert main([*arguments, "--scaling", "64", "--train", "full"]) == 2
    assert "one of them at a time" in capsys.readouterr().err


def test_quotients_are_of_the_same_rounds() -> None:
    """A machine that is slow in one round is slow for both."""
    ours, theirs = Samples([2.0, 20.0, 200.0], [1.0] * 3), Samples([1.0, 10.0, 100.0], [4.0] * 3)
    assert ours.over(theirs) == 2.0
    assert ours.cpu_over(theirs) == 0.25
    assert ours.cpu_over(Samples([1.0] * 3)) is None


def test_break_even_is_where_flops_saved_pay_for_the_selection() -> None:
    """Two of three blocks pruned: at an overhead of a tenth, about a sixth of their tokens."""
    load = workload("sd3-tiny")
    model = load.build(load.grid(), torch.float32, torch.device("cpu"))
    adapter = shiva_dit.ShivaAdapter(shiva_dit.ShivaConfig.for_model(model))
    shiva_dit.apply(model, adapter)
    attachment = attachment_of(model)
    assert attachment is not None
    bench = run.Bench(BenchmarkConfig(**SMALL), load, load.grid(), attachment)
    flops = model_flops(model, 64, 7)

    def left(k: int) -> float:
        return flops.pruned([64, k, k]) / flops.dense()

    found = bench._break_even(1 / 1.1)
    assert found is not None
    k = round(64 * found)
    assert left(k) < 0.9 <= left(k + 1)
    assert bench._break_even(1.0) == 63 / 64
    assert bench._break_even(0.25) is None


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_training_steps_are_timed_against_plain_fine_tuning(
    tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "WARMUP", 1)
    config = BenchmarkConfig(**SMALL | {"repeats": 1}, keep=(0.5,), train=tuned)
    record = run_step_benchmark(config)
    assert [row["arm"] for row in record["rows"]] == [
        PLAIN,
        f"keep 0.5, {ALONE}",
        f"keep 0.5, {TAUGHT}",
    ]
    dense = record["rows"][0]
    assert dense["of_dense"] == dense["of_dense_cpu"] == dense["saved_of_dense"] == 1.0
    for row in record["rows"]:
        assert row["saved_of_dense"] == row["saved_bytes"] / dense["saved_bytes"] > 0
    assert all(len(row["latency_ms"]) == 1 for row in record["rows"])
    table = benchmark_table(json.loads(json.dumps(record)))
    assert f"| keep 0.5, {TAUGHT} |" in table
    assert "with their optimizer's part" in table
    assert "kept for backward" in table
    for row in record["rows"]:  # records of before have neither number nor column
        del row["saved_of_dense"]
    assert "kept for backward" not in benchmark_table(record)


def test_what_is_kept_for_backward_is_counted_once_and_while_it_is_kept() -> None:
    x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)

    def step(times: int) -> None:
        for _ in range(times):
            kept = (x @ weight).exp()  # kept once, though for two steps of backward
            (kept * kept).sum().backward()

    assert saved_bytes(lambda: step(1), [weight]) == 4 * (4 * 8 + 4 * 8)  # x and `kept`
    assert saved_bytes(lambda: step(3), [weight]) == 4 * (4 * 8 + 4 * 8)  # never at once
    assert saved_bytes(lambda: step(1), [weight, x]) == 4 * 4 * 8


def test_the_arms_of_training_run_as_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher runs for one of them alone, and only the dense one keeps all tokens."""
    seen: dict[str, tuple[str, bool, float]] = {}

    def look(arms: dict[str, Any], **options: Any) -> dict[str, Samples]:
        for name, step in arms.items():
            trainer = step.__self__
            keep = step()["keep"]
            seen[name] = trainer.config.method, trainer.student.needs_teacher, keep
        return {name: Samples(latency_ms=[1.0], cpu_ms=[1.0]) for name in arms}

    monkeypatch.setattr(steps, "WARMUP", 0)
    monkeypatch.setattr(steps, "interleaved", look)
    monkeypatch.setattr(steps, "time_operators", lambda call, repeats: {})
    run_step_benchmark(BenchmarkConfig(**SMALL | {"repeats": 1}, keep=(0.25,), train="full"))
    assert seen[PLAIN][:2] == ("dense", False)
    assert seen[f"keep 0.25, {ALONE}"][:2] == ("shiva", False)
    assert seen[f"keep 0.25, {TAUGHT}"][:2] == ("shiva", True)
    assert seen[f"keep 0.25, {ALONE}"][2] == pytest.approx(0.25, abs=0.01)


@pytest.fixture
def work_is_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both clocks of the benchmark go on by a second for every linear layer that runs."""
    runs = 0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal runs
        runs += isinstance(module, nn.Linear)

    clocks = types.SimpleNamespace(perf_counter=lambda: runs, process_time=lambda: runs)
    monkeypatch.setattr(timing, "time", clocks)
    handle = register_module_forward_hook(count)
    yield
    handle.remove()


@pytest.mark.usefixtures("work_is_time")
def test_a_pair_times_both_models_in_turn() -> None:
    config = BenchmarkConfig(**SMALL, keep=(0.5,), beside="mag_cache", forwards=10)
    record = run_pair(config)
    assert [row["arm"] for row in record["rows"]] == [DENSE, "keep 0.5"]
    assert record["forwards_per_time"] == 10
    assert record["share_run"] == 0.6  # two steps, then every other one
    dense, half = record["rows"]
    assert all(len(row[kind]["latency_ms"]) == 2 for row in (dense, half) for kind in KINDS)
    assert dense["pruning_gives"] == dense["pruning_gives_beside"] == 1.0
    # Four of ten steps run no block.
    assert 1.0 < dense["both_give"] == dense["other_gives"] < 10 / 6
    table = benchmark_table(json.loads(json.dumps(record)))
    assert "pruning gives, with MagCache" in table
    assert "MagCache runs 60% of a sampling's 10 steps" in table


KINDS = "alone", "beside"


def test_beside_compile_one_model_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(run.state, "compile", compiled.append)
    config = BenchmarkConfig(**SMALL | {"mode": "compiled"}, keep=(0.5,), beside="compile")
    record = run_pair(config)
    assert len(compiled) == 1
    assert record["config"]["mode"] == "compiled"
    assert record["share_run"] == 1.0


def test_int8_is_put_on_before_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torchao sees one of the two models, bare."""
    seen: list[bool] = []
    made: Any = types.ModuleType("torchao.quantization")
    made.Int8DynamicActivationInt8WeightConfig = lambda: "int8"
    made.quantize_ = lambda model, how: seen.append(how == "int8" and attachment_of(model) is None)
    monkeypatch.setattr(pairs, "find_spec", lambda name: made)
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", made)
    config = BenchmarkConfig(**SMALL, keep=(0.5,), beside="int8")
    assert "int8: weights and activations" in benchmark_table(run_pair(config))
    assert seen == [True]
    monkeypatch.setattr(pairs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchao"):
        run_pair(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("aten::mkldnn_convolution", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm", "rest"),
        ("aten::_logcumsumexp", "rest"),
        ("aten::linalg_cholesky_ex", "rest"),
        ("TorchDynamo Cache Lookup", "rest"),
        ("triton_poi_fused_addmm_gelu_3", "rest"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
    ],
)
def test_operators_are_told_apart(name: str, kind: str) -> None:
    assert operator_kind(name) == kind


def test_time_is_told_by_kind_of_operator(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the profiler saw; its microseconds are given."""
    seen: list[str] = []

    def given(events: Any) -> list[tuple[str, float]]:
        seen.extend(name for name, _ in _self_times(events))
        return [("aten::mm", 6000.0), ("aten::bmm", 1200.0), ("aten::add", 600.0)]

    monkeypatch.setattr(operators, "_self_times", given)
    x = torch.ones(4, 4)
    found = time_operators(lambda: [x @ x + x for _ in range(20)], 20)  # three times
    assert {"aten::mm", "aten::add"} <= set(seen)
    assert tuple(found) == OPERATORS
    assert found["matrix products"] == pytest.approx(0.12)
    assert found["rest"] == pytest.approx(0.01)
    assert found["attention"] == 0.0
    assert capfd.readouterr() == ("", "")  # the profiler's own messages
    row = {"arm": DENSE, "operators_ms": {"matrix products": 3.0, "attention": 1.0, "rest": 0.0}}
    config = {"model": "sd3-tiny", "dtype": "float32", "mode": "eager"}
    table = operators_table({"rows": [row], "config": config})
    assert "| dense | 1.000 | 0.750 | 0.250 | 0.000 |" in table


def test_on_a_gpu_kernels_count_and_not_the_operators_that_launched_them() -> None:
    def event(key: str, device: DeviceType, on_device: float, annotation: bool = False) -> Any:
        return types.SimpleNamespace(
            key=key,
            device_type=device,
            self_device_time_total=on_device,
            self_cpu_time_total=7.0,
            is_user_annotation=annotation,
        )

    launched = event("aten::mm", DeviceType.CPU, 5.0)
    kernel, region = event("gemm", DeviceType.CUDA, 5.0), event("step", DeviceType.CUDA, 5.0, True)
    assert _self_times([launched, kernel, region]) == [("gemm", 5.0)]
    assert _self_times([launched]) == [("aten::mm", 7.0)]


def test_what_others_time_is_refused() -> None:
    for option in ({"train": "lora"}, {"beside": "int8"}):
        config = BenchmarkConfig(**SMALL, **option)
        with pytest.raises(ValueError, match="timed by run_pair"):
            run_benchmark(config)
        with pytest.raises(ValueError, match="timed by run_pair"):
            run_scaling(config, [64])


@pytest.mark.slow
def test_memory_is_kept_by_the_process() -> None:
    """What is freed is found again, without a page fault."""
    program = """
import resource, sys, torch
from shiva_dit.benchmark.timing import keep_memory
assert sys.argv[1] == "as it is" or keep_memory()
for turn in range(40):
    torch.empty(16 << 20).fill_(1.0)
    if turn == 29:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", program, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("as it is", "kept")
    }
    assert 10 * faults["kept"] < faults["as it is"]


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "sd3-tiny", "--mode", "eager", "--dtype", "float32", "--repeats", "1"]
    assert main([*arguments, "--keep", "0.4", "--size", "64x128", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "32 image and 7 text tokens" in printed
    (file,) = tmp_path.iterdir()
    assert str(file) in printed
    rows = benchmark_rows(json.loads(file.read_text(encoding="utf-8")))
    assert [row[0] for row in rows] == ["arm", DENSE, FORCED, "keep 0.4"]
    assert main([*arguments[:2], "--mode", "graphs", "--out", str(tmp_path)]) == 2
    assert "need the model on a CUDA device" in capsys.readouterr().err
    assert main(["benchmark", "no-such-model"]) == 2
    assert "known: sd35-medium" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_for_a_gpu_writes_its_records(tmp_path: Path) -> None:
    """On a CPU it times a tiny model, by the same commands."""
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(script), "--tiny", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(file.name for file in tmp_path.iterdir())
    assert [name.split("--")[0] for name in names] == [
        "graphs-sd3-tiny",
        "speed-sd3-tiny-64-batch4-float32-eager-1thread",
    ]


def test_all_workloads_have_a_line_for_people() -> None:
    assert all(load.about and load.name == name for name, load in WORKLOADS.items())
