"""Classes that aren't served, and why: a refusal then says more than that a class is unknown."""

from __future__ import annotations

GRID = "its feed-forward is a convolution over the whole grid of tokens"
HISTORY = "frames to go by are among its tokens, at several scales, and don't show in its latents"
NEIGHBOURS = (
    "its attention goes by neighbourhoods in the grid: tokens are reordered and masked by place"
)

REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": GRID,
    "SanaVideoTransformer3DModel": GRID,
    "SanaWMTransformer3DModel": f"{GRID}, and others run along time",
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it goes on from keys and values that chunks before have left, of all their tokens"
    ),
    "LatteTransformer3DModel": (
        "its blocks run over space and time in turn, so that a batch is frames in one block and "
        "places in the next"
    ),
    "HunyuanVideoFramepackTransformer3DModel": HISTORY,
    "HeliosTransformer3DModel": HISTORY,
    "Kandinsky5Transformer3DModel": NEIGHBOURS,
    "Kandinsky6SRTransformer3DModel": NEIGHBOURS,
    "OmniGenTransformer2DModel": (
        "its mask is over pairs of text and image tokens, and pictures to go by lie among the text"
    ),
    "HiDreamImageTransformer2DModel": (
        "diffusers runs its experts without gradients, by counts that are read from the device: "
        "routers can't learn from them, and blocks don't compile whole"
    ),
    "NucleusMoEImageTransformer2DModel": (
        "its experts choose their tokens among those that there are, so that a token's update "
        "depends on which others are left out"
    ),
    "MiniMaxH3Transformer3DModel": (
        "text, sound and video are rows of one sequence, at places that the call gives, and its "
        "timestep lists the times of kinds of rows, not of samples"
    ),
    "Cosmos3OmniTransformer": (
        "text, pictures, sound and actions are packed into one sequence without a batch"
    ),
    "BriaFibo2Transformer2DModel": (
        "tokens of its own come before the image's or after, by the lengths of the prompts"
    ),
    "AnyFlowTransformer3DModel": "each of its frames has two times, from and to",
    "AnyFlowFARTransformer3DModel": (
        "its frames have times of their own, and chunks before leave keys and values"
    ),
    "WanAnimate2Transformer3DModel": (
        "its mask is of places in all tokens, and a reference leaves keys and values of all its own"
    ),
}
"""Diffusion transformers that can't be served, by class name."""

PART_OF_UNET = "part of a UNet, of whose blocks it has one or two"

OUT_OF_SCOPE: dict[str, str] = {
    "Transformer2DModel": PART_OF_UNET,
    "TransformerTemporalModel": PART_OF_UNET,
    "DreamLiteTransformer2DModel": PART_OF_UNET,
    "PriorTransformer": "it makes one embedding, not a picture's tokens",
    "T5FilmDecoder": "diffusers has deprecated its one pipeline (spectrogram diffusion)",
    "MiniMaxMusic3RVQDepthDecoder": "it decodes codes one by one, without diffusion",
    "RFD4ProteinaTransformer": "it makes proteins, by features of pairs of residues",
}
"""What no adapter is meant for."""
