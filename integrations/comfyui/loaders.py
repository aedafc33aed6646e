"""Nodes that load a model as MODEL, CLIP and VAE, and add a LoRA to it."""

from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP

from hdm_lightning.encoders.autoencoder import KLAutoencoder
from hdm_lightning.errors import UserError
from hdm_lightning.interop.adapter_files import PREFIXES, adapter_folder, is_adapter, named_tensors, read_adapter
from hdm_lightning.interop.adapters import check_adapter, weights_sha256
from hdm_lightning.precision import default_dtype

from . import files
from .autoencoder import PictureVAE
from .model import DiffusionModel, Facts, HDMModel, LatentFormat, facts_of, patcher_of, sampling_precisely
from .text_encoder import TextClip

if TYPE_CHECKING:
    from hdm_lightning.generation.pipeline import HDMPipeline

CATEGORY = "hdm-lightning"
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_TEXT_ENCODER_HINT = (
    "or put its folder (config.json, weights, tokenizer) into models/text_encoders and enter the folder's name as "
    "text_encoder"
)


class LoadModel:
    """HDM Load Model: a run, a pipeline folder, a single file of hdm-convert, or a released network."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    DESCRIPTION = "Loads a model of hdm-lightning with its text encoder and autoencoder. Nothing is downloaded."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        shown = {
            "path": "a run, its final/, a pipeline folder or a file, anywhere; overrides the name",
            "precision": "of the network's computation; auto: float32 on a CPU, bfloat16 or float16 on a GPU",
            "text_encoder": "replaces the recorded one: a folder in models/text_encoders, a path, package:NAME/FOLDER",
            "vae": "folder of the autoencoder, if the file contains none",
        }
        return {
            "required": {"name": (files.models(),)},
            "optional": {
                "path": ("STRING", {"default": "", "tooltip": shown["path"]}),
                "precision": (PRECISIONS, {"tooltip": shown["precision"]}),
                "text_encoder": ("STRING", {"default": "", "tooltip": shown["text_encoder"]}),
                "vae": ("STRING", {"default": "", "tooltip": shown["vae"]}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, name: str, path: str = "", **_: Any) -> float:
        """Return when the model was last modified."""
        return files.changed_at(name, path, files.MODEL_FOLDERS)

    def load(
        self, name: str, path: str = "", precision: str = "auto", text_encoder: str = "", vae: str = ""
    ) -> tuple[Any, Any, Any]:
        """Return MODEL, CLIP and VAE."""
        from hdm_lightning.generation.loading import LoadOptions, load_pipeline  # noqa: PLC0415  (seconds to import)

        place = files.chosen(name, path, files.MODEL_FOLDERS)
        if is_adapter(place):
            hint = "load its base here, and the LoRA with HDM Load LoRA"
            raise UserError("is a LoRA, not a whole model", where=str(place), hint=hint)
        device = comfy.model_management.get_torch_device()
        dtype = default_dtype(device) if precision == "auto" else getattr(torch, precision)
        options = LoadOptions(
            autocast=None if dtype == torch.float32 else dtype,
            text_encoder=files.text_encoder_folder(text_encoder),
            vae=vae.strip() or None,
            local_only=True,
        )
        try:
            loaded = load_pipeline(place, options)
        except UserError as error:
            if error.where != "text_encoder":
                raise
            raise UserError(error.what, where=error.where, hint=f"{error.hint}; {_TEXT_ENCODER_HINT}") from error
        return parts_of(loaded.pipeline, dict(loaded.sampling))


def parts_of(pipeline: "HDMPipeline", sampling: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return a pipeline as MODEL, CLIP and VAE."""
    autoencoder, network = pipeline.autoencoder, pipeline.network
    assert isinstance(autoencoder, KLAutoencoder)
    facts = Facts(
        factor=autoencoder.factor,
        channels=autoencoder.channels,
        patch=network.config.patch_size,
        context_width=network.config.context_width,
        sha256=weights_sha256(network.state_dict()),
        sampling=sampling,
    )
    latents = LatentFormat(autoencoder.mean, autoencoder.std, autoencoder.factor)
    model = HDMModel(DiffusionModel(network, facts, pipeline.autocast), latents)
    management = comfy.model_management
    patcher = patcher_of(model, management.get_torch_device(), management.unet_offload_device())
    patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "hdm_precision", sampling_precisely)
    plain = KLAutoencoder(autoencoder.model, [0.0] * facts.channels, [1.0] * facts.channels)
    return patcher, TextClip(pipeline.encoder, pipeline.caption_tokenizer), PictureVAE(plain)


class LoadLora:
    """HDM Load LoRA: an adapter of this project, a peft folder or a file, with a weight."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Adds a LoRA to a model of hdm-lightning. Chain the nodes to use several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs, as ComfyUI shows them."""
        shown = {
            "path": "the folder of a run, a peft folder or a file, anywhere; overrides the name",
            "any_base": "also accept a LoRA trained on other weights of this shape",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "name": (files.adapters(),),
                "weight": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
            "optional": {
                "path": ("STRING", {"default": "", "tooltip": shown["path"]}),
                "any_base": ("BOOLEAN", {"default": False, "tooltip": shown["any_base"]}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, name: str, path: str = "", **_: Any) -> float:
        """Return when the adapter was last modified."""
        return files.changed_at(name, path, files.ADAPTER_FOLDERS)

    def load(self, model: Any, name: str, weight: float, path: str = "", any_base: bool = False) -> tuple[Any]:
        """Return the model with the adapter as a patch of its weights."""
        from hdm_lightning.generation.pipeline_adapters import find_adapter  # noqa: PLC0415  (seconds to import)

        facts, place = facts_of(model), find_adapter(str(files.chosen(name, path, files.ADAPTER_FOLDERS)))
        if not is_adapter(place):
            hint = "use the folder of a LoRA run, a peft folder, or a .safetensors file with lora_A and lora_B"
            raise UserError("is not a LoRA", where=str(place), hint=hint)
        network = model.model.diffusion_model
        adapter = read_adapter(adapter_folder(place) or place, network.config)
        check_adapter(adapter, network.state_dict(), where=str(place), sha256=facts.sha256, any_base=any_base)
        folded = {layer: low_rank.folded() for layer, low_rank in adapter.layers.items()}
        tensors = named_tensors(folded, PREFIXES["lora_comfyui"])
        patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, weight, 0.0)
        return (patched,)
