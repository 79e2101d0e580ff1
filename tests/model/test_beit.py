# SPDX-License-Identifier: Apache-2.0
"""BEiT against definitions written out by hand, in fp64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import vitadapter
from vitadapter.backbones.beit import Attention, BEiT, Block

DIM, HEADS = 12, 3


def _beit(**overrides) -> BEiT:
    arguments = {
        "embed_dim": DIM,
        "depth": 4,
        "num_heads": HEADS,
        "mlp_ratio": 4.0,
        "patch_size": 16,
        "drop_path_rate": 0.3,
        "window_sizes": None,
        "img_size": 64,
    }
    return BEiT(**{**arguments, **overrides})


def _bias(attention: Attention, query: int | None, key: int | None) -> Tensor:
    """Bias of each head between two tokens of the square; None is the class token."""
    table, side = attention.relative_position_bias_table, attention.side
    if query is None or key is None:
        return table[-1 if query is key else -3 if query is None else -2]
    row = query // side - key // side + side - 1
    column = query % side - key % side + side - 1
    return table[row * (2 * side - 1) + column]


def _expected(attention: Attention, x: Tensor, names: list[int | None]) -> Tensor:
    """Attention of tokens [N, D] before the output projection."""
    weights = attention.qkv.weight.chunk(3)
    q = x @ weights[0].T + attention.q_bias
    k, v = x @ weights[1].T, x @ weights[2].T + attention.v_bias
    width = DIM // HEADS
    outputs = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        logits = q[:, part] @ k[:, part].T / math.sqrt(width)
        bias = [[_bias(attention, i, j)[head] for j in names] for i in names]
        logits = logits + torch.stack([torch.stack(row) for row in bias])
        outputs.append(logits.softmax(-1) @ v[:, part])
    return torch.cat(outputs, dim=-1)


def test_global_attention_has_biases_for_all_pairs_and_the_class_token(randomise):
    attention = randomise(Attention(DIM, HEADS, side=3, windowed=False)).double()
    x = torch.randn(2, 10, DIM, dtype=torch.float64)
    names = [None, *range(9)]
    expected = torch.stack([_expected(attention, tokens, names) for tokens in x])
    torch.testing.assert_close(attention(x, (3, 3)), attention.proj(expected))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 2)])
def test_windows_are_padded_with_zero_tokens_before_qkv(randomise, shape):
    side, (h, w) = 2, shape
    attention = randomise(Attention(DIM, HEADS, side, windowed=True)).double()
    x = torch.randn(2, h * w, DIM, dtype=torch.float64)
    grid = x.unflatten(1, shape)
    expected = torch.empty(2, h, w, DIM, dtype=torch.float64)
    for image in range(2):
        for top in range(0, h, side):
            for left in range(0, w, side):
                inside = grid[image, top : top + side, left : left + side]
                rows, columns = inside.shape[:2]
                window = torch.zeros(side, side, DIM, dtype=torch.float64)
                window[:rows, :columns] = inside
                out = _expected(attention, window.flatten(0, 1), list(range(side**2)))
                out = out.unflatten(0, (side, side))
                expected[image, top : top + side, left : left + side] = out[:rows, :columns]
    torch.testing.assert_close(attention(x, shape), attention.proj(expected.flatten(1, 2)))


class _LowRank(nn.Module):
    """A qkv layer with an update of rank one, as LoRA puts it in a layer's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 1, bias=False)
        self.up = nn.Linear(1, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("windowed", [False, True])
def test_a_layer_in_the_place_of_qkv_counts_and_learns(randomise, windowed):
    attention = randomise(Attention(DIM, HEADS, side=2, windowed=windowed)).double()
    plain = copy.deepcopy(attention)
    attention.qkv = _LowRank(attention.qkv).double()
    with torch.no_grad():
        plain.qkv.weight += attention.qkv.up.weight @ attention.qkv.down.weight
    x = torch.randn(2, 4 if windowed else 5, DIM, dtype=torch.float64)
    torch.testing.assert_close(attention(x, (2, 2)), plain(x, (2, 2)))
    attention(x, (2, 2)).square().sum().backward()
    assert attention.qkv.down.weight.grad.any()


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per"
)
def test_dynamically_quantised_attention_is_close():
    torch.backends.quantized.engine = "fbgemm"
    attention = Attention(DIM, HEADS, side=2, windowed=True)
    x = torch.randn(2, 4, DIM)
    with torch.no_grad():
        expected = attention(x, (2, 2))
        quantised = torch.ao.quantization.quantize_dynamic(attention, {nn.Linear})
        assert type(quantised.qkv) is not nn.Linear
        assert (quantised(x, (2, 2)) - expected).norm() < 0.05 * expected.norm()


def test_hooked_qkv_has_the_dtypes_of_a_plain_one_under_autocast(randomise):
    attention = randomise(Attention(DIM, HEADS, side=2, windowed=True))
    x = torch.randn(2, 4, DIM)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            expected = attention(x, (2, 2))
            handle = attention.qkv.register_forward_hook(lambda module, args, out: None)
            got = attention(x, (2, 2))
            handle.remove()
        assert got.dtype == expected.dtype
        # The bias is added to a product that was rounded, by 2**-9, for itself.
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_keys_have_no_bias_and_branches_start_almost_off():
    block = Block(DIM, Attention(DIM, HEADS, 2, windowed=True), 4.0, 0.0)
    assert "attn.qkv.bias" not in block.state_dict()
    assert torch.equal(block.gamma_1, torch.full((DIM,), 1e-6))
    assert torch.equal(block.gamma_2, torch.full((DIM,), 1e-6))


def test_class_token_goes_through_the_blocks_in_segmentation_only():
    beit = _beit().double()
    tokens, shape, _ = beit.start(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert (tokens.shape, shape) == ((2, 17, DIM), (4, 4))
    torch.testing.assert_close(tokens[:, 0], beit.cls_token[0].expand(2, -1))
    detection = _beit(window_sizes=[2, 2, 2, 8])
    assert "cls_token" not in detection.state_dict()
    assert detection.start(torch.randn(2, 3, 48, 64))[0].shape == (2, 12, DIM)


def test_tables_have_three_more_rows_with_a_class_token():
    def rows(model):
        return [block.attn.relative_position_bias_table.shape[0] for block in model.blocks]

    assert rows(_beit()) == [7**2 + 3] * 4
    assert rows(_beit(window_sizes=[2, 2, 2, 8])) == [9, 9, 9, 15**2]


@pytest.mark.parametrize(("name", "period"), [("base", 3), ("large", 6)])
def test_detection_has_windows_of_14_and_56(name, period):
    with torch.device("meta"):
        model = vitadapter.create_model(f"beit_adapter_{name}", task="detection")
    windows = [block.attn.window_size for block in model.blocks]
    assert windows == ([14] * (period - 1) + [56]) * 4


def test_layer_scale_and_injectors_start_from_one_value():
    with torch.device("cpu"):
        model = vitadapter.create_model("beit_adapter_base", task="detection", depth=4)
    assert model.interactions[0].injector.gamma.unique().tolist() == pytest.approx([1e-6])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_published_position_index_is_not_needed(task):
    size = {"img_size": 64} if task == "segmentation" else {}
    model = vitadapter.create_model(
        "beit_adapter_base", task=task, depth=4, embed_dim=48, conv_inplane=8, **size
    )
    state = model.state_dict()
    assert not any("relative_position_index" in key for key in state)
    for index in range(4):
        state[f"blocks.{index}.attn.relative_position_index"] = torch.zeros(2, 2)
    model.load_state_dict(state)


@pytest.mark.parametrize("rule", ["new", "old"])
def test_detection_knows_both_feature_rules(rule):
    model = vitadapter.create_model(
        "beit_adapter_base",
        task="detection",
        depth=4,
        embed_dim=48,
        conv_inplane=8,
        feature_rule=rule,
    ).eval()
    calls = []
    model._add_resized = lambda base, tokens, index: calls.append(tokens) or base
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 4
    assert all(torch.equal(calls[0], call) for call in calls) == (rule == "new")


def test_image_of_another_size_says_which_one_is_served():
    with pytest.raises(ValueError, match=r"images: expected 64x64 pixels .*got 64x96"):
        _beit().start(torch.randn(1, 3, 64, 96))
