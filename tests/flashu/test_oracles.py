"""Against other people's implementations on random weights: transformers' Qwen2 and SigLIP, diffusers' Wan VAE.

Each oracle runs the network the long way: whole rows with a dense mask, 3-D convolutions. And transformers' logits
warpers, on random logits.
"""

import pytest
import torch

from flashu.conversation import Sampler
from flashu.models import WanImageVAE
from flashu.models.diffusion_head import ROPE_THETA, DiffusionHead
from flashu.models.geometry import HeadGeometry, LlmGeometry, VaeGeometry, VisionGeometry
from flashu.models.layers import rotary_frequencies, rotary_table
from flashu.models.qwen2 import Qwen2ForCausalLM
from flashu.models.siglip import SiglipEncoder
from flashu.models.wan_vae import fold
from tests.bounds import EVALUATION, SUM
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def randomize(module):
    """Every parameter away from its initial value, gains and biases too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.mul_(0.5).add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (6, 1)])
def test_llm_over_prefix_and_span_equals_transformers_qwen2_over_the_whole_row(heads, kv_heads):
    from transformers import Qwen2Config
    from transformers import Qwen2ForCausalLM as Oracle

    geometry = LlmGeometry(16 * heads, 160, 3, heads, kv_heads, rope_theta=1e4)
    llm = randomize(Qwen2ForCausalLM(geometry, 100))
    oracle = Oracle(
        Qwen2Config(
            vocab_size=100,
            hidden_size=geometry.hidden_size,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    oracle.load_state_dict(llm.state_dict())

    prefix_length, span_length, row_length = 7, 12, 25
    x = torch.randn(2, row_length, geometry.hidden_size)
    allowed = torch.ones(row_length, row_length).tril().bool()
    span = slice(prefix_length, prefix_length + span_length)
    allowed[span, span] = True
    mask = torch.zeros(1, 1, row_length, row_length).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = oracle(inputs_embeds=x, attention_mask=mask, output_hidden_states=True)

    frequencies = rotary_frequencies(geometry.head_dim, geometry.rope_theta)
    positions = torch.arange(row_length)[None]
    text = slice(0, prefix_length)
    _, seen = llm.model(x[:, text], rotary_table(frequencies, positions[:, text], x.dtype))
    out, _ = llm.model(x[:, span], rotary_table(frequencies, positions[:, span], x.dtype), seen)
    assert relative_error(out, expected.hidden_states[-1][:, span]) < EVALUATION
    assert relative_error(llm.lm_head(out), expected.logits[:, span]) < EVALUATION


def test_semantic_path_equals_transformers_siglip_without_its_last_layer():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=48, intermediate_size=88, num_hidden_layers=4, num_attention_heads=4, image_size=84, patch_size=14
    )
    oracle = randomize(SiglipVisionModel(config))
    ours = SiglipEncoder(VisionGeometry(48, 88, 3, 4, grid=6)).eval()
    weights = {
        key.split("encoder.", 1)[1]: value
        for key, value in oracle.state_dict().items()
        if "encoder.layers." in key and "layers.3." not in key
    }
    ours.load_state_dict(weights)

    pixels = torch.randn(2, 3, 84, 84)
    states = oracle(pixels, output_hidden_states=True).hidden_states
    assert relative_error(ours(states[0]), states[-2]) < EVALUATION


def test_head_rotary_equals_transformers_llama3_scaling():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "llama3", "rope_theta": ROPE_THETA, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, head_dim=64, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    with torch.device("meta"):
        head = DiffusionHead(HeadGeometry(), 0)
    assert relative_error(head.rotary_frequencies("cpu"), expected) < SUM


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, 1.0),
        (0.3, None, 0.8),
        (1.5, 5, 1.0),
        (0.7, 20, 0.9),
        (1.0, 1, 0.5),
        (1e-3, None, 0.9),
        (1, None, 1e-6),
    ],
)
def test_tokens_are_drawn_from_those_that_transformers_warpers_keep(temperature, top_k, top_p):
    """Of logits without ties: the share of each token is that of its warped logit, drawn as the sampler's seeds say."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    images, questions, words = 4, 100, 512
    logits = 3 * torch.randn(images, questions, words, generator=torch.Generator().manual_seed(5))
    seeds = [range(image * questions, (image + 1) * questions) for image in range(images)]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))  # before top-k, as shares are those of all tokens
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    likely, tokens = warpers(None, logits.flatten(0, 1)).softmax(dim=-1).sort(dim=-1, descending=True)
    drawn = torch.stack(
        [torch.rand((), generator=torch.Generator().manual_seed(seed)) for row in seeds for seed in row]
    )
    sums = likely.double().cumsum(dim=-1)
    place = torch.searchsorted(sums, drawn.double()[:, None] * sums[:, -1:], right=True)
    expected = tokens.gather(1, place)[:, 0].unflatten(0, (images, questions))
    assert torch.equal(Sampler(seeds, temperature, top_k, top_p)(logits), expected)


@pytest.fixture(scope="module")
def wan():
    """diffusers' Wan VAE at a small width, and the released-layout 3-D weights that it was given."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    geometry = VaeGeometry(dim=8)
    with torch.device("meta"):
        folded = WanImageVAE(geometry)
    released = {key: _unfolded(key, value.shape) for key, value in folded.state_dict().items()}
    for key in [key for key in released if key.endswith("resample.1.weight")]:
        # The resampling blocks of the two inner levels also have a temporal convolution, which images never use.
        name = key.removesuffix("resample.1.weight") + "time_conv"
        channels = released[key].shape[1]
        up = name.startswith("decoder")
        if name.split(".")[2] in (("3", "7") if up else ("5", "8")):
            released[f"{name}.weight"] = torch.randn(channels * (1 + up), channels, 3, 1, 1)
            released[f"{name}.bias"] = torch.randn(channels * (1 + up))
    oracle = AutoencoderKLWan(base_dim=8).eval()
    oracle.load_state_dict(convert_wan_vae_to_diffusers(dict(released)))
    ours = WanImageVAE(geometry).eval()
    ours.load_state_dict(fold(released))
    return ours, oracle


def _unfolded(key, shape):
    """Random released weights for a folded parameter: 3-D kernels where the release has them."""
    if key.endswith("gamma"):
        attention = ".norm." in key
        return 1 + 0.1 * torch.randn(shape[0], *([1] * (2 if attention else 3)))
    if len(shape) == 1:
        return 0.1 * torch.randn(shape)
    flat = "resample.1" in key or "to_qkv" in key or ".proj." in key
    kernel = shape if flat else (*shape[:2], shape[-1], *shape[2:])
    return torch.randn(kernel) * (shape[1] * shape[2] * shape[3]) ** -0.5


@pytest.mark.parametrize("side", [(4, 4), (6, 10)])
def test_folded_vae_decodes_as_diffusers_wan_does(wan, side):
    ours, oracle = wan
    latents = torch.randn(2, 16, *side)
    mean, std = (torch.tensor(v)[:, None, None] for v in (ours.geometry.latent_mean, ours.geometry.latent_std))
    expected = oracle.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert relative_error(ours.decode(latents), expected.clamp(-1, 1)) < EVALUATION


def test_folded_vae_encodes_as_diffusers_wan_does(wan):
    ours, oracle = wan
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    posterior = oracle.encode(images[:, :, None]).latent_dist
    mean, log_variance = ours.encode(images)
    means, stds = (torch.tensor(v)[:, None, None] for v in (ours.geometry.latent_mean, ours.geometry.latent_std))
    assert relative_error(mean * stds + means, posterior.mean[:, :, 0]) < EVALUATION
    assert relative_error(log_variance, posterior.logvar[:, :, 0]) < EVALUATION


def test_default_vae_geometry_is_the_released_one():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        oracle, ours = AutoencoderKLWan(), WanImageVAE(VaeGeometry())
    assert oracle.config.latents_mean == list(ours.geometry.latent_mean)
    assert oracle.config.latents_std == list(ours.geometry.latent_std)
    temporal = sum(p.numel() for name, p in oracle.named_parameters() if "time_conv" in name)
    kernels = sum(p.numel() * 2 // 3 for p in oracle.parameters() if p.ndim == 5 and p.shape[2:] == (3, 3, 3))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in oracle.parameters()) - temporal - kernels
