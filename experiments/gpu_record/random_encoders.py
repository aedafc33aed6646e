"""Save a text encoder and an autoencoder of a network's size with random weights: random_encoders.py FOLDER SIZE.

The text encoder gets a tokenizer of the captions' words. hdm-train reads the folders like those of trained models.
"""

import json
import re
import sys
import tarfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from hdm_lightning.profiling.cases import size_of

DRAWINGS = Path(__file__).resolve().parents[2] / "data" / "openclipart-mini"


def vocabulary(limit: int) -> dict[str, int]:
    """Return the words of the drawings' captions, at most as many as the model has embeddings."""
    words = {"<pad>": 0, "<unk>": 1}
    for path in sorted(DRAWINGS.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".txt") and (file := shard.extractfile(member)) is not None:
                    for word in re.findall(r"\w+|[^\w\s]+", file.read().decode()):
                        if len(words) < limit:
                            words.setdefault(word, len(words))
    return words


def main() -> None:
    """Write both folders."""
    folder, size = Path(sys.argv[1]), size_of(sys.argv[2])
    tokens = Tokenizer(models.WordLevel(vocabulary(int(size.text["vocab_size"])), unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "text")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        text = AutoModel.from_config(AutoConfig.for_model(**size.text), dtype=torch.bfloat16)
        vae = AutoencoderKL(**size.autoencoder)
    text.save_pretrained(folder / "text")
    vae.save_pretrained(folder / "vae")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))


if __name__ == "__main__":
    main()
