"""How every pipeline of diffusers that runs a supported model runs the passes of guidance: data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Guided:
    """How the `__call__` of a pipeline calls its transformer."""

    how: Literal["one batch", "in turn", "one pass"]
    """Both passes in one call, unconditional and conditional half; the conditional one first and
    then the other; or a single pass, since guidance was distilled into the model."""
    on: str | None = None
    """What says in its running call whether guidance is on: a variable of it, a variable and a
    bound ("guidance_scale > 1"), or a property of the pipeline ("self.do_..."). None where it
    names its passes by `cache_context`."""
    latents: str = "latents"
    """Variable of the running call that holds the latents, once per image."""
    times_are_equal: bool = False
    """Whether the times that it gives for every token are one time (`expand_timesteps`)."""


BY_PROPERTY = "self.do_classifier_free_guidance"
BY_VARIABLE = "do_classifier_free_guidance"


def _all(names: str, guided: Guided) -> dict[str, Guided]:
    return dict.fromkeys(names.split(), guided)


PIPELINES: dict[str, Guided] = {
    **_all(
        """
        BriaPipeline CogView3PlusPipeline EasyAnimatePipeline EasyAnimateControlPipeline
        EasyAnimateInpaintPipeline ErnieImagePipeline HunyuanDiTPipeline JoyImageEditPlusPipeline
        HunyuanDiTControlNetPipeline HunyuanDiTPAGPipeline LTXPipeline LTXConditionPipeline
        LTXImageToVideoPipeline LTX2Pipeline LTX2ConditionPipeline LTX2HDRPipeline
        LTX2ImageToVideoPipeline LTX2InContextPipeline MochiPipeline PRXPipeline PRXPixelPipeline
        StableDiffusion3Pipeline StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
        StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
        StableDiffusion3PAGPipeline StableDiffusion3PAGImg2ImgPipeline StableAudio3Pipeline
        """,
        Guided(how="one batch", on=BY_PROPERTY),
    ),
    "AceStepPipeline": Guided(how="one batch", on="apply_cfg", latents="xt"),
    "LTXI2VLongMultiPromptPipeline": Guided(
        how="one batch", on=BY_PROPERTY, latents="latents_packed"
    ),
    **_all(
        """
        AllegroPipeline AuraFlowPipeline CogVideoXPipeline CogVideoXFunControlPipeline
        CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline LuminaPipeline ConsisIDPipeline
        PixArtAlphaPipeline PixArtSigmaPipeline PixArtSigmaPAGPipeline StableAudioPipeline
        """,
        Guided(how="one batch", on=BY_VARIABLE),
    ),
    **_all(
        """
        ZImagePipeline ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageControlNetPipeline
        ZImageControlNetInpaintPipeline ZImageOmniPipeline
        """,
        Guided(how="one batch", on="apply_cfg"),
    ),
    **_all(
        "BriaFiboPipeline BriaFiboEditPipeline DiTPipeline",
        Guided(how="one batch", on="guidance_scale > 1"),
    ),
    **_all(
        """
        CogView4Pipeline Flux2KleinPipeline Flux2KleinInpaintPipeline FluxPipeline
        HunyuanImagePipeline HunyuanImageRefinerPipeline HunyuanVideoPipeline HunyuanVideo15Pipeline
        HunyuanVideo15ImageToVideoPipeline LongCatImagePipeline LongCatImageEditPipeline
        MotifVideoPipeline MotifVideoImage2VideoPipeline OvisImagePipeline QwenImagePipeline
        QwenImageControlNetPipeline QwenImageControlNetInpaintPipeline QwenImageEditPipeline
        QwenImageEditInpaintPipeline QwenImageEditPlusPipeline QwenImageImg2ImgPipeline
        QwenImageInpaintPipeline QwenImageLayeredPipeline QwenImage21Pipeline
        Kandinsky6TI2VAPipeline SkyReelsV2Pipeline SkyReelsV2ImageToVideoPipeline
        SkyReelsV2DiffusionForcingPipeline SkyReelsV2DiffusionForcingImageToVideoPipeline
        SkyReelsV2DiffusionForcingVideoToVideoPipeline WanImageToVideoPipeline WanVACEPipeline
        WanAnimatePipeline
        """,
        Guided(how="in turn"),
    ),
    "LongCatAudioDiTPipeline": Guided(how="in turn", on="guidance_scale > 1"),
    **_all("WanPipeline LucyEditPipeline", Guided(how="in turn", times_are_equal=True)),
    **_all(
        """
        ChromaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline ChronoEditPipeline
        CogView4ControlPipeline CosmosTextToWorldPipeline CosmosVideoToWorldPipeline
        Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline Cosmos2_5_PredictBasePipeline
        Cosmos2_5_TransferPipeline GlmImagePipeline JoyImageEditPipeline Krea2Pipeline
        Lumina2Pipeline WanVideoToVideoPipeline
        """,
        Guided(how="in turn", on=BY_PROPERTY),
    ),
    **_all(
        """
        FluxControlNetPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxKontextPipeline
        FluxKontextInpaintPipeline HunyuanSkyreelsImageToVideoPipeline
        HunyuanVideoImageToVideoPipeline
        """,
        Guided(how="in turn", on="do_true_cfg"),
    ),
    **_all(
        """
        Flux2Pipeline Flux2KleinKVPipeline FluxControlPipeline FluxControlImg2ImgPipeline
        FluxControlInpaintPipeline FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline
        FluxFillPipeline Ideogram4Pipeline LTX2DFRPipeline LTX2DFRTemporalRefinePipeline
        StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline VisualClozePipeline
        VisualClozeGenerationPipeline
        """,
        Guided(how="one pass"),
    ),
}
"""By class. Of classes that aren't here, and of those that bring a `__call__` of their own, nothing
is known: each pass chooses for itself."""
