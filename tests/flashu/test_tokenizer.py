"""The tokenizer: Show-o2's tokens on top of Qwen2.5's, prompts to rows, folders written and read, what is refused."""

import json

import pytest
from shapes.vocabulary import build_tokenizer
from tokenizers import Tokenizer

from flashu import CheckpointError
from flashu.models.checkpoint_files import EMBEDDED_FOLDER
from flashu.models.geometry import PRESETS
from flashu.models.tokenizer import ADDED_TOKENS, PromptTokenizer
from tests import fakes

PROMPTS = (
    "",
    " ",
    "a red circle",
    "Two blue squares, and a GREEN star!",
    "line one\nline two\r\n\ttabbed",
    "ein grüner Stern, 二つの青い四角, зелёная звезда",
    "👩‍🚀 on 🌕, e\u0301 = é",
    "what <|im_end|> and [PAD] and <image> do inside a prompt",
    "0123456789 " * 20,
)


@pytest.fixture(params=["qwen", "embedded"])
def tokenizer(request):
    if request.param == "embedded":
        return PromptTokenizer.from_pretrained("embedded")
    return PromptTokenizer(fakes.qwen_tokenizer())


def test_a_file_is_taken_as_its_folder_is():
    folder = EMBEDDED_FOLDER / "tokenizer"
    given = PromptTokenizer.from_pretrained(folder / "tokenizer.json")
    assert given.encode_prompt("a red circle", 60) == PromptTokenizer.from_pretrained(folder).encode_prompt(
        "a red circle", 60
    )
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        PromptTokenizer.from_pretrained(folder / "nowhere" / "tokenizer.json")


def text_ids(tokenizer, prompt):
    return tokenizer.encode_prompt(prompt, 10_000).prefix[1:-1]


def test_the_four_added_tokens_get_the_next_ids_in_order():
    base = fakes.qwen_tokenizer()
    size = base.get_vocab_size()
    extended = PromptTokenizer(base)
    assert [base.token_to_id(token) for token in ("[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>")] == [
        size,
        size + 1,
        size + 2,
        size + 3,
    ]
    assert len(extended) == size + 4
    assert extended.ids.pad == size


def test_framing_tokens_are_qwens():
    tokenizer = PromptTokenizer(fakes.qwen_tokenizer())
    names = {name: tokenizer.tokenizer.id_to_token(token_id) for name, token_id in vars(tokenizer.ids).items()}
    assert names == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "boi": "<|vision_start|>",
        "eoi": "<|vision_end|>",
        "image_placeholder": "<|image_pad|>",
        "pad": "[PAD]",
    }


def test_an_extended_tokenizer_is_not_extended_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = PromptTokenizer.from_pretrained(tmp_path)
    assert again.ids == tokenizer.ids
    assert again.tokenizer.to_str() == tokenizer.tokenizer.to_str()


def test_a_prompt_stands_between_bos_and_boi(tokenizer):
    encoded = tokenizer.encode_prompt("a red circle", 100)
    bos, *text, boi = encoded.prefix
    assert (bos, boi) == (tokenizer.ids.bos, tokenizer.ids.boi)
    assert tokenizer.tokenizer.decode(text) == "a red circle"
    assert not encoded.truncated


def test_an_empty_prompt_is_bos_and_boi_alone(tokenizer):
    encoded = tokenizer.encode_prompt("", 100)
    assert encoded.prefix == [tokenizer.ids.bos, tokenizer.ids.boi]
    assert not encoded.truncated


def test_a_prompt_that_just_fits_is_whole(tokenizer):
    text = text_ids(tokenizer, "three small green stars")
    encoded = tokenizer.encode_prompt("three small green stars", len(text))
    assert encoded.prefix[1:-1] == text
    assert not encoded.truncated


def test_a_prompt_one_token_too_long_loses_its_last_token(tokenizer):
    text = text_ids(tokenizer, "three small green stars")
    encoded = tokenizer.encode_prompt("three small green stars", len(text) - 1)
    assert encoded.prefix == [tokenizer.ids.bos, *text[:-1], tokenizer.ids.boi]
    assert encoded.truncated


def test_a_file_with_truncation_and_padding_switched_on_still_gives_whole_prompts(tmp_path):
    base = fakes.qwen_tokenizer()
    base.enable_truncation(4)
    base.enable_padding(length=8)
    base.save(str(tmp_path / "tokenizer.json"))
    tokenizer = PromptTokenizer.from_pretrained(tmp_path)
    assert text_ids(tokenizer, "a red circle") == text_ids(PromptTokenizer(fakes.qwen_tokenizer()), "a red circle")


@pytest.mark.parametrize("prompt", [prompt for prompt in PROMPTS if "[PAD]" not in prompt])
def test_any_text_comes_back_as_it_was_written(tokenizer, prompt):
    composed = prompt.replace("e\u0301", "é")  # Qwen2.5 normalises to NFC
    assert tokenizer.tokenizer.decode(text_ids(tokenizer, prompt)) == composed


def test_a_saved_folder_gives_the_same_ids_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(tokenizer)
    assert (theirs.pad_token, theirs.eos_token) == ("[PAD]", "<|im_end|>")
    for prompt in PROMPTS:
        assert theirs(prompt, add_special_tokens=False).input_ids == text_ids(tokenizer, prompt), prompt


@pytest.mark.parametrize("subfolder", ["", "tokenizer"])
def test_tokenizer_json_is_found_in_the_folder_or_in_its_tokenizer_subfolder(tmp_path, subfolder):
    (tmp_path / subfolder).mkdir(exist_ok=True)
    fakes.write_tokenizer(tmp_path / subfolder)
    assert PromptTokenizer.from_pretrained(tmp_path).ids.bos is not None


def test_a_folder_without_tokenizer_json_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no tokenizer\.json"):
        PromptTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not JSON", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff\xfe\x00", b"version https://git-lfs.github"],
)
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        PromptTokenizer.from_pretrained(tmp_path)


def test_a_truncated_tokenizer_json_is_named(tmp_path):
    fakes.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        PromptTokenizer.from_pretrained(tmp_path)


def test_another_models_tokenizer_is_refused_with_the_tokens_it_lacks(tmp_path):
    data = json.loads(fakes.qwen_tokenizer().to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if "vision" not in token["content"]]
    Tokenizer.from_str(json.dumps(data)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError) as raised:
        PromptTokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "lacks <|vision_start|>, <|vision_end|>" in str(raised.value)


def test_the_embedded_tokenizer_is_what_its_script_builds(tmp_path):
    build_tokenizer(PRESETS["embedded"].llm_vocab_size, seed=0).save_pretrained(tmp_path)
    for file in (EMBEDDED_FOLDER / "tokenizer").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_embedded_tokenizer_has_show_o2s_four_tokens_last():
    tokenizer = PromptTokenizer.from_pretrained("embedded")
    last = [tokenizer.tokenizer.id_to_token(len(tokenizer) - 4 + index) for index in range(4)]
    assert tuple(last) == ADDED_TOKENS
