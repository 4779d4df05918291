"""Serve with what is installed, on a tiny model: `make release` runs it without any extra.

The adapters and the model are made by another environment, which has all that training needs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("frozen", "full", "lora", "dora")
ABSENT = ("peft", "accelerate", "transformers", "matplotlib", "sklearn")


def make(folder: Path) -> None:
    """A tiny model and an adapter of each kind, as training leaves them: needs the extras."""
    from tests import tiny  # noqa: PLC0415

    model = tiny.sd3()
    model.save_pretrained(folder / "model")
    for method in METHODS:
        adapter = tiny.adapter(model, backbone=method, lora_rank=3)
        adapter.backbone_weights = None if method == "frozen" else tiny.tuned(method)[0]
        adapter.save_pretrained(folder / method)


def serve(folder: Path) -> None:
    """Apply each adapter of a folder to its model, run it, and print what is kept."""
    import torch  # noqa: PLC0415
    from diffusers import SD3Transformer2DModel  # noqa: PLC0415

    import shiva_dit  # noqa: PLC0415

    present = [name for name in ABSENT if importlib.util.find_spec(name) is not None]
    assert not present, f"this environment has {present}"
    model = SD3Transformer2DModel.from_pretrained(folder / "model").eval()
    given = {
        "hidden_states": torch.ones(1, 4, 16, 16),
        "encoder_hidden_states": torch.ones(1, 5, 24),
        "pooled_projections": torch.ones(1, 20),
        "timestep": torch.tensor([500.0]),
    }
    for method in METHODS:
        shiva_dit.apply(model, folder / method)
        with torch.no_grad():
            assert torch.isfinite(model(**given).sample).all()
        sys.stdout.write(f"{method}: {shiva_dit.summary(model, text_tokens=5)}\n")
        shiva_dit.remove(model)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        root = Path(__file__).parents[1]
        code = f"from pathlib import Path; from tests.serving import make; make(Path({made!r}))"
        subprocess.run([sys.argv[1], "-c", code], cwd=root, check=True)
        serve(Path(made))
