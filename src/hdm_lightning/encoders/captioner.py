"""Pretrained vision-language models that describe images, loaded by transformers' auto classes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from hdm_lightning.encoders.pretrained import OWN_CODE_ONLY, locate_model, readable
from hdm_lightning.errors import UserError
from hdm_lightning.precision import encoder_dtype, parse_dtype

FILES = ["config.json", "*.safetensors|*.bin", "preprocessor_config.json|processor_config.json"]
DOWNLOAD = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
NO_TORCHVISION = "torchvision"


class Said(NamedTuple):
    """A model's answer for an image, and whether it was cut at the token limit."""

    text: str
    cut: bool


class Captioner:
    """A model and its processor, as loaded by transformers, on one device; answers have up to `max_tokens` tokens.

    Decoding is greedy: equal batches of images give equal texts.
    """

    def __init__(self, model: Any, processor: Any, max_tokens: int) -> None:
        self.model, self.processor, self.max_tokens = model, processor, max_tokens
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # an answer continues from the prompt's last token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        self._ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def describe(self, images: Sequence[Image.Image], prompt: str) -> list[Said]:
        """Return the answers for RGB images of any size to a prompt, which is empty for models that need none."""
        text = self._spelled(prompt)
        more = {} if text is None else {"text": [text] * len(images), "padding": True}
        # With a chat template, the processor takes a list of images per conversation.
        grouped = [[image] for image in images] if self._chats else list(images)
        inputs = self.processor(images=grouped, return_tensors="pt", **more).to(self.model.device)
        inputs = {name: self._as_model(each) for name, each in inputs.items()}
        options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": self.max_tokens}
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, **options)
        return self._answers(tokens, inputs.get("input_ids"), prompt)

    @property
    def _chats(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _spelled(self, prompt: str) -> str | None:
        """Return the prompt in the model's own format; None if it takes no text."""
        if self._chats:
            parts = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
            asked = [{"role": "user", "content": parts}]
            return self.processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        image = getattr(self.processor, "image_token", None)
        places_it_itself = hasattr(self.processor, "task_prompts_without_inputs")  # Florence-2's
        if isinstance(image, str) and image not in prompt and not places_it_itself:
            return f"{image}{prompt}"
        return prompt or None

    def _as_model(self, value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self.model.dtype) if floating else value

    def _answers(self, tokens: torch.Tensor, asked: torch.Tensor | None, prompt: str) -> list[Said]:
        """Decode the answers without the prompt, which some models repeat."""
        length = 0 if asked is None else asked.shape[1]
        if asked is not None and tokens.shape[1] >= length and bool((tokens[:, :length] == asked).all()):
            tokens = tokens[:, length:]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [
            Said(_without(text, prompt), not self._ends & set(each))
            for text, each in zip(texts, tokens.tolist(), strict=True)
        ]


def _without(text: str, prompt: str) -> str:
    """Remove the prompt from the start of an answer; BLIP repeats it in its own spelling."""
    said, asked = text.split(), prompt.split()
    repeats = bool(asked) and [word.lower() for word in said[: len(asked)]] == [word.lower() for word in asked]
    return " ".join(said[len(asked) :]) if repeats else text.strip()


def locate_captioner(name: str, *, where: str) -> Path:
    """Return the folder of a vision-language model, downloading it at most once; see `locate_model`."""
    return locate_model(name, where=where, required=FILES, download=DOWNLOAD)


def captioner_fingerprint(name: str, *, where: str) -> str:
    """Return a hash of a model's small files and of the sizes of its weights files."""
    digest = hashlib.sha256()
    for file in sorted(locate_captioner(name, where=where).iterdir()):
        if file.suffix in (".json", ".jinja"):
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:32]


def load_captioner(name: str, *, device: str, dtype: str = "auto", max_tokens: int = 256, where: str) -> Captioner:
    """Load a vision-language model that transformers supports natively; code in its folder is never run.

    Args:
        name: a folder, `package:NAME/FOLDER`, or a hub name OWNER/NAME.
        device: such as `cuda:0`.
        dtype: `auto` is bfloat16 on CUDA that has it, else float32.
        max_tokens: maximum length of an answer.
        where: option to name in errors.

    Raises:
        UserError: there is no such model, or it cannot describe images.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: PLC0415  (seconds to import)

    folder = locate_captioner(name, where=where)
    chosen = parse_dtype(dtype, where="--dtype") or encoder_dtype(device)
    hint = "name an image-text-to-text model that transformers supports without custom code"
    safe = any(folder.glob("*.safetensors"))
    with readable("the vision-language model cannot be read", folder, where=where, hint=hint):
        model = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=chosen, use_safetensors=safe, **OWN_CODE_ONLY
        )
        try:
            processor = AutoProcessor.from_pretrained(str(folder), **OWN_CODE_ONLY)
        except ImportError as error:
            if NO_TORCHVISION not in str(error):
                raise
            what = "the model's processor needs torchvision, which is not installed"
            raise UserError(what, where=where, hint="pip install torchvision, in the version for your torch") from error
    return Captioner(model.eval().requires_grad_(False).to(device), processor, max_tokens)
