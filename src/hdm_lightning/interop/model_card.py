"""The README.md of a trained model: what it is, what it needs, how to draw with it."""

import json
from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: hdm-lightning
pipeline_tag: text-to-image
tags: [hdm, xut, flow-matching]
---

# {name}

A text-to-image model trained with hdm-lightning: a Cross-U-Transformer (XUT, arXiv 2509.06068) that predicts the
velocity of a flow from noise to the latents of an autoencoder.

| | |
|---|---|
| network | width {width}, depth {depth}, patch {patch_size}, residual `{residual}`, skips `{skips}` |
| text encoder | {text_encoder} |
| latents | {channels} channels |

## Draw

```
hdm-sample {folder} "a prompt" --size {size}x{size}
```

```python
from hdm_lightning import HDMPipeline
HDMPipeline.from_pretrained("{folder}")("a prompt", height={size}, width={size}).images[0]
```

- `transformer/`: {weights}
- `vae/`: the autoencoder, for diffusers
- `model_index.json`: how the parts belong together

{inclusion}

## Training

```json
{training}
```

## Limits

The model shows what its training data show, with their gaps and biases, and no filter has been put behind it.
The licence of the training data may bind what is done with it.
"""
_AVERAGED = 'the weights averaged over training; `….raw.safetensors` (`variant="raw"`): the last ones'
_BY_NAME = "The text encoder is not included; it is found by the name above."
_INSIDE = "The text encoder is included, in `text_encoder/` and `tokenizer/`."


def model_card(
    xut: Mapping[str, Any],
    text_encoder: Mapping[str, Any] | None,
    training: Mapping[str, Any],
    *,
    keeps_raw: bool = False,
    inside: bool = False,
) -> str:
    """The card's Markdown.

    Args:
        xut: the network's configuration.
        text_encoder: `name`, `layer` and `context_length` of the text encoder, where they are known.
        training: record of the training; `name` and `resolution` are used where they are there.
        keeps_raw: whether the last weights are kept beside the averaged ones.
        inside: whether the text encoder lies in the folder.
    """
    text = "not recorded"
    if text_encoder:
        text = "`{name}`, hidden state {layer}, up to {context_length} tokens".format(**text_encoder)
    return _CARD.format(
        name=training.get("name", "A trained XUT"),
        size=training.get("resolution", 512),
        **{key: xut[key] for key in ("width", "depth", "patch_size", "residual", "skips", "channels")},
        text_encoder=text,
        inclusion=_INSIDE if inside else _BY_NAME,
        folder="final/",
        weights=_AVERAGED if keeps_raw else "the weights",
        training=json.dumps(training, indent=2, ensure_ascii=False),
    )
