"""Vision-language models of a few thousand weights, as their makers save them; processors need Pillow alone."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SENTENCE = "USER: ASSISTANT: Describe the picture briefly now a red green blue small large circle square on of with"
WORDS = list(SENTENCE.split())
TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)


def tokenizer(**special):
    """A tokenizer of words; what it does not know is `<unk>`."""
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **special}
    every = [*special.values(), "<image>", *WORDS]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)


def save_llava(folder, *, seed=0):
    """A LLaVA with a chat template: decoder only, an image is sixteen tokens of its prompt."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    _shake(model)
    model.generation_config.update(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, do_sample=True)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images,
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_blip(folder, *, seed=0):
    """A BLIP: no chat template, a prompt is the beginning of the caption."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    every = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(word.lower() for word in WORDS)]
    vocabulary = folder / "words.txt"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("\n".join(every))
    words = BertTokenizerFast(vocab={word: number for number, word in enumerate(every)})
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(every), "encoder_hidden_size": 16, "bos_token_id": 2, "eos_token_id": 3}
    text |= {"sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8})
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(config)
    _shake(model)
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, words).save_pretrained(folder)
    return folder


def _shake(model):
    """Weights large enough that what is said depends on the picture."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6)
