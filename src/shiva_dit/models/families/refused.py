"""Models that can't be served, and why: a refusal then says more than that a class is unknown."""

from __future__ import annotations

GRID = "its feed-forward is a convolution over the whole grid of tokens"

REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": GRID,
    "SanaVideoTransformer3DModel": GRID,
    "LatteTransformer3DModel": (
        "its blocks run over space and time in turn, so that a batch is frames in one block and "
        "places in the next"
    ),
    "LTX2VideoTransformer3DModel": "its blocks run video and sound together, by tokens of each",
    "HunyuanVideoFramepackTransformer3DModel": (
        "frames to go by are among its tokens, at several scales, and don't show in its latents"
    ),
    "Kandinsky5Transformer3DModel": (
        "its attention goes by neighbourhoods in the grid: tokens are reordered and masked by place"
    ),
    "OmniGenTransformer2DModel": (
        "its mask is over pairs of text and image tokens, and pictures to go by lie among the text"
    ),
}
"""By class name."""
