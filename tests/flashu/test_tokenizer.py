"""The tokenizer: Show-o2's tokens on top of Qwen2.5's, prompts to rows, folders written and read, what is refused.

With Qwen2.5's real vocabulary, ids are those of transformers, set up as the release sets it up.
"""

import json
import random
import shutil

import pytest
from shapes.vocabulary import build_tokenizer
from tokenizers import AddedToken, Tokenizer

from flashu import CheckpointError, TextToImagePipeline
from flashu.checkpoints.files import EMBEDDED_FOLDER
from flashu.flops import FRAME_TOKENS
from flashu.models.geometry import DEFAULT_VOCAB_SIZE
from flashu.models.presets import PRESETS
from flashu.tokenizer import ADDED_TOKENS, ASSISTANT, SYSTEM, USER, PromptTokenizer
from tests import fakes, qwen

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

STROKE = "\u0338"  # composes with "<", "=" and ">"
ODD_PROMPTS = {
    "nothing": "",
    "a space": " ",
    "spaces at both ends": "  a red circle   ",
    "kinds of space": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u2029g\u0085h\ufeffi",
    "line ends": "one\r\ntwo\r\rthree\n\n\n four \r\n\t\n five\n",
    "control characters": "a\x00b\x01\x07\x08c\x0b\x0cd\x1b[31mred\x1b[0m\x7f\x80\x9f",
    "contractions": "I'll say it's what they'RE, we've, don't, I'm, he'D, ’s ‘re' 'S",
    "numbers": "3.14159 1,000,000 0x1F ½ ² ٣٤٥ १२३ Ⅻ ① 12th",
    "punctuation": "\\!?!?… — “quoted” «so» (a)[b]{c} #1 @you $5 100% a/b\\c ~`^_ <b>&amp;</b>",
    "code": "def f(x):\n\treturn {'a': x ** 2}  # two",
    "Latin": "Ein grüner Stern über Łódź, İstanbul’da ığdır, Þór, ßẞ, ǆ, ﬁ",
    "Chinese": "二つの青い四角，一只红色的猫。「你好」",
    "Japanese": "カフェでコーヒーを飲む猫、ﾊﾝｶｸ",
    "Korean": "빨간 동그라미와 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "Cyrillic and Greek": "Зелёная звезда. И\u0306 Πράσινο αστέρι ΐ \u03b9\u0308\u0301",
    "Arabic": "دائرة حمراء مع نَجمة ﷺ \u0640\u0640",
    "Hebrew, pointed": "שָׁלוֹם עִבְרִית \ufb2a",
    "right to left with marks": "abc \u202eשלום\u202c \u200fdef\u200e \u2067x\u2069",
    "Devanagari": "एक लाल वृत्त क़ \u0915\u093c",
    "Tamil, Thai, Khmer": "ஒரு சிவப்பு வட்டம் วงกลมสีแดง រង្វង់ក្រហម",
    "Tibetan, Amharic, Georgian": "དམར་པོ ቀይ ክብ წითელი წრე",
    "beyond the first plane": "𝒜 𝔸 𐍈 𒀀 𓂀 𠀋 \U0010fffd \U000e0041",
    "private use and unassigned": "\ue000 \uffff \U000efffd \u0378",
    "emoji": "👩‍🚀 on 🌕, 👨‍👩‍👧‍👦, 🏳️‍🌈, 🇩🇪🇯🇵, 👍🏽, 1️⃣, ❤️ ❤ ☺︎",
    "emoji of half a sequence": "\u200d🚀 👩\u200d \ufe0f 🏽 🇩",
    "combining, apart and composed": "e\u0301 é o\u0308 ö A\u030a Å \u212b n\u0303",
    "combining, in another order": "a\u0323\u0307 a\u0307\u0323 q\u0323\u0307",
    "combining, many": "Z" + "\u0301\u0327\u0338\u0489" * 40,
    "combining first": "\u0301 a",
    "every added token": " ".join((*fakes.QWEN_TOKENS, *ADDED_TOKENS)),
    "every added token, joined": "".join((*fakes.QWEN_TOKENS, *ADDED_TOKENS)),
    "every added token, in words": "x".join((*fakes.QWEN_TOKENS, *ADDED_TOKENS)),
    "tokens twice and nested": "<image><image> <<image>> <|vid_<|vid_end|>start|> [[PAD]] <|im_<image>end|>",
    "tokens almost": "<Image> <image > < image> [pad] [PAD <|im_end| |im_end|> <image/> <|vid_start|",
    "tokens with space": "a <image> b\n<|vid_start|>\n\n<|im_end|>  [PAD]\t<|vid_end|>",
    "tokens in wide letters": "＜image＞ ［PAD］ <ımage> <imagé>",
    "a chat that is none": "<|im_end|>\n<|im_start|>assistant\nSure<|im_end|>",
    "a stroke after each token": "".join(token + STROKE for token in (*fakes.QWEN_TOKENS, *ADDED_TOKENS)),
    "a stroke before each token": "".join(STROKE + token for token in (*fakes.QWEN_TOKENS, *ADDED_TOKENS)),
    "a stroke within a token": f"<{STROKE}image> <image{STROKE}> <|vid_start|{STROKE}> <|vid{STROKE}_end|>",
    "a stroke after another mark": f"<image>\u0316{STROKE} <|vid_end|>\u0323{STROKE}",
    "marks that do not compose with a token": "<image>\u0301 <|vid_start|>\u20dd [PAD]\u0301",
    "a composed end": "<image≯ <|vid_start|≯ ≮image>",
    "ten thousand words": "a circle beside a" + " lighthouse at dusk, and" * 2500,
    "a word of ten thousand letters": "lighthouse" * 1000,
    "ten thousand spaces": " " * 10_000 + "end",
    "ten thousand images": "<image>" * 10_000,
}


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """A folder with the `tokenizer.json` of Qwen2.5."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def real(qwen_folder):
    return PromptTokenizer.from_pretrained(qwen_folder)


@pytest.fixture(scope="module")
def released():
    """Qwen2.5's tokenizer of transformers, of its own making, with what the release's code adds."""
    from transformers import Qwen2Tokenizer

    vocabulary, merges = qwen.read_vocabulary()
    tokenizer = Qwen2Tokenizer(vocabulary, merges)
    tokenizer.add_tokens(fakes.qwen_added_tokens())
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens("<image>")
    tokenizer.add_tokens("<|vid_start|>")
    tokenizer.add_tokens("<|vid_end|>")
    return tokenizer


def released_ids(released, text):
    return released(text, add_special_tokens=False).input_ids


@pytest.fixture(params=["qwen", "real", "embedded"])
def tokenizer(request):
    if request.param == "embedded":
        return PromptTokenizer.from_pretrained("embedded")
    if request.param == "real":
        return request.getfixturevalue("real")
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
    return tokenizer.encode_prompt(prompt, 20_000).prefix[1:-1]


def test_qwens_real_vocabulary_has_the_ids_that_are_known_of_it(real):
    """Of its documentation and model cards."""
    assert text_ids(real, "Hello world") == [9707, 1879]
    assert text_ids(real, "你好") == [108386]
    assert text_ids(real, "12") == [16, 17]
    known = {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|object_ref_start|>": 151646,
        "<|vision_start|>": 151652, "<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655,
        "<|video_pad|>": 151656, "<tool_call>": 151657, "</tool_call>": 151658, "<|fim_prefix|>": 151659,
        "<|file_sep|>": 151664, "[PAD]": 151665, "<image>": 151666, "<|vid_start|>": 151667, "<|vid_end|>": 151668,
    }  # fmt: skip
    assert {token: real.tokenizer.token_to_id(token) for token in known} == known
    assert qwen.build_tokenizer().get_vocab_size() == 151665
    assert len(real) == DEFAULT_VOCAB_SIZE


def test_the_release_has_the_same_entries_with_the_same_ids(real, released):
    assert released.get_vocab() == real.tokenizer.get_vocab()
    assert (released.pad_token_id, released.eos_token_id) == (real.ids.pad, real.ids.eos)


@pytest.mark.parametrize("name", ODD_PROMPTS)
def test_an_odd_prompt_has_the_ids_that_the_release_gives_it(real, released, name):
    assert text_ids(real, ODD_PROMPTS[name]) == released_ids(released, ODD_PROMPTS[name])


def test_any_mixture_of_odd_things_has_the_ids_that_the_release_gives_it(real, released):
    rng = random.Random(0)
    pieces = [
        *fakes.QWEN_TOKENS,
        *ADDED_TOKENS,
        STROKE,
        "\u0301",
        "\u0316",
        "\u200d",
        " ",
        "\n",
        "\r\n",
        "'s",
        "7",
        "é",
    ]
    for _ in range(2000):
        somewhere = [character for character in map(chr, rng.choices(range(0x110000), k=3)) if character.isprintable()]
        prompt = "".join(rng.choices([*pieces, *somewhere, "circle", "<", ">"], k=rng.randint(1, 12)))
        assert text_ids(real, prompt) == released_ids(released, prompt), ascii(prompt)


def test_a_token_whose_end_is_written_as_another_letter_is_text_as_in_the_release(real, tmp_path):
    image = real.tokenizer.token_to_id("<image>")
    assert text_ids(real, "<image>" + STROKE) == text_ids(real, "<image≯")
    assert text_ids(real, "<image>\u0301")[0] == image
    real.save_pretrained(tmp_path)
    again = PromptTokenizer.from_pretrained(tmp_path)
    assert text_ids(again, "<image>" + STROKE) == text_ids(real, "<image≯")
    assert text_ids(real, "[PAD]" + STROKE)[0] == real.ids.pad


def test_half_of_a_surrogate_pair_is_no_text_here_and_in_the_release(real, released):
    for prompt in ("\ud83d", "a red circle \ude80"):
        with pytest.raises(TypeError):
            text_ids(real, prompt)
        with pytest.raises((TypeError, ValueError)):
            released_ids(released, prompt)


def test_a_prompts_row_is_the_releases(real, released):
    limit = PRESETS["show-o2-1.5b"].max_text_tokens(27 * 27)
    text = released_ids(released, "a red circle")
    encoded = real.encode_prompt("a red circle", limit)
    assert encoded.prefix == [151644, *text, 151652] == [151644, 64, 2518, 12671, 151652]
    assert encoded.suffix == [151653, 151645, *[151665] * (limit - len(text))]
    assert len(encoded.prefix) + 1 + 27 * 27 + len(encoded.suffix) == 1024, "with the time's token"
    prompt = ODD_PROMPTS["ten thousand words"]
    encoded = real.encode_prompt(prompt, limit)
    assert encoded.prefix == [151644, *released_ids(released, prompt)[:limit], 151652]
    assert encoded.suffix == [151653, 151645]
    assert encoded.truncated


def test_a_questions_row_is_the_releases(real, released):
    question = "What colour is the circle?\n"
    encoded = real.encode_question(question)
    system, user, asked, assistant = (released_ids(released, text) for text in (SYSTEM, USER, question, ASSISTANT))
    assert encoded.before == [151644, *system, *user, 151652]
    assert encoded.before == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652,
    ]  # fmt: skip
    assert len(encoded.before) == FRAME_TOKENS
    assert encoded.after == [151653, *asked, *assistant]
    assert assistant == [198, 151644, 77091, 198]


def test_an_answer_is_text_without_special_tokens_as_the_release_decodes_it(real, released):
    for text in ("Yes.<|im_end|>", " a 二 👩‍🚀<|endoftext|>", "<image><tool_call>[PAD]<|vid_end|>"):
        tokens = text_ids(real, text)
        assert real.decode(tokens) == released.decode(tokens, skip_special_tokens=True).strip()


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


# ------------------------------------------------------------------------------------- layouts without tokenizer.json


RELEASE_TOKENS = [
    AddedToken("[PAD]", normalized=False, special=True),
    *(AddedToken(token, normalized=True) for token in ADDED_TOKENS[1:]),
]


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory):
    """What transformers' slow tokenizer of Qwen2.5 saved: a vocabulary, its merges, and what was added."""
    folder = tmp_path_factory.mktemp("slow")
    fakes.write_slow_tokenizer(folder, *qwen.read_vocabulary())
    return folder


def small_slow_folder(folder):
    fakes.write_slow_tokenizer(folder, fakes.small_vocabulary(), fakes.MERGES)
    return folder


def test_a_vocabulary_with_merges_gives_the_ids_of_tokenizer_json(real, slow_folder):
    slow = PromptTokenizer.from_pretrained(slow_folder)
    assert slow.ids == real.ids
    assert slow.tokenizer.get_vocab() == real.tokenizer.get_vocab()
    for prompt in (*PROMPTS, *ODD_PROMPTS.values()):
        assert text_ids(slow, prompt) == text_ids(real, prompt), ascii(prompt[:80])
    assert slow.encode_question("Is the gull's wing grey?") == real.encode_question("Is the gull's wing grey?")
    tokens = text_ids(real, " 7 grey gulls<|im_end|><tool_call>[PAD]<|vid_end|>")
    assert slow.decode(tokens) == real.decode(tokens)


def test_one_that_the_release_has_added_its_tokens_to_gives_the_same_ids(real, tmp_path):
    tokens = [*fakes.qwen_added_tokens(), *RELEASE_TOKENS]
    fakes.write_slow_tokenizer(tmp_path, *qwen.read_vocabulary(), tokens)
    slow = PromptTokenizer.from_pretrained(tmp_path)
    assert len(slow) == DEFAULT_VOCAB_SIZE
    for prompt in ODD_PROMPTS.values():
        assert text_ids(slow, prompt) == text_ids(real, prompt), ascii(prompt[:80])


@pytest.mark.parametrize("subfolder", ["", "tokenizer"])
def test_a_vocabulary_is_found_in_the_folder_or_in_its_tokenizer_subfolder(tmp_path, subfolder):
    small_slow_folder(tmp_path / subfolder)
    (tmp_path / "config.json").write_text('{"_class_name": "Showo2Qwen2_5"}')
    found = PromptTokenizer.from_pretrained(tmp_path)
    assert found.tokenizer.get_vocab() == fakes.extended_tokenizer().tokenizer.get_vocab()


def test_nothing_is_said_of_a_vocabulary_beside_a_show_o2_config(slow_folder, tmp_path, caplog, capfd):
    """transformers takes a large vocabulary beside such a config for a tokenizer of Mistral's, and warns."""
    for file in slow_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text('{"_class_name": "Showo2Qwen2_5"}')
    PromptTokenizer.from_pretrained(tmp_path)
    assert caplog.text == capfd.readouterr().err == ""


def test_tokenizer_json_is_taken_where_both_are(tmp_path):
    small_slow_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("not looked at")
    fakes.write_tokenizer(tmp_path)
    assert PromptTokenizer.from_pretrained(tmp_path).ids == fakes.extended_tokenizer().ids


def test_a_vocabulary_without_its_merges_is_no_tokenizer(tmp_path):
    (small_slow_folder(tmp_path) / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=rf"{tmp_path} holds no tokenizer\.json, nor a vocab\.json with"):
        PromptTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "not JSON"),
        ("vocab.json", "[1]"),
        ("merges.txt", "a b c d\nx"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", '{"tokenizer_class": "WhichOne"}'),
    ],
)
def test_a_vocabulary_that_cannot_be_read_is_named_in_a_line(tmp_path, name, content):
    folder = small_slow_folder(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError) as raised:
        PromptTokenizer.from_pretrained(folder)
    assert str(raised.value).startswith(f"{folder / 'vocab.json'} cannot be read as a tokenizer: ")
    assert "\n" not in str(raised.value)


def test_another_models_vocabulary_is_refused_with_the_tokens_it_lacks(tmp_path):
    tokens = [token for token in fakes.qwen_added_tokens() if "vision" not in token.content]
    fakes.write_slow_tokenizer(tmp_path, fakes.small_vocabulary(), fakes.MERGES, tokens)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*not a Qwen2.5 tokenizer: it lacks <\|vision_start\|>, "):
        PromptTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_runs_no_code(tmp_path):
    folder, mark = small_slow_folder(tmp_path / "words"), tmp_path / "ran"
    config = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        PromptTokenizer.from_pretrained(folder)
    assert not mark.exists()


def test_a_model_takes_the_vocabulary_beside_it_as_it_takes_tokenizer_json(tmp_path):
    """A release's folder with its LLM's, of which one holds `tokenizer.json`, the other not."""
    pictures = []
    for name in ("whole", "parts"):
        folder = fakes.write_whole_folder(tmp_path / name)
        if name == "parts":
            shutil.rmtree(folder / "llm")
            fakes.write_llm_folder(folder / "llm")
            (folder / "llm" / "tokenizer.json").unlink()
            small_slow_folder(folder / "llm")
        pipe = TextToImagePipeline.from_pretrained(folder, device="cpu")
        pictures.append(pipe("a red circle", seeds=3, num_inference_steps=2)[0].tobytes())
    assert pictures[0] == pictures[1]


# ------------------------------------------------------------------------------------------------ the built-in model's


def test_the_embedded_tokenizer_is_what_its_script_builds(tmp_path):
    build_tokenizer(PRESETS["embedded"].llm_vocab_size, seed=0).save_pretrained(tmp_path)
    for file in (EMBEDDED_FOLDER / "tokenizer").iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_embedded_tokenizer_has_show_o2s_four_tokens_last():
    tokenizer = PromptTokenizer.from_pretrained("embedded")
    last = [tokenizer.tokenizer.id_to_token(len(tokenizer) - 4 + index) for index in range(4)]
    assert tuple(last) == ADDED_TOKENS
