"""The README.md of a trained model: what it is, what it needs, how to draw with it."""

import json
from collections.abc import Mapping
from typing import Any

_CARD = """# {name}

A text-to-image model trained with hdm-lightning: a Cross-U-Transformer (XUT, arXiv 2509.06068) that predicts the
velocity of a flow from noise to the latents of an autoencoder.

| | |
|---|---|
| network | width {width}, depth {depth}, patch {patch_size}, residual `{residual}`, skips `{skips}` |
| text encoder | `{text_encoder}`, hidden state {layer}, up to {context_length} tokens |
| latents | {channels} channels, 1/{factor} of the picture's side |

## Draw

```
hdm-sample {folder} "a prompt" --size {size}x{size}
```

- `model.safetensors`: {weights}
- `vae/`: the autoencoder, for diffusers
- `config.json`: all that is needed to rebuild the network

The text encoder is not included; it is found by the name above.

## Training

```json
{training}
```

## Limits

The model shows what its training data show, with their gaps and biases, and no filter has been put behind it.
The licence of the training data may bind what is done with it.
"""


def model_card(description: Mapping[str, Any], *, keeps_raw: bool = False) -> str:
    """The card's Markdown.

    Args:
        description: the content of a bundle's config.json.
        keeps_raw: whether the last weights are kept beside the averaged ones.
    """
    text, training = description["text_encoder"], description["training"]
    averaged = "the weights averaged over training; `model_raw.safetensors`: the last ones"
    return _CARD.format(
        name=training.get("name", "A trained XUT"),
        size=training.get("resolution", 512),
        **{key: description["xut"][key] for key in ("width", "depth", "patch_size", "residual", "skips")},
        text_encoder=text["name"],
        layer=text["layer"],
        context_length=text["context_length"],
        **description["latent"],
        folder="final/",
        weights=averaged if keeps_raw else "the weights",
        training=json.dumps(training, indent=2, ensure_ascii=False),
    )
