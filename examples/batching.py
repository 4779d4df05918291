"""Pictures for many at once by one SD3 model: several adapters, steps of several requests together.

A forward's token counts come from the schedule's row for its time, so requests can share one if
they have the same adapter, size and row, whatever steps they are at. Every turn runs one forward
for the largest such group. To serve another family, write `start`, `predict` and `finish` as its
pipeline has them.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import shiva_dit

logger = logging.getLogger("server")
UNPRUNED = "none"
"""Names the model without an adapter."""


class BusyError(RuntimeError):
    """There are more requests than the server takes."""


@dataclass(eq=False)
class Request:
    """A picture that somebody waits for."""

    prompt: str
    adapter: str
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    negative_prompt: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    dropped: bool = False
    """Set by whoever no longer waits."""
    picture: Image.Image | None = None
    error: Exception | None = None
    # What the loop keeps of it.
    latents: Any = None
    text: Any = None
    scheduler: Any = None
    step: int = 0
    turn: int = 0
    """The last one that moved it on."""

    @property
    def timestep(self) -> torch.Tensor:
        """Of the next forward."""
        return self.scheduler.timesteps[self.step]

    def end(self, error: Exception | None = None) -> None:
        """Wake whoever waits."""
        self.error, self.latents, self.text = error, None, None
        self.done.set()


@dataclass(frozen=True)
class Served:
    """An adapter on a model of its own, whose weights are those of the pipeline's."""

    model: Any
    adapter: shiva_dit.ShivaAdapter | None = None
    segments: int = 1
    tables: dict[int, Any] = field(default_factory=dict)
    """By the number of tokens."""

    def row(self, num_tokens: int, t: float) -> tuple[int, ...]:
        """How many tokens each block keeps."""
        if self.adapter is None:
            return ()
        if num_tokens not in self.tables:
            self.tables[num_tokens] = self.adapter.schedule.for_tokens(
                num_tokens, multiple=self.adapter.config.multiple, segments=self.segments
            )
        return self.tables[num_tokens].row(t)


class Batcher:
    """A thread that makes the pictures of all requests.

    Args:
        pipe: A `StableDiffusion3Pipeline`, nothing attached to its transformer.
        max_batch: Requests in one forward.
        max_running: Requests under way at once; the others wait.
        max_waiting: Beyond so many, a request is refused.
        segments: Different rows over time at most: the fewer, the more requests share a forward.
            Flat ratios have one anyway.
        patience: After so many turns without a forward a request's group comes first.
        text_tokens: Of T5, for every prompt.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_batch: int = 8,
        max_running: int = 32,
        max_waiting: int = 256,
        segments: int = 4,
        patience: int = 16,
        text_tokens: int = 256,
    ) -> None:
        if pipe.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError("a scheduler with use_dynamic_shifting isn't served by this example.")
        self.pipe, self.max_batch, self.patience = pipe, max_batch, patience
        self.segments = segments
        self.max_running, self.max_waiting, self.text_tokens = max_running, max_waiting, text_tokens
        self.served: dict[str, Served] = {UNPRUNED: Served(pipe.transformer)}
        self.counts = {"made": 0, "failed": 0, "dropped": 0, "turns": 0, "moved": 0}
        self._lock = threading.Lock()
        """Held by whoever runs the model or puts something on it."""
        self._changed = threading.Condition()
        """Guards what follows."""
        self._waiting: deque[Request] = deque()
        self._guests = 0
        self._closed = False
        self._running: list[Request] = []  # the loop's own
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    # --- for everybody ----------------------------------------------------------------------

    def add(self, name: str, adapter: shiva_dit.ShivaAdapter) -> None:
        """Serve an adapter, between two turns.

        The hooks go on a copy of the modules that shares the model's weights, so that nothing is
        switched from turn to turn. What tunes all weights needs a copy of these as well.

        Raises:
            ValueError: If the name is taken, or the adapter another model's. Nothing has changed.
        """
        replaces = adapter.config.backbone == "full"
        with self.alone():
            if name in self.served:
                raise ValueError(f"an adapter {name!r} is served already.")
            model = self.pipe.transformer
            shared = () if replaces else (*model.parameters(), *model.buffers())
            own = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
            shiva_dit.apply(own, adapter, segments=self.segments, merge=replaces)
            self.served[name] = Served(own, adapter, self.segments)

    def check(self, request: Request) -> None:
        """Raise a ValueError for what can't be made."""
        if request.adapter not in self.served:
            names = ", ".join(self.served)
            raise ValueError(f"no adapter {request.adapter!r}; served are: {names}.")
        pixels = self.pipe.vae_scale_factor * self.pipe.patch_size
        largest = self.pipe.transformer.config.pos_embed_max_size * pixels
        for name in ("height", "width"):
            side = getattr(request, name)
            if side % pixels or not pixels <= side <= largest:
                raise ValueError(
                    f"{name} must be a multiple of {pixels} up to {largest}, got {side}."
                )

    def submit(self, request: Request) -> Request:
        """Have a picture made; `request.done` is set when it is there, or an error.

        Raises:
            ValueError: For what can't be made.
            BusyError: If too many wait, or the server is stopping.
        """
        self.check(request)
        with self._changed:
            if self._closed:
                raise BusyError("the server is stopping.")
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already: try again later.")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within: no turn runs. A turn is waited for; the next one waits."""
        with self._changed:
            self._guests += 1
        try:
            with self._lock:
                yield
        finally:
            with self._changed:
                self._guests -= 1
                self._changed.notify_all()

    def state(self) -> dict[str, int]:
        """How much there is to do and what was done; a turn moves several requests on."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": len(self._running), **self.counts}

    def close(self) -> None:
        """Take no more requests, and end those that wait by an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    # --- the loop ---------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._admit():
            with self._lock:
                self._turn()
        for request in (*self._running, *self._waiting):
            request.end(BusyError("the server is stopping."))

    def _admit(self) -> bool:
        """Wait for something to do, and take up what has come; False at the end."""
        with self._changed:
            while not self._closed and (self._guests or not (self._running or self._waiting)):
                self._changed.wait()
            for requests in (self._running, self._waiting):
                gone = [request for request in requests if request.dropped]
                for request in gone:
                    requests.remove(request)
                    request.end()
                self.counts["dropped"] += len(gone)
            while self._waiting and len(self._running) < self.max_running:
                request = self._waiting.popleft()
                request.turn = self.counts["turns"]
                self._running.append(request)
            return not self._closed

    @torch.no_grad()
    def _turn(self) -> None:
        """Begin what is new, one forward for one group, and finish what is through."""
        for request in [each for each in self._running if each.scheduler is None]:
            self._try([request], lambda new: self.start(new[0]))
        group = self._pick()
        if not group:
            return
        self.counts["turns"] += 1
        self.counts["moved"] += len(group)
        for request in group:
            request.turn = self.counts["turns"]
        if not self._try(group, self.predict):
            return
        for request in [each for each in group if each.step == each.steps]:
            if self._try([request], lambda last: self.finish(last[0])):
                self.counts["made"] += 1
                self._running.remove(request)
                request.end()

    def _pick(self) -> list[Request]:
        """The largest group; but one whose first has waited too long goes before."""
        groups: dict[tuple[Any, ...], list[Request]] = {}
        for request in sorted(self._running, key=lambda each: each.turn):
            groups.setdefault(self.group_of(request), []).append(request)
        if not groups:
            return []
        found = list(groups.values())  # by how long the first of each has waited
        late = self.counts["turns"] - found[0][0].turn > self.patience
        chosen = found[0] if late else max(found, key=lambda g: min(len(g), self.max_batch))
        return chosen[: self.max_batch]

    def _try(self, requests: list[Request], do: Callable[[list[Request]], None]) -> bool:
        """Whether it went well; a fault ends these requests and no others."""
        try:
            do(requests)
        except Exception as error:
            logger.exception("%d requests failed", len(requests))
            for request in requests:
                self._running.remove(request)
                request.end(error)
            self.counts["failed"] += len(requests)
            return False
        return True

    # --- what is SD3's ----------------------------------------------------------------------

    def group_of(self, request: Request) -> tuple[Any, ...]:
        """What the requests of one forward have in common."""
        served = self.served[request.adapter]
        t = float(request.timestep) / request.scheduler.config.num_train_timesteps
        sides = request.latents.shape[2:]
        num_tokens = sides.numel() // self.pipe.patch_size**2
        return request.adapter, sides, request.guidance > 1.0, served.row(num_tokens, t)

    def start(self, request: Request) -> None:
        """Text, noise and a scheduler of its own."""
        pipe, guided = self.pipe, request.guidance > 1.0
        embeds, unconditional, pooled, pooled_unconditional = pipe.encode_prompt(
            request.prompt,
            None,
            None,
            do_classifier_free_guidance=guided,
            negative_prompt=request.negative_prompt,
            max_sequence_length=self.text_tokens,
        )
        text = embeds, pooled
        if guided:
            text = torch.cat([unconditional, embeds]), torch.cat([pooled_unconditional, pooled])
        latents = pipe.prepare_latents(
            1,
            pipe.transformer.config.in_channels,
            request.height,
            request.width,
            embeds.dtype,
            embeds.device,
            torch.Generator().manual_seed(request.seed),
        )
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(request.steps)  # on the host, where reading them is free
        request.text, request.latents, request.scheduler = text, latents, scheduler

    def predict(self, group: list[Request]) -> None:
        """One forward, and one step of each request."""
        served, guided = self.served[group[0].adapter], group[0].guidance > 1.0
        halves = 2 if guided else 1
        latents = torch.cat([request.latents for request in group])
        # (halves, B, ...): all unconditional passes first, as the pipeline has them.
        texts = [torch.stack(parts, 1) for parts in zip(*(r.text for r in group), strict=True)]
        said: Any = nullcontext()
        if served.adapter is not None:
            said = shiva_dit.guided(served.model, "both" if guided else "alone")
        with said:
            predicted = served.model(
                hidden_states=torch.cat([latents] * halves),
                timestep=torch.stack([r.timestep for r in group] * halves).to(latents.device),
                encoder_hidden_states=texts[0].flatten(0, 1),
                pooled_projections=texts[1].flatten(0, 1),
                return_dict=False,
            )[0]
        if guided:
            unconditional, predicted = predicted.chunk(2)
            scale = torch.tensor([r.guidance for r in group]).to(predicted)[:, None, None, None]
            predicted = unconditional + scale * (predicted - unconditional)
        for place, request in enumerate(group):
            towards = predicted[place : place + 1]
            moved = request.scheduler.step(
                towards, request.timestep, request.latents, return_dict=False
            )
            request.latents, request.step = moved[0], request.step + 1

    def finish(self, request: Request) -> None:
        """The picture."""
        vae = self.pipe.vae
        latents = request.latents / vae.config.scaling_factor + vae.config.shift_factor
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        request.picture = self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]
