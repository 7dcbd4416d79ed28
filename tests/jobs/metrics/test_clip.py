"""CLIP scores from a small random CLIP checkpoint, made here in the layout that transformers writes."""

import json

import pytest
import torch
from PIL import Image

from flashu.errors import InputError
from jobs.metrics.fit import ClipScorer

PICTURES = [Image.new("RGB", (50, 40), "red"), Image.effect_noise((64, 64), 90).convert("RGB")]
PROMPTS = ["a red square", "noise"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = len(words) - 1
    text = size | {
        "vocab_size": len(words),
        "max_position_embeddings": 77,
        "bos_token_id": end - 1,
        "eos_token_id": end,
    }
    vision = size | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(checkpoint):
    return ClipScorer(str(checkpoint))


def test_the_score_is_a_hundred_times_the_cosine_of_the_embeddings(scorer):
    """Worked out from the two towers on their own, one pair at a time."""
    scores = scorer.score(PICTURES, PROMPTS)
    for picture, prompt, score in zip(PICTURES, PROMPTS, scores, strict=True):
        pixels = scorer.processor(picture, return_tensors="pt")["pixel_values"]
        tokens = scorer.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            image = scorer.model.visual_projection(scorer.model.vision_model(pixels).pooler_output)[0]
            text = scorer.model.text_projection(scorer.model.text_model(**tokens).pooler_output)[0]
        cosine = (image @ text / image.norm() / text.norm()).item()
        assert score == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert max(scores) > 0


def test_negative_cosines_score_zero(scorer):
    original = scorer.score(PICTURES, PROMPTS)
    with torch.no_grad():
        scorer.model.text_projection.weight.neg_()
    negated = scorer.score(PICTURES, PROMPTS)
    with torch.no_grad():
        scorer.model.text_projection.weight.neg_()
    for a, b in zip(original, negated, strict=True):
        assert min(a, b) == 0
        assert max(a, b) > 0


def test_a_score_does_not_depend_on_its_batch_or_the_mode_of_the_picture(scorer):
    together = scorer.score(PICTURES, PROMPTS)
    alone = [
        scorer.score([picture.convert("RGBA")], [prompt])[0] for picture, prompt in zip(PICTURES, PROMPTS, strict=True)
    ]
    assert together == pytest.approx(alone, abs=1e-3)


def test_long_and_empty_prompts_and_no_pictures_are_scored(scorer):
    assert len(scorer.score(PICTURES, ["word " * 5000, ""])) == 2
    assert scorer.score([], []) == []


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"quality\.clip: .*cannot be read as a CLIP checkpoint"):
        ClipScorer(str(tmp_path))
