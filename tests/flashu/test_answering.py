"""Answers about images: side by side and cached, they are those of whole rows run alone."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from flashu import (
    InputError,
    OutOfMemoryError,
    TextToImagePipeline,
    answering,
    conversation,
    pictures,
    question_rows,
)
from flashu.pictures import open_picture, picture_latents
from tests import fakes
from tests.bounds import EVALUATION, LEVEL
from tests.reference import relative_error

QUESTIONS = (
    ("Is there a red circle?", "What colour is the background?"),
    ("How many shapes are there?",),
    ("Describe the picture.", "What shape is blue?", "Is there a ring?"),
)
NEVER = -1  # no answer ends


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def latents(pipe):
    config = pipe.model.config
    shape = (config.image_latent_dim, 2 * config.image_latent_height, 2 * config.image_latent_width)
    return torch.randn(len(QUESTIONS), *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def encoded(pipe):
    return [[pipe.tokenizer.encode_question(text) for text in texts] for texts in QUESTIONS]


@pytest.fixture(scope="module")
def images(pipe, latents, encoded):
    return conversation.read_images(pipe.model, latents, encoded[0][0])


def recomputed(pipe, latents, question, count):
    """A greedy answer by whole rows, run anew for every token, and the logits of its first token."""
    tokens, first = [], None
    for _ in range(count):
        longer = type(question)(question.before, [*question.after, *tokens])
        with torch.no_grad():
            hidden = question_rows.prefill(pipe.model, question_rows.lay_out(pipe.model, latents, [longer]))
            logits = pipe.model.showo.lm_head(hidden[:, -1])
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
    return first, tokens


def test_answers_are_those_of_whole_rows_whatever_stands_beside(pipe, latents, encoded, images):
    answers = conversation.generate(pipe.model, images, encoded, 12, NEVER, conversation.greedy)
    logits = conversation.first_logits(pipe.model, images, encoded)
    for place, asked in enumerate(encoded):
        assert len(answers[place]) == len(logits[place]) == len(asked)
        for question, answer, own in zip(asked, answers[place], logits[place], strict=True):
            first, tokens = recomputed(pipe, latents[place : place + 1], question, 12)
            assert relative_error(own[None], first) < EVALUATION
            assert answer == tokens


def test_an_answer_ends_at_its_stop_token_and_the_others_go_on(pipe, encoded, images):
    whole = conversation.generate(pipe.model, images, encoded, 12, NEVER, conversation.greedy)
    stop = whole[2][0][3]
    cut = conversation.generate(pipe.model, images, encoded, 12, stop, conversation.greedy)
    for full, short in zip(chain(*whole), chain(*cut), strict=True):
        assert short == (full[: full.index(stop)] if stop in full else full)


def test_a_drawn_answer_depends_on_its_seed_alone(pipe, encoded, images):
    def drawn(seeds, asked):
        return conversation.generate(pipe.model, images, asked, 6, NEVER, conversation.Sampler(seeds, 1.5, None, 1.0))

    together = drawn([[7, 8], [9], [10, 11, 12]], encoded)
    assert together == drawn([[7, 8], [9], [10, 11, 12]], encoded)
    fewer = drawn([[7], [9], [10]], [asked[:1] for asked in encoded])
    assert [of_image[0] for of_image in fewer] == [of_image[0] for of_image in together]
    assert together != drawn([[1, 2], [3], [4, 5, 6]], encoded)


def test_draws_follow_the_probabilities_and_their_limits():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(1, 4000, 4)

    def shares(**limits):
        sampler = conversation.Sampler([range(4000)], **{"temperature": 1.0, "top_k": None, "top_p": 1.0} | limits)
        return torch.bincount(sampler(logits)[0], minlength=4) / 4000

    assert torch.allclose(shares(), probabilities, atol=0.03)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert torch.allclose(shares(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03)
    assert shares(temperature=0.01)[0] == 1
    assert shares(top_p=1e-6)[0] == 1


def test_of_tokens_that_tie_only_so_many_are_kept_as_was_said():
    logits = torch.tensor([2.0, 1.0, 2.0, 2.0]).bfloat16().expand(1, 200, 4)
    drawn = conversation.Sampler([range(200)], 1.0, 2, 1.0)(logits)
    assert set(drawn.flatten().tolist()) == {0, 2}


def test_answers_come_in_the_shape_of_the_questions(pipe):
    picture = Image.new("RGB", (64, 64), "white")
    assert isinstance(pipe.answer(picture, "Is there a ring?"), str)
    assert len(pipe.answer(picture, ["Is there a ring?", "Is there a star?"])) == 2
    answers = pipe.answer([picture, picture], ["Is there a ring?", ["What shape is red?"]], batch_size=1)
    assert isinstance(answers[0], str)
    assert isinstance(answers[1], list)
    probabilities = pipe.yes_probability([picture, picture], "Is there a ring?")
    assert probabilities == pytest.approx([probabilities[0]] * 2, abs=EVALUATION)


def test_the_probability_of_yes_is_that_of_its_token_against_no(pipe):
    picture = Image.effect_noise((64, 64), 90)
    question = pipe.tokenizer.encode_question("Is there a ring?")
    latents = picture_latents(pipe.vae, open_picture(picture), (4, 4))
    first, _ = recomputed(pipe, latents, question, 1)
    yes, no = (pipe.tokenizer.tokenizer.token_to_id(word) for word in ("yes", "no"))
    expected = float(first[0, [yes, no]].softmax(dim=0)[0])
    assert pipe.yes_probability(picture, "Is there a ring?") == pytest.approx(expected, abs=EVALUATION)


def test_more_questions_than_fit_a_row_and_images_in_batches_change_no_answer(pipe, monkeypatch):
    pictures = [Image.effect_noise((64, 64), 90) for _ in range(3)]
    asked = [list(texts) for texts in QUESTIONS]
    drawn = {"temperature": 1.0, "seeds": 3, "max_new_tokens": 6}
    together = pipe.answer(pictures, asked, **drawn), pipe.yes_probability(pictures, asked)
    monkeypatch.setattr(answering, "QUESTIONS_AT_ONCE", 2)
    apart = pipe.answer(pictures, asked, batch_size=1, **drawn), pipe.yes_probability(pictures, asked, batch_size=2)
    assert apart[0] == together[0]
    for one, other in zip(apart[1], together[1], strict=True):
        assert one == pytest.approx(other, abs=EVALUATION)


def test_greedy_answers_leave_the_global_generator_alone(pipe):
    torch.manual_seed(4)
    pipe.answer(Image.new("RGB", (64, 64)), "Is there a ring?", max_new_tokens=2)
    after = torch.rand(())
    torch.manual_seed(4)
    assert torch.rand(()) == after


def test_running_out_of_memory_is_told_with_what_to_do(pipe, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conversation, "read_images", full)
    with pytest.raises(OutOfMemoryError, match="with 2 images at once; try batch_size=1"):
        pipe.answer([Image.new("RGB", (8, 8))] * 2, "What?")


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "La", "CMYK", "YCbCr", "I;16", "I", "F")


@pytest.mark.parametrize("mode", MODES)
def test_images_of_any_mode_are_read(mode):
    """Half grey, half white; those of one bit black and white."""
    values = np.full((8, 8), 255, dtype=np.uint8)
    values[:, :4] = 0 if mode == "1" else 128
    sixteen_bit = Image.fromarray(values.astype(np.uint16) * 257)
    if mode in ("I;16", "I"):
        picture = sixteen_bit if mode == "I;16" else sixteen_bit.convert("I")
    else:
        picture = Image.fromarray(values).convert("LA" if mode == "La" else mode)
    picture = picture.convert("La") if mode == "La" else picture
    assert picture.mode == mode
    seen = np.asarray(open_picture(picture)).astype(int)
    assert abs(seen - values[:, :, None]).max() <= LEVEL


def test_a_dark_picture_of_16_bits_stays_dark():
    assert open_picture(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16))).getpixel((0, 0)) == (1, 1, 1)


def test_transparent_parts_are_white_and_cameras_that_were_turned_are_upright():
    assert open_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    picture = Image.new("RGB", (4, 2))
    picture.getexif()[0x0112] = 6
    assert open_picture(picture).size == (2, 4)


def torchvision_crops(width, height, side):
    """What torchvision's Resize(side) and CenterCrop(side) do to a PIL image: left and top of the cut, resized to."""
    short, long = sorted((width, height))
    longer = int(side * long / short)
    resized = (side, longer) if width <= height else (longer, side)
    left, top = (round((length - side) / 2.0) for length in resized)
    return (left, top, *resized)


def test_pictures_of_every_size_are_resized_and_cropped_as_the_release_does():
    for side in (64, 432):
        for width in range(20, 2001):
            for height in (*range(20 + width % 37, 2001, 53), width, 427, 640):
                told = pictures.covering((width, height), (side, side))
                assert told == torchvision_crops(width, height, side), (width, height, side)


@pytest.mark.parametrize("size", [(640, 427), (401, 300), (20, 2000), (1999, 20), (433, 432), (64, 64), (37, 1001)])
def test_a_cropped_picture_is_the_releases_pixel_for_pixel(size):
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture, side = Image.fromarray(noise), 432
    left, top, *resized = torchvision_crops(*size, side)
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    assert pictures.cover(picture, side, side).tobytes() == expected.tobytes()


@pytest.mark.parametrize("target", [(96, 64), (64, 96), (64, 64)])
@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (97, 65), (300, 200), (1, 50_000), (50_000, 1)])
def test_a_picture_of_any_shape_covers_all_of_what_is_asked_for(size, target):
    assert set(pictures.cover(Image.new("L", size, 200), *target).tobytes()) == {200}


def test_answers_of_a_head_trained_apart_are_those_of_whole_rows_and_that_head(tmp_path):
    untied = replace(fakes.CONFIG, llm=replace(fakes.LLM, tie_word_embeddings=False))
    tensors = fakes.weights(untied)
    fakes.write_release_folder(tmp_path, fakes.CONFIG, tensors=tensors)
    with pytest.warns(UserWarning, match="output head that differs"):
        pipe = TextToImagePipeline.from_pretrained(tmp_path, vae=fakes.GOLDEN_VAE, tokenizer=tmp_path / "llm")
    picture = Image.linear_gradient("L").resize((64, 64))
    latents = picture_latents(pipe.vae, open_picture(picture), (4, 4))
    head, stop = tensors["showo.lm_head.weight"], pipe.tokenizer.ids.eos
    for text in ("What is red?", "a"):
        question, tokens = pipe.tokenizer.encode_question(text), []
        while len(tokens) < 12 and stop not in tokens:
            longer = replace(question, after=[*question.after, *tokens])
            with torch.no_grad():
                hidden = question_rows.prefill(pipe.model, question_rows.lay_out(pipe.model, latents, [longer]))
            tokens.append(int((hidden[0, -1] @ head.T).argmax()))
        assert pipe.answer(picture, text, max_new_tokens=12) == pipe.tokenizer.decode(tokens)


def test_letterbox_shows_the_sides_that_a_crop_cuts_off(pipe):
    wide = Image.new("RGB", (192, 64), "white")
    wide.paste("red", (0, 0, 40, 64))
    plain = picture_latents(pipe.vae, Image.new("RGB", (64, 64), "white"), (4, 4))
    assert torch.equal(picture_latents(pipe.vae, wide, (4, 4)), plain)
    assert not torch.equal(picture_latents(pipe.vae, wide, (4, 4), "letterbox"), plain)
    assert picture_latents(pipe.vae, Image.new("RGB", (10_000, 1)), (4, 4), "letterbox").isfinite().all()


@pytest.mark.parametrize(
    ("images", "questions", "options", "said"),
    [
        ("nowhere.png", "What?", {}, "nowhere.png: there is no such file"),
        (__file__, "What?", {}, "cannot be read as an image"),
        ([3], "What?", {}, "images holds 3"),
        ([Image.new("RGB", (8, 8))] * 2, ["What?"], {}, "1 questions for 2 images"),
        (Image.new("RGB", (8, 8)), " ", {}, "a question is empty"),
        ([Image.new("RGB", (8, 8))], [[]], {}, "a question is empty"),
        (Image.new("RGB", (8, 8)), "What?", {"fit": "squash"}, "fit is 'squash'; there are: crop, letterbox"),
        (Image.new("RGB", (8, 8)), "What?", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (Image.new("RGB", (8, 8)), "What?", {"top_p": 1.5}, "top_p is 1.5"),
        (Image.new("RGB", (8, 8)), "What?", {"temperature": -1}, "temperature is -1"),
        (Image.new("RGB", (8, 8)), ["What?", "Who?"], {"seeds": [1], "temperature": 1}, "1 seeds for 2 questions"),
        (Image.new("RGB", (8, 8)), "what " * 100, {}, "tokens, with what frames it, is longer than the 60 that fit"),
        (Image.new("LAB", (8, 8)), "What?", {}, "LAB pixels; convert them to RGB first"),
        (Image.new("RGB", (0, 8)), "What?", {}, "an image is 0x8 pixels"),
    ],
)
def test_bad_input_is_named(pipe, images, questions, options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        pipe.answer(images, questions, **options)
