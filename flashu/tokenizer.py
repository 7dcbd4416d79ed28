"""From a prompt to token ids, and where they stand in a row: Qwen2.5's tokenizer with Show-o2's added tokens.

Works on a `tokenizer.json` alone (the Rust tokenizer that transformers wraps), so that nothing else is imported. Files
of another layout are read by transformers, which makes the same Rust tokenizer of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from flashu.checkpoints.files import TOKENIZER, TOKENIZER_FILES, find_tokenizer, tokenizer_beside
from flashu.checkpoints.hub import resolve_folder
from flashu.errors import CheckpointError
from flashu.models.geometry import Showo2Config

ADDED_TOKENS = ("[PAD]", "<image>", "<|vid_start|>", "<|vid_end|>")  # the order fixes their ids

BOS, EOS = "<|im_start|>", "<|im_end|>"
BOI, EOI = "<|vision_start|>", "<|vision_end|>"
IMAGE_PLACEHOLDER, PAD = "<|image_pad|>", "[PAD]"


@dataclass(frozen=True)
class TokenIds:
    """The ids that frame text and image in a row."""

    bos: int
    eos: int
    boi: int
    eoi: int
    image_placeholder: int
    pad: int


SYSTEM = "system\nYou are a helpful assistant.<|im_end|>"
USER, ASSISTANT = "\n<|im_start|>user\n", "\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class EncodedQuestion:
    """A row around an image that is asked about."""

    before: list[int]  # bos, system, user, boi
    after: list[int]  # eoi, question, assistant


@dataclass(frozen=True)
class EncodedPrompt:
    """A row around an image that is to be made."""

    prefix: list[int]  # bos, text, boi
    suffix: list[int]  # what follows the image: eoi, eos, padding up to the row's length
    truncated: bool


class PromptTokenizer:
    """A Qwen2.5 tokenizer, with Show-o2's four tokens, which are added where they are missing.

    normalized: whether they are looked for in the normalised text (all but [PAD]), as the release does. There
        `<image>` with a combining stroke after it ends in one letter, "≯", and is no token. Those that are there stay.
    """

    def __init__(self, tokenizer: Tokenizer, *, normalized: bool = True):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for token in ADDED_TOKENS:
            if tokenizer.token_to_id(token) is None:
                special = token == PAD
                tokenizer.add_tokens([AddedToken(token, normalized=normalized and not special, special=special)])
        framing = (BOS, EOS, BOI, EOI, IMAGE_PLACEHOLDER, PAD)
        ids = {token: number for token in framing if (number := tokenizer.token_to_id(token)) is not None}
        if absent := [token for token in framing if token not in ids]:
            raise CheckpointError(f"not a Qwen2.5 tokenizer: it lacks {', '.join(absent)}")
        self.ids = TokenIds(*ids.values())

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode_prompt(self, prompt: str, max_text_tokens: int) -> EncodedPrompt:
        """A row around an image: the text, cut after `max_text_tokens`, or padded to as many after the image."""
        ids = self.ids
        text = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        kept = text[:max_text_tokens]
        return EncodedPrompt(
            prefix=[ids.bos, *kept, ids.boi],
            suffix=[ids.eoi, ids.eos, *[ids.pad] * (max_text_tokens - len(kept))],
            truncated=len(text) > max_text_tokens,
        )

    def encode_question(self, question: str) -> EncodedQuestion:
        """The chat layout in which Show-o2 was taught to answer."""
        system, user, asked, assistant = (
            self.tokenizer.encode(text, add_special_tokens=False).ids for text in (SYSTEM, USER, question, ASSISTANT)
        )
        ids = self.ids
        return EncodedQuestion([ids.bos, *system, *user, ids.boi], [ids.eoi, *asked, *assistant])

    def decode(self, tokens: list[int]) -> str:
        """An answer's tokens to text, without framing tokens and the space around it."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> PromptTokenizer:
        """Load a `tokenizer.json`, given itself, or in a folder, its `tokenizer/` subfolder, or a hub repository; where
        there is none, the `vocab.json` and `merges.txt` of transformers' slow tokenizers. Ids are the same.

        Of Qwen2.5's own file, ids are those of the release, which adds the four tokens to it too.

        Raises `CheckpointError` when there is none or it cannot be read.
        """
        file = Path(path_or_hub_id)
        if file.name != TOKENIZER:
            folder = resolve_folder(path_or_hub_id, [TOKENIZER])
            found = find_tokenizer(folder) or find_tokenizer(resolve_folder(path_or_hub_id, TOKENIZER_FILES))
            if found is None:
                raise CheckpointError(f"{folder} holds no {TOKENIZER}, nor a vocab.json with its merges.txt")
            file = found
        try:
            return cls(Tokenizer.from_file(str(file)) if file.name == TOKENIZER else _of_transformers(file.parent))
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        except Exception as error:  # the Rust side raises bare Exception, and transformers many kinds
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {reason}") from None

    @classmethod
    def beside(cls, folder: Path | None, config: Showo2Config) -> PromptTokenizer:
        """The tokenizer of a checkpoint, wherever `tokenizer_beside` has it."""
        return cls.from_pretrained(tokenizer_beside(folder, config))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, and a `tokenizer_config.json` with which transformers' AutoTokenizer reads it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / TOKENIZER))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _of_transformers(folder: Path) -> Tokenizer:
    """The tokenizer in a folder that has no `tokenizer.json`. Runs no code that comes with it."""
    from transformers import AutoTokenizer  # takes seconds

    safely = {"trust_remote_code": False, "local_files_only": True}
    # A fix for Mistral's tokenizers. Unless it is declined, transformers takes a Show-o2 folder for one of theirs.
    loaded = AutoTokenizer.from_pretrained(folder, fix_mistral_regex=False, **safely)
    tokenizer = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(f"not a Qwen2.5 tokenizer: it is a {type(loaded).__name__}")
    return tokenizer
