"""Training on the unpruned model's own samplings."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler

from shiva_dit.training.guided import both_ways, guided
from shiva_dit.training.route import Route
from shiva_dit.training.samples import TRAJECTORIES
from shiva_dit.training.settings import LossConfig, TrajectoryConfig
from shiva_dit.training.trainer import Trainer
from shiva_dit.training.trajectories import Trajectories
from tests import tiny
from tests.test_guided_training import guided_trainer
from tests.test_training_families import trainer_for

SOME = TrajectoryConfig(count=3, steps=4, share=0.5)
ALWAYS = TrajectoryConfig(count=3, steps=4, share=1.0)


def drawn(trainer: Trainer) -> Trajectories:
    trainer.samples.draw()
    assert trainer.samples.trajectories is not None
    return trainer.samples.trajectories


def test_a_route_goes_evenly_between_its_states() -> None:
    states = torch.tensor([[1.0, 3.0, 4.0], [10.0, 20.0, 40.0]])[..., None]
    route = Route(
        states=states, times=torch.tensor([0.9, 0.5, 0.0]), guidance=torch.tensor([1.0, 2.0])
    )
    t = torch.tensor([0.9, 0.25, 0.7, 0.0, 1.0, 0.5])  # three times of each, in turn
    assert route.at(t)[:, 0].tolist() == pytest.approx([1.0, 30.0, 2.0, 40.0, 1.0, 20.0])


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma", "flux", "wan"])
def test_states_are_those_of_guided_sampling_by_the_unpruned_model(
    name: str, tmp_path: Path
) -> None:
    """By a loop of its own, on flow matching and a diffusion schedule, told its guidance or not."""
    trainer = trainer_for(
        name, tmp_path, guidance=(2.0, 5.0), trajectories=ALWAYS, backbone="frozen"
    )
    student, data = trainer.student, trainer.data
    found = drawn(trainer)
    batch = found.take(torch.tensor([0, 1]))
    route, indices = batch.route, found.indices[:2]
    assert route is not None
    assert route.states.shape[:2] == (2, 5)
    assert route.times[-1] == 0
    assert bool((route.times.diff() < 0).all())
    assert bool(((route.guidance >= 2.0) & (route.guidance <= 5.0)).all())
    given = data.batch(indices, torch.Generator())
    for argument, value in given.conditioning.items():
        assert torch.equal(batch.conditioning[argument], value)

    diffusion = student.spec.learned_by == "diffusion schedule"
    solver: Any = (
        UniPCMultistepScheduler.from_config(DDPMScheduler().config)
        if diffusion
        else UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    )
    solver.set_timesteps(4)
    x = route.states[:, 0]
    trainer.close()  # the model as it was given
    told = not student.calls.both_ways
    for step, timestep in enumerate(solver.timesteps):
        t = (timestep + 0.5) / 1000 if diffusion else solver.sigmas[step]
        times = t.float().expand(2)
        with torch.no_grad():
            if told:
                arguments = student.calls.plain(x, times, given)
                out = student.model(**arguments, guidance=route.guidance)
            else:
                twice = both_ways(given, data.unconditional())
                out = student.model(
                    **student.calls.plain(x.repeat(2, *[1] * (x.ndim - 1)), times.repeat(2), twice)
                )
        found_ = student.path.prediction(out, student.num_tokens)
        if not told:
            found_ = guided(found_, route.guidance)
        x = solver.step(found_[:, : x.shape[1]], timestep, x, return_dict=False)[0]
    scale = float(x.abs().max())
    torch.testing.assert_close(route.states[:, -1], x, rtol=0, atol=3e-3 * scale)
    assert float((x - route.states[:, 0]).abs().max()) > 0.1 * scale


def test_without_guidance_each_runs_once(tmp_path: Path) -> None:
    trainer = guided_trainer(tmp_path, guidance=None, trajectories=ALWAYS)
    sizes: list[int] = []
    student = trainer.student
    hook = student.teacher.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    route = drawn(trainer).take(torch.arange(3)).route
    hook.remove()
    assert sizes == [2] * 4 + [1] * 4  # three, by two at once
    assert route is not None
    assert route.guidance.tolist() == [1.0] * 3
    trainer.close()


def test_a_part_is_trained_at_states_of_a_route(tmp_path: Path) -> None:
    """What the model is called with, its captions and the scale of the guided error."""
    trainer = guided_trainer(
        tmp_path,
        trajectories=ALWAYS,
        micro_batches=1,
        loss=LossConfig(diffusion=1.0, distillation=0.0),
        method="dense",
    )
    student = trainer.student
    tiny.randomize(student.model, seed=5, std=0.05)
    batch = drawn(trainer).take(torch.tensor([0, 1, 2, 0]))
    assert batch.route is not None
    part = trainer.planner.step("joint", trainer.generator).parts[0]
    seen: list[dict[str, Any]] = []
    hook = student.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    loss, errors = student.loss(part, batch, 0.0, trainer.data.unconditional())
    hook.remove()
    states = batch.route.at(part.t)
    torch.testing.assert_close(seen[0]["hidden_states"], states.repeat(2, 1, 1, 1))
    captions = batch.conditioning["encoder_hidden_states"]
    torch.testing.assert_close(seen[0]["encoder_hidden_states"][4:], captions)
    # The diffusion loss has no part in it: what is left are the errors to the teacher.
    with torch.no_grad():
        ours, theirs = (
            student.path.prediction(model(**seen[0]), student.num_tokens)
            for model in (student.model, student.teacher)
        )
    off = (guided(ours, batch.route.guidance) - guided(theirs, batch.route.guidance)).square()
    by_scale = (off.flatten(1).mean(1) / batch.route.guidance).mean()
    assert float(loss) == pytest.approx(errors["distill"] + float(by_scale), rel=1e-4)
    trainer.close()


def test_parts_are_taken_from_either_by_their_share(tmp_path: Path) -> None:
    trainer = guided_trainer(tmp_path, trajectories=TrajectoryConfig(count=2, steps=2, share=0.25))
    routes = [trainer.samples.take(trainer.samples.next(1)).route is not None for _ in range(400)]
    assert 0.18 < sum(routes) / 400 < 0.32
    assert trainer.samples.indices.position == 400
    trainer.close()


def test_a_stopped_run_goes_on_to_the_bit_and_draws_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = guided_trainer(tmp_path / "whole", trajectories=SOME)
    while whole.step < 6:
        whole.train_step()
    first = guided_trainer(tmp_path / "stopped", trajectories=SOME)
    while first.step < 4:
        first.train_step()
    first.save()
    first.close()
    files = sorted((tmp_path / "stopped" / TRAJECTORIES).iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2
    second = guided_trainer(tmp_path / "stopped", trajectories=SOME)
    second.resume()
    monkeypatch.setattr(Trajectories, "_sampled", None)
    while second.step < 6:
        second.train_step()
    for name, value in whole.optimization.tensors().items():
        assert torch.equal(value, second.optimization.tensors()[name]), name
    whole.close()
    second.close()


def test_drawing_can_be_stopped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends it then and there, and what was drawn is found again."""
    trainer, calls = guided_trainer(tmp_path, trajectories=SOME), []
    sampled = Trajectories._sampled

    def stopped(self: Trajectories, *given: Any) -> dict[str, torch.Tensor]:
        calls.append(given)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return sampled(self, *given)

    monkeypatch.setattr(Trajectories, "_sampled", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(show_progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.step == 0
    trainer.samples.draw()
    assert len(calls) == 3
    trainer.close()


def test_others_files_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Another model, scale, seed or number of steps draws files of its own."""
    folder = tmp_path / TRAJECTORIES

    def files(**changes: Any) -> set[Path]:
        trainer = guided_trainer(tmp_path, **{"trajectories": ALWAYS, **changes})
        drawn(trainer)
        trainer.close()
        return set(folder.iterdir())

    seen = files()
    other = tiny.sd3()
    tiny.randomize(other, seed=9, std=0.05)
    for changes in (
        {"seed": 1},
        {"guidance": (1.0, 2.0)},
        {"trajectories": TrajectoryConfig(count=3, steps=5)},
        {"model": other},
    ):
        now = files(**changes)
        assert len(now) == len(seen) + 2, changes
        seen = now
    assert files() == seen
    for file in seen:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"safetensors is not a whole file .* remove it"):
        files()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": -1}, "trajectories count"),
        ({"steps": 1}, "trajectories steps"),
        ({"share": 0.0}, "trajectories share"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrajectoryConfig(**changes)


def test_without_a_teacher_there_is_nothing_to_follow(tmp_path: Path) -> None:
    loss = LossConfig(output=0.0, distillation=0.0)
    with pytest.raises(ValueError, match=r"trajectories are .* loss.output"):
        guided_trainer(tmp_path, trajectories=SOME, loss=loss)
