"""The README.md of a trained model: what it is, what it needs, how to draw with it."""

import json
from collections.abc import Mapping
from typing import Any

_CARD = """# {name}

A text-to-image model trained with hdm-lightning: a Cross-U-Transformer (XUT, arXiv 2509.06068) that predicts the
velocity of a flow from noise to the latents of an autoencoder.

| | |
|---|---|
| network | width {width}, {depth} levels, patch {patch_size}, residual `{residual}`, skips `{skips}` |
| text encoder | `{text_encoder}`, hidden state {layer}, up to {context_length} tokens |
| latents | {channels} channels, 1/{factor} of the picture's side |

## Draw

```
hdm-sample {folder} "a prompt" --size 512x512
```

`model.safetensors` holds the weights averaged over training{raw}, `vae/` the autoencoder (diffusers), `config.json`
all that is needed to rebuild the network. The text encoder is not included; it is found by the name above.

## Training

```json
{training}
```

## Limits

The model shows what its training data show, with their gaps and biases, and no filter has been put behind it.
The licence of the training data may bind what is done with it.
"""


def model_card(description: Mapping[str, Any], *, name: str = "A trained XUT", keeps_raw: bool = False) -> str:
    """The card's Markdown.

    Args:
        description: the content of a bundle's config.json.
        name: heading.
        keeps_raw: whether the last weights are kept beside the averaged ones.
    """
    text = description["text_encoder"]
    return _CARD.format(
        name=name,
        **{key: description["xut"][key] for key in ("width", "depth", "patch_size", "residual", "skips")},
        text_encoder=text["name"],
        layer=text["layer"],
        context_length=text["context_length"],
        **description["latent"],
        folder="final/",
        raw=", `model_raw.safetensors` the last ones" if keeps_raw else "",
        training=json.dumps(description["training"], indent=2, ensure_ascii=False),
    )
