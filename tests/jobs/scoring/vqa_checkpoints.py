"""Small random VQA checkpoints in transformers' layout: ViLT, BLIP, and a chat model (LLaVA)."""

import torch

LABELS = ("yes", "no", "maybe")
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "?", "."]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WIDE = {"initializer_range": 0.3}  # so that pictures and questions make a difference

# It begins with the first token, which the tokenizer would too, and thinks aloud unless told not to.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<user>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is undefined or enable_thinking %}<think>{% endif %}{% endif %}"
)


def make_vilt(folder, sure_of=None, seed=1):
    """A classifier over `LABELS`; its bias makes it `sure_of` one of them."""
    from transformers import BertTokenizer, ViltConfig, ViltForQuestionAnswering, ViltImageProcessorPil, ViltProcessor

    torch.manual_seed(seed)
    labels = dict(enumerate(LABELS))
    model = ViltForQuestionAnswering(
        ViltConfig(**SIZE, **WIDE, vocab_size=len(PIECES), image_size=64, patch_size=16, id2label=labels)
    )
    if sure_of:
        with torch.no_grad():
            model.classifier[-1].bias[LABELS.index(sure_of)] = 1000
    model.save_pretrained(folder)
    images = ViltImageProcessorPil(size={"shortest_edge": 64}, size_divisor=16)
    ViltProcessor(images, BertTokenizer(vocab=_numbered(PIECES))).save_pretrained(folder)
    return folder


def make_blip(folder):
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    text = SIZE | WIDE | special | {"vocab_size": len(PIECES), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    vision = SIZE | WIDE | {"image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision, **WIDE)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, BertTokenizer(vocab=_numbered(PIECES))).save_pretrained(folder)
    return folder


def make_llava(folder):
    """Without a padding token of its own, as many a released one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = Tokenizer(models.BPE(vocab=_numbered(letters), merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    more = ["<image>", "<user>", "<assistant>", "<think>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token="<s>", eos_token="</s>", additional_special_tokens=more
    )
    begin = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
    torch.manual_seed(0)
    special = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    text = LlamaConfig(**SIZE, **WIDE, **special, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=512)
    vision = CLIPVisionConfig(**SIZE, **WIDE, image_size=32, patch_size=16)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_token)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def _numbered(pieces):
    return {piece: number for number, piece in enumerate(pieces)}
