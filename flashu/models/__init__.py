"""The networks. `from flashu.models import Showo2Qwen2_5` is the drop-in for the release's `from models import …`."""

from flashu.models.showo2 import Showo2Qwen2_5
from flashu.models.tokenizer import PromptTokenizer
from flashu.models.wan_vae import WanImageVAE

__all__ = ["PromptTokenizer", "Showo2Qwen2_5", "WanImageVAE"]
