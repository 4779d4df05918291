"""A folder to upload: an adapter, a card, pictures, and no word of this machine."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from shiva_dit.adapter import ShivaAdapter
from shiva_dit.adapter.hub import push
from shiva_dit.adapter.module import AdapterModule, named_parts
from shiva_dit.adapter.storage import files_of, write
from shiva_dit.config import from_dict
from shiva_dit.ownership import check_folder
from shiva_dit.pictures.generate import Generation, generate
from shiva_dit.pictures.hub_card import Facts, hub_card
from shiva_dit.pictures.prompts import Prompt
from shiva_dit.pictures.putting import Served
from shiva_dit.provenance import read_as, read_json, read_text, write_atomically
from shiva_dit.saved_folder import CARD_FILE, CONFIG_FILE, check_place
from shiva_dit.training.log import LOG_FILE, read_log
from shiva_dit.training.looks.drawn import Row, draw_curves, draw_look
from shiva_dit.training.looks.looks import CURVES
from shiva_dit.training.looks.pictures import FOLDER as LOOKS
from shiva_dit.training.recipe import TrainConfig
from shiva_dit.training.recipe_file import RECIPE_FILE, write_recipe
from shiva_dit.training.result import RESULT_FILE
from shiva_dit.training.run import RUN_FILE

ADAPTER, PICTURES = "adapter", "pictures"
LOOK, EXAMPLES = "look.png", "examples.png"
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
"""How the Hub names licences; huggingface_hub has no list of them."""


def publish(
    run: Path,
    out: Path,
    *,
    license: str | None = None,
    base_model: str | None = None,
    repository: str | None = None,
    prompts: Sequence[Prompt] = (),
    examples: tuple[Any, Generation] | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Fill a folder with what belongs on the Hub. Nothing is sent.

    Args:
        run: Folder of a run, or of an adapter.
        out: Folder to fill; one that was filled before is renewed.
        license: Of the adapter, as the Hub names it.
        base_model: Hub id of the model that it is for; the one it was trained on by default.
        repository: Where it will be uploaded, for the card; the folder's name by default.
        prompts: Named by the card.
        examples: A pipeline, as it was loaded, and how it makes pictures of the prompts, which the
            card then shows.
        device: Where it makes them.

    Returns:
        The folder.

    Raises:
        ValueError: If the run holds no adapter, the folder something else, or something is damaged;
            if no licence can have that name.
    """
    run, out = Path(run), Path(out)
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(
            f"{license!r} is no licence's name on the Hub: take one, such as apache-2.0, mit or "
            "other, of https://huggingface.co/docs/hub/repositories-licenses."
        )
    folder = adapter_of(run)
    check_folder(out)
    whole = out.resolve()
    if whole in (run.resolve(), folder.resolve()):
        raise ValueError(f"{out} is the run itself: take another folder.")
    if whole.name == ADAPTER and (whole.parent / RUN_FILE).is_file():
        raise ValueError(f"{out} is the adapter of another run: take another folder.")
    adapter = ShivaAdapter.from_pretrained(folder)
    check_place(out, files_of(adapter), "Take an empty folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ValueError(f"{out} holds something else already: take an empty folder.")
    for _, part in named_parts(adapter):
        _rid_of_places(part, base_model)
    with tempfile.TemporaryDirectory() as made:  # what fails leaves the folder as it was
        beside = Path(made)
        lies = _pictures(run, folder, beside, adapter)
        if examples is not None:
            pipe, generation = examples
            served = replace(generation, served=Served(adapter=str(folder)))
            _examples(pipe, generation, served, prompts, beside, device)
            lies.append(EXAMPLES)
        facts = Facts(
            adapter=adapter,
            name=out.absolute().name,
            repository=repository or f"your-name/{out.absolute().name}",
            license=license,
            prompts=tuple(prompt.text for prompt in prompts),
            result=_result(run),
            look=_look(run, adapter),
            pictures=lies,
        )
        card = hub_card(facts)
        write(adapter, out, card)
        if read_text(out / CARD_FILE) != card:
            say = f"{out / CARD_FILE} was changed by hand and stays: remove it for a new card."
            tqdm.write(f"shiva-dit: {say}", file=sys.stderr)
        _renew(beside, out)
    return out


def upload(folder: Path, repository: str, *, private: bool, token: str | None = None) -> str:
    """Send a folder to the Hub; returns the address of the repository.

    Raises:
        ValueError: If the Hub can't be reached, or refuses it.
    """
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    def fill(temporary: str) -> None:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)

    failures: tuple[Any, ...] = HfHubHTTPError.__bases__  # its own, and what comes before it
    try:
        return push(fill, repository, private=private, token=token)
    except failures as error:
        raise ValueError(
            f"{repository} can't be uploaded to ({type(error).__name__}: {error}): is there a "
            "network, and did `hf auth login` give a token that may write there?"
        ) from error


def check_repository(name: str, option: str) -> str:
    """A Hub id.

    Raises:
        ValueError: If it is none.
    """
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{option} must be a Hub id like user/name, got {name!r}.")
    return name


def adapter_of(run: Path) -> Path:
    """The adapter's folder of a run, or the folder itself.

    Raises:
        ValueError: If there is no adapter.
    """
    for folder in (run / ADAPTER, run):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}: name a run's, or an adapter's.")
    raise ValueError(
        f"{run} holds no adapter: if its training isn't done, go on with it by `shiva-dit train "
        "... --resume`."
    )


# --- what is known of the run ----------------------------------------------------------------


def _result(run: Path) -> dict[str, Any] | None:
    path = run / RESULT_FILE
    if not path.is_file():
        return None
    with read_as("end of a run", path):
        found = read_json(path)
        return {name: found[name] for name in ("seconds", "processes", "device", "cost")}


def _look(run: Path, adapter: ShivaAdapter) -> dict[str, Any] | None:
    """What the log says of the very adapter."""
    steps = adapter.training_record.get("steps")
    lines = read_log(run / LOG_FILE)
    return next((line for line in lines if line["step"] == steps and "held_out" in line), None)


def _pictures(run: Path, folder: Path, out: Path, adapter: ShivaAdapter) -> list[str]:
    """Copy or draw what there is; what lies in the folder then."""
    found = []
    steps = adapter.training_record.get("steps")
    looks = sorted((run / LOOKS).glob("step-*.png"))
    own = [path for path in looks if path.stem.removeprefix("step-").lstrip("0") == str(steps)]
    curves = out / PICTURES / CURVES
    for path in (own or looks)[-1:]:
        _copy(path, out / PICTURES / LOOK)
        found.append(LOOK)
    if find_spec("matplotlib") is not None:
        if draw_curves(curves, run / LOG_FILE, adapter.config.keep_ratio):
            found.append(CURVES)
    elif (run / CURVES).is_file():
        _copy(run / CURVES, curves)
        found.append(CURVES)
    recipe = adapter.training_record.get("recipe")
    if run != folder and isinstance(recipe, dict):
        write_recipe(from_dict(TrainConfig, recipe, str(folder / CONFIG_FILE)), out)
        found.append(RECIPE_FILE)
    return found


def _renew(made: Path, out: Path) -> None:
    """Put what was made into the folder; what an earlier time left, and this made not, goes."""
    for name in (*(Path(PICTURES, each) for each in (LOOK, CURVES, EXAMPLES)), Path(RECIPE_FILE)):
        if (made / name).is_file():
            _copy(made / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    with suppress(OSError):  # it may hold the user's own, or not be there
        (out / PICTURES).rmdir()


def _copy(path: Path, to: Path) -> None:
    write_atomically(to, lambda temporary: shutil.copyfile(path, temporary))


def _examples(
    pipe: Any,
    plain: Generation,
    served: Generation,
    prompts: Sequence[Prompt],
    out: Path,
    device: torch.device | str,
) -> None:
    """Pictures of the prompts, without the adapter and with it."""
    import numpy as np  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as made:
        folders = Path(made) / "unpruned", Path(made) / "pruned"
        for folder, generation in zip(folders, (plain, served), strict=True):
            generate(pipe, generation, prompts, folder, device=device)
        rows = []
        for prompt in prompts:
            pair = []
            for folder in folders:
                with Image.open(folder / f"{prompt.id}-{plain.seeds[0]}.png") as image:
                    pixels = torch.from_numpy(np.array(image.convert("RGB")))
                pair.append(pixels.permute(2, 0, 1).float() / 127.5 - 1.0)
            rows.append(Row(title=prompt.text, dense=pair[0], pruned=pair[1], kept=None))
        draw_look(out / PICTURES / EXAMPLES, rows, f"{plain.steps} steps, the same noise")


# --- places -----------------------------------------------------------------------------------


def _rid_of_places(adapter: AdapterModule, base_model: str | None) -> None:
    """Take what names a place on this machine out of an adapter's record."""
    given = base_model or adapter.config.base_model
    known = given is not None and bool(HUB_ID.fullmatch(given)) and not Path(given).exists()
    adapter.config = replace(adapter.config, base_model=given if known else None)
    record = dict(adapter.training_record)
    recipe = dict(record["recipe"]) if isinstance(record.get("recipe"), dict) else {}
    for name in ("out", "start", "start_base"):
        if isinstance(recipe.get(name), str):
            recipe[name] = _last(recipe[name])
    for name in ("data", "backbone"):
        about = record.get(name)
        if isinstance(about, dict) and isinstance(about.get("name"), str):
            keeps = bool(HUB_ID.fullmatch(about["name"])) and not Path(about["name"]).exists()
            record[name] = {**about, "name": about["name"] if keeps else _last(about["name"])}
    if recipe:
        record["recipe"] = recipe
    adapter.training_record = _without_places(record)


def _without_places(value: Any) -> Any:
    """Plain data, with the last part alone of each absolute path."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str):
        absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
        return _last(value) if absolute else value
    return value


def _last(path: str) -> str:
    r"""The last part of a path of any system.

    >>> _last("/home/me/runs/cats"), _last(r"C:\Users\me\cats"), _last("cats")
    ('cats', 'cats', 'cats')
    """
    return PureWindowsPath(path).name or PurePosixPath(path).name or "a-folder"
