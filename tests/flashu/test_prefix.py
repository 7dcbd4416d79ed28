"""What a prefix leaves out: masks where lengths allow it, and rows that are alike. The numbers stay the same."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flashu.models import Showo2Qwen2_5
from flashu.models.attention import AttentionChoice, Halves, choice, choosing
from flashu.models.blocks import AS_THEY_ARE, Blocks
from flashu.models.qwen2 import Subnetwork, measured_layer
from tests.bounds import EVALUATION
from tests.reference import relative_error

GRID = (3, 4)


@pytest.fixture(scope="module")
def model():
    return Showo2Qwen2_5.from_pretrained("embedded")


def text(length, seed=0):
    return torch.randint(500, (length,), generator=torch.Generator().manual_seed(seed + length)).tolist()


@torch.no_grad()
def velocity(model, prefix, images):
    """Each row's, for images that are numbered."""
    latents = torch.stack([torch.randn(8, 6, 8, generator=torch.Generator().manual_seed(image)) for image in images])
    return model.velocity(latents, model.embed_times(torch.tensor([0.3])).at(0), prefix)


@torch.no_grad()
@pytest.mark.parametrize(
    ("conditional", "unconditional", "halved", "masked"),
    [
        ([9], [2], True, False),  # one image: no mask at all
        ([9, 9, 9], [2, 2, 2], True, False),
        ([9, 5, 7], [2, 2, 2], True, True),
        ([3, 5], [11, 11], True, True),  # negative prompts longer than any
        ([5, 5], [11, 11], True, False),
        ([4, 4], [4, 4], False, False),
        ([9, 5], [2, 3], False, True),
    ],
)
def test_guided_rows_are_masked_only_where_their_lengths_differ(model, conditional, unconditional, halved, masked):
    rows = [text(length, seed) for seed, length in enumerate([*conditional, *unconditional])]
    images = len(conditional)
    prefix = model.encode_prefix(rows, GRID, guided=True)
    assert all(isinstance(seen, Halves) == halved for seen in (*prefix.llm, *prefix.head))
    assert (prefix.mask is not None) == masked
    alone = [velocity(model, model.encode_prefix([row], GRID), [i % images]) for i, row in enumerate(rows)]
    assert relative_error(velocity(model, prefix, range(images)), torch.cat(alone)) < EVALUATION


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "halved"),
    [
        (AttentionChoice(native_groups=True), True),
        (AttentionChoice(joint_rows=5), True),
        (AttentionChoice(joint_rows=6), False),
        (AttentionChoice(native_groups=True, joint_rows=6), False),
    ],
    ids=str,
)
def test_however_attention_is_run_the_numbers_are_the_same(model, other, halved):
    """Of a span, of a text, and of whole rows that are measured, whose last positions see more and more."""
    assert model.config.llm.num_attention_heads > model.config.llm.num_key_value_heads > 1
    rows = [text(length, seed) for seed, length in enumerate([9, 5, 7, 2, 2, 2])]
    suffixes = [text(4 + 9 - len(row)) for row in rows]
    noise = torch.randn(3, 8, 6, 8, generator=torch.Generator().manual_seed(0))
    time = model.embed_times(torch.tensor([0.3])).at(0)

    def run():
        prefix = model.encode_prefix(rows, GRID, suffixes=suffixes, guided=True)
        return prefix, velocity(model, prefix, range(3)), *model.measure_llm(noise, time, prefix)

    _, *expected = run()
    default = choice()
    with choosing(other):
        prefix, *found = run()
    assert choice() is default
    assert all(isinstance(seen, Halves) == halved for seen in (*prefix.llm, *prefix.head))
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < EVALUATION


@torch.no_grad()
def test_compiled_blocks_get_masks_of_one_alignment(model):
    """Whatever the lengths; and no mask where none is needed. The numbers are those of other padding."""
    blocks = Blocks.through(lambda block: block)
    for lengths in ([9, 5, 7, 2, 2, 2], [3, 20, 20, 2, 2, 2], [9, 5, 7, 2, 3, 4]):
        rows = [text(length, seed) for seed, length in enumerate(lengths)]
        plain, prefix = (model.encode_prefix(rows, GRID, guided=True, blocks=some) for some in (AS_THEY_ARE, blocks))
        assert prefix.mask.shape[3] % 8 == 0
        assert prefix.mask.shape[3] - plain.mask.shape[3] < 8
        assert relative_error(velocity(model, prefix, range(3)), velocity(model, plain, range(3))) < EVALUATION
    assert model.encode_prefix([text(9), text(2)], GRID, guided=True, blocks=blocks).mask is None


@torch.no_grad()
def test_layers_that_only_some_images_run_keep_to_the_halves(model):
    rows = [text(9), text(5), text(7), *[text(2)] * 3]
    some = torch.tensor([0, 2, 3, 5])  # both rows of two of three images
    ran_by = tuple(some if layer in (2, 5) else None for layer in range(10))
    halved, whole = (
        model.encode_prefix(rows, GRID, Subnetwork(running_rows=ran_by), guided=guided) for guided in (True, False)
    )
    assert isinstance(halved.llm[2], Halves)
    assert relative_error(velocity(model, halved, range(3)), velocity(model, whole, range(3))) < EVALUATION


@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "suffix", "parts"), [(2, 6, 1), (6, 6, 1), (8, 6, 2), (2, 8, 2), (8, 8, 2), (8, 27, 4)], ids=str
)
def test_few_rows_are_measured_at_once_and_many_or_long_ones_by_parts(model, rows, suffix, parts):
    """Spans here are of 13 positions. Numbers are those of each row alone."""
    texts, suffixes = [text(9, seed) for seed in range(rows)], [text(suffix, seed) for seed in range(rows)]
    calls = []

    def counted(layer, *others):
        calls.append(layer)
        return measured_layer(layer, *others)

    prefix = model.encode_prefix(texts, GRID, suffixes=suffixes)
    span = torch.randn(rows, 13, model.config.llm.hidden_size, generator=torch.Generator().manual_seed(0))
    together = model.run_rows(span, prefix, replace(AS_THEY_ARE, measured_layer=counted))
    assert len(calls) == parts * len(model.showo.model.layers)
    alone = [
        model.run_rows(span[row : row + 1], model.encode_prefix([texts[row]], GRID, suffixes=[suffixes[row]]))
        for row in range(rows)
    ]
    for mine, theirs in zip(together, zip(*alone, strict=True), strict=True):
        assert relative_error(mine, torch.cat(theirs)) < EVALUATION


class CountedOps(TorchDispatchMode):
    """How often each of PyTorch's operations ran within."""

    def __enter__(self):
        self.counts = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("sets", "taken", "copied", "put"),
    [
        ("*aa.a*bab*", 10, 0, 4),  # a twice and b twice, and once for each the rotation's two tables and the mask
        ("aaabbbb.b.", 8, 1, 1),  # the first goes into a copy of what was given
        ("*bb**aaa..", 8, 0, 2),
        ("abababab..", 14, 1, 7),
        ("**..*.*...", 0, 0, 0),  # as where there is one image
    ],
)
def test_rows_are_taken_out_and_put_back_where_other_rows_run_only(model, sets, taken, copied, put):
    """Layers that all rows run, those of two sets of them, or none; numbers are those of each row alone."""
    rows = [text(9), text(5), text(7), text(2)]
    nobody = torch.tensor([], dtype=torch.long)
    running = {"*": None, "a": torch.tensor([0, 2]), "b": torch.tensor([1, 2, 3]), ".": nobody}
    llm, subnetwork = model.showo.model, Subnetwork(running_rows=tuple(running[name] for name in sets))
    prefix = model.encode_prefix(rows, GRID, subnetwork)
    span = torch.randn(4, 13, model.config.llm.hidden_size, generator=torch.Generator().manual_seed(0))
    given = span.clone()
    with CountedOps() as ops:
        together, _ = llm(span, prefix.llm_rotary, prefix.llm, prefix.mask, subnetwork)
    assert torch.equal(span, given)
    assert [ops.counts[name] for name in ("index", "index_copy", "index_copy_")] == [taken, copied, put]
    alone = []
    for number, row in enumerate(rows):
        ran_by = tuple(None if ran is None or number in ran else nobody for ran in subnetwork.running_rows)
        own = Subnetwork(running_rows=ran_by)
        prefix = model.encode_prefix([row], GRID, own)
        alone.append(llm(span[number : number + 1], prefix.llm_rotary, prefix.llm, prefix.mask, own)[0])
    assert relative_error(together, torch.cat(alone)) < EVALUATION


@torch.no_grad()
def test_rows_that_are_alike_are_encoded_once(model):
    """As the empty prompts of a batch are, and the images of one prompt."""
    rows = [text(9), text(9), text(6), *[text(2)] * 3]

    def cost(rows):
        with FlopCounterMode(display=False) as counter:
            prefix = model.encode_prefix(rows, GRID, guided=True)
        return counter.get_total_flops(), prefix

    flop, prefix = cost(rows)
    assert flop == cost([text(9), text(6), text(2)])[0] < 0.6 * cost([text(9, seed) for seed in range(6)])[0]
    keys = prefix.llm[3].first.key
    assert keys[0].equal(keys[1])
    assert not keys[0].equal(keys[2])
    (alone,) = velocity(model, model.encode_prefix([text(6)], GRID), [2])
    assert relative_error(velocity(model, prefix, range(3))[2], alone) < EVALUATION
