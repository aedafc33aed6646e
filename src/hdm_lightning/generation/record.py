"""What a picture was made from: enough to make it again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hdm_lightning.generation.settings import SamplingSettings
from hdm_lightning.version import __version__

RECORD_FORMAT = "hdm-lightning image 1"


@dataclass(frozen=True)
class ImageRecord:
    """Prompt, seed, settings and model of one picture.

    Args:
        prompt: what it shows.
        seed: where its noise comes from.
        settings: how it was drawn.
        model: path of the model as the user gave it.
        fingerprint: SHA-256 of the model's weights.
        image: path of the picture it started from (image-to-image), or None.
        image_sha256: SHA-256 of that file.
        loaded_with: `precision`, and `text_encoder` and `vae` where others than the model's own were named.
    """

    prompt: str
    seed: int
    settings: SamplingSettings
    model: str
    fingerprint: str
    image: str | None = None
    image_sha256: str | None = None
    loaded_with: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "format": RECORD_FORMAT,
            "version": __version__,
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings.to_json(),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "image": self.image,
            "image_sha256": self.image_sha256,
            "loaded_with": dict(self.loaded_with),
        }

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> "ImageRecord":
        """The record that `to_json` wrote.

        Raises:
            ValueError: if it is of another format, or a setting is unknown or out of its range.
        """
        if mapping.get("format") != RECORD_FORMAT:
            raise ValueError(f"format: got {mapping.get('format')!r}, expected {RECORD_FORMAT!r}")
        return cls(
            prompt=mapping["prompt"],
            seed=mapping["seed"],
            settings=SamplingSettings.from_json(mapping["settings"]),
            model=mapping["model"],
            fingerprint=mapping["fingerprint"],
            image=mapping["image"],
            image_sha256=mapping["image_sha256"],
            loaded_with=mapping.get("loaded_with", {}),
        )
