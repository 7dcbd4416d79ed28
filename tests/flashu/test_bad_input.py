"""Input that the pipeline cannot use, or cannot use whole: what it says, and that it says so before any work."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from random_weights import random_model

from flashu import InputError, OutOfMemoryError, Showo2Qwen2_5, TextToImagePipeline
from flashu.models import WanImageVAE
from flashu.tokenizer import PromptTokenizer
from tests import fakes

SIDE = 64  # pixels: 16 image tokens, so that a picture takes milliseconds


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained(device="cpu")


@pytest.fixture
def generate(pipe):
    def generate(prompts, **options):
        return pipe(prompts, **{"num_inference_steps": 2, "size": SIDE, "seeds": 0, **options})

    return generate


@pytest.fixture
def fail(pipe):
    """Make the model's time embedding, which runs once in every batch, raise an error from some batch on."""
    hooks = []

    def fail(error, first_batch=1):
        batches = itertools.count(1)

        def raise_error(*_):
            if next(batches) >= first_batch:
                raise error

        hooks.append(pipe.model.time_embed.register_forward_hook(raise_error))
        return hooks[-1]

    yield fail
    for hook in hooks:
        hook.remove()


# --------------------------------------------------------------------------------------------- prompts too long


@pytest.fixture(scope="module")
def long_prompt(pipe):
    """A prompt of ten tokens too many, and the part of it that fits."""
    limit = pipe.model.config.max_text_tokens((SIDE // 16) ** 2)
    whole, part = "a" + " red" * (limit + 9), "a" + " red" * (limit - 1)
    assert not pipe.tokenizer.encode_prompt(part, limit).truncated
    assert len(pipe.tokenizer.encode_prompt(whole, 10_000).prefix) == 2 + limit + 10
    return whole, part


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_a_prompt_too_long_gives_the_picture_of_the_part_that_fits(generate, long_prompt):
    whole, part = long_prompt
    cut, uncut = generate([whole, part], seeds=[3, 3])
    assert cut.tobytes() == uncut.tobytes()
    assert (cut.info["truncated"], uncut.info["truncated"]) == (True, False)
    assert cut.info["prompt"] == whole


def test_a_prompt_too_long_is_warned_of_with_its_place_and_the_limit(generate, long_prompt):
    with pytest.warns(UserWarning, match=r"1 of 3 prompts are longer than the 60 tokens .*the first is number 1,"):
        generate(["a red circle", long_prompt[0], "a blue star"])


@pytest.mark.filterwarnings("ignore:.*were cut")
def test_a_negative_prompt_too_long_marks_its_picture_too(generate, long_prompt):
    pictures = generate(["a", "b"], negative_prompts=["", long_prompt[0]])
    assert [picture.info["truncated"] for picture in pictures] == [False, True]


def test_prompts_that_fit_give_no_warning(generate, long_prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(["", "a red circle", long_prompt[1]])


# ------------------------------------------------------------------------------------------------- unusual prompts


def test_no_prompts_give_no_pictures(generate):
    assert generate([]) == []


def test_one_prompt_may_stand_alone(generate):
    (alone,), (listed,) = generate("a red circle"), generate(["a red circle"])
    assert alone.tobytes() == listed.tobytes()


def test_prompts_may_come_from_a_generator(generate):
    pictures = generate(text for text in ("a", "b"))
    assert [picture.info["prompt"] for picture in pictures] == ["a", "b"]


@pytest.mark.parametrize(
    "prompt", ["", " ", "\n", "\0", "🟥" * 50, "<|im_end|><|vision_start|>", "[PAD]", "\u202etfel ot thgir", "e\u0301"]
)
def test_any_text_makes_a_picture(generate, prompt):
    (picture,) = generate(prompt)
    assert picture.size == (SIDE, SIDE)
    assert picture.info["prompt"] == prompt


def test_text_that_is_no_unicode_is_refused(generate):
    with pytest.raises(InputError, match="prompts"):
        generate("half of a surrogate pair: \ud83d")


@pytest.mark.parametrize("prompts", [5, None, [5], ["a", None], [None], b"bytes", [b"bytes"], [["a"]], [True]])
def test_prompts_that_are_no_text_are_refused(generate, prompts):
    with pytest.raises(InputError, match="prompts"):
        generate(prompts, seeds=None)


@pytest.mark.parametrize("negative_prompts", [5, [5, "b"], ["a", None], [None, None], ["one"], ["a", "b", "c"]])
def test_negative_prompts_must_be_text_one_for_all_or_one_each(generate, negative_prompts):
    with pytest.raises(InputError, match="negative_prompts"):
        generate(["a", "b"], negative_prompts=negative_prompts)


def test_the_number_of_negative_prompts_and_of_prompts_is_told(generate):
    with pytest.raises(InputError, match="3 negative_prompts for 2 prompts; give one for each"):
        generate(["a", "b"], negative_prompts=["c", "d", "e"])


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("seeds", [3.5, "7", [1.0, 2.0], ["1", "2"], [1, None], [True, False], [[1], [2]]])
def test_seeds_that_are_no_whole_numbers_are_refused(generate, seeds):
    with pytest.raises(InputError, match="seed"):
        generate(["a", "b"], seeds=seeds)


@pytest.mark.parametrize("seeds", [-1, 2**64, 2**64 - 1, [0, -1]])
def test_seeds_out_of_range_are_refused_with_the_range(generate, seeds):
    with pytest.raises(InputError, match=r"from 0 to 2\*\*64 - 1"):
        generate(["a", "b"], seeds=seeds)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], []])
def test_too_few_or_too_many_seeds_are_refused_with_both_numbers(generate, seeds):
    with pytest.raises(InputError, match=f"{len(seeds)} seeds for 2 prompts; give one for each"):
        generate(["a", "b"], seeds=seeds)


@pytest.mark.parametrize("seeds", [np.int64(5), np.arange(5, 7), [np.uint32(5), 6], range(5, 7), (5, 6)])
def test_whole_numbers_of_any_kind_are_seeds(generate, seeds):
    pictures = generate(["a", "a"], seeds=seeds)
    assert [picture.tobytes() for picture in pictures] == [p.tobytes() for p in generate(["a", "a"], seeds=5)]
    assert [picture.info["seed"] for picture in pictures] == [5, 6]


def test_without_seeds_pictures_follow_torchs_own_generator(generate):
    def two():
        torch.manual_seed(11)
        return generate(["a", "a"], seeds=None)

    first, second = two(), two()
    assert [p.info["seed"] for p in first] == [p.info["seed"] for p in second]
    assert first[0].info["seed"] != first[1].info["seed"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_inference_steps", 1),
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("guidance_scale", -1),
        ("guidance_scale", float("nan")),
        ("guidance_scale", float("inf")),
        ("guidance_scale", 10**400),
        ("guidance_scale", "7.5"),
        ("time_shift", 0),
        ("time_shift", -3.0),
        ("time_shift", float("nan")),
        ("time_shift", "3"),
        ("batch_size", 0),
        ("batch_size", -8),
        ("batch_size", 2.5),
        ("size", 100),
        ("size", 0),
        ("size", -64),
        ("size", (64, 100)),
        ("size", "64"),
        ("size", 64.0),
        ("size", True),
        ("size", (64,)),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_before_any_work(pipe, setting, value):
    options = {"num_inference_steps": 2, "size": SIDE, setting: value}
    with pytest.raises(InputError, match=setting):
        pipe.stream("a red circle", **options)  # nothing is drawn from it: the call alone must tell


def test_a_size_between_two_that_fit_is_told_both(generate):
    with pytest.raises(InputError, match=r"100x100: .* multiple of 16 pixels; next to 100 are 96 and 112"):
        generate("a red circle", size=100)


def test_an_option_that_does_not_exist_is_a_type_error_like_any_functions(generate):
    with pytest.raises(TypeError, match="guidance"):
        generate("a red circle", guidance=7.5)


# --------------------------------------------------------------------------------------------------------- memory


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


@pytest.mark.parametrize(("prompts", "batch_size", "suggested"), [(8, 8, 4), (7, 7, 3), (3, 100, 1), (2, 2, 1)])
def test_out_of_memory_suggests_half_of_the_batch(generate, fail, prompts, batch_size, suggested):
    fail(NO_MEMORY)
    with pytest.raises(OutOfMemoryError) as raised:
        generate(["a red circle"] * prompts, batch_size=batch_size)
    assert f"with {prompts} images of 64x64 at once" in str(raised.value)
    assert f"try batch_size={suggested} (--batch-size {suggested})" in str(raised.value)


def test_out_of_memory_with_a_single_picture_suggests_something_else(generate, fail):
    fail(NO_MEMORY)
    with pytest.raises(OutOfMemoryError, match="try a smaller size, dtype bfloat16, or a device with more memory") as e:
        generate("a red circle")
    assert "batch_size" not in str(e.value)


@pytest.mark.parametrize("size", [160_000_000, 16_000_000_000])  # beyond a 47-bit address space
def test_a_picture_too_large_for_any_memory_is_told_as_out_of_memory(generate, size):
    with pytest.raises(OutOfMemoryError, match=f"images of {size}x{size}"):
        generate("a red circle", size=size)


def test_pictures_made_before_memory_ran_out_are_kept(pipe, fail):
    fail(NO_MEMORY, first_batch=2)
    made = []
    with pytest.raises(OutOfMemoryError):
        made.extend(pipe.stream(["a"] * 4, batch_size=2, num_inference_steps=2, size=SIDE))
    assert len(made) == 2


def test_a_pipeline_works_on_after_running_out_of_memory(generate, fail):
    (expected,) = generate("a red circle")
    hook = fail(NO_MEMORY)
    with pytest.raises(OutOfMemoryError):
        generate("a red circle")
    hook.remove()
    assert generate("a red circle")[0].tobytes() == expected.tobytes()


def test_another_runtime_error_is_not_called_out_of_memory(generate, fail):
    fail(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        generate("a red circle")


# ------------------------------------------------------------------------------------- parts that do not belong


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused():
    model = random_model(Showo2Qwen2_5, fakes.CONFIG, seed=0)
    tokenizer = PromptTokenizer.from_pretrained("embedded")
    told = f"tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {fakes.VOCAB_SIZE}"
    with pytest.raises(InputError, match=told):
        TextToImagePipeline.from_model(model, vae="embedded", tokenizer=tokenizer)


def test_a_model_that_names_no_tokenizer_is_told_how_to_get_one():
    model = random_model(Showo2Qwen2_5, fakes.CONFIG, seed=0)
    with pytest.raises(InputError, match="names no tokenizer; give one with tokenizer="):
        TextToImagePipeline.from_model(model, vae="embedded")


def test_show_o2s_folder_given_as_vae_is_refused(tmp_path):
    fakes.write_release_folder(tmp_path)
    with pytest.raises(InputError, match=r"WanImageVAE|not a Wan 2\.1 VAE"):
        TextToImagePipeline.from_pretrained(vae=tmp_path, device="cpu")


def test_a_vae_given_as_model_is_refused(tmp_path):
    WanImageVAE.from_pretrained("embedded").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="describes a 'WanImageVAE', not a Show-o2"):
        TextToImagePipeline.from_pretrained(tmp_path, device="cpu")
