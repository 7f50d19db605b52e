"""Attention against loops over positions, and the law of causality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties import examples
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fundamentallm.models.layers import attention as attention_module
from fundamentallm.models.layers.attention import KERNELS, Attention, flash_attention, use_kernel
from fundamentallm.models.layers.positions import POSITIONS, Positions

B, T, D, H = 2, 7, 24, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Weigh the values row by row, each query head looking up its key head by its number."""
    batch, heads, time, width = query.shape
    heads_per_key = heads // key.size(1)
    out = torch.zeros_like(query)
    for b in range(batch):
        for h in range(heads):
            g = h // heads_per_key
            for t in range(time):
                scores = [
                    sum(query[b, h, t, i].item() * key[b, g, s, i].item() for i in range(width))
                    / math.sqrt(width)
                    for s in range(t + 1)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                for s in range(t + 1):
                    out[b, h, t] += weights[s] / sum(weights) * value[b, g, s]
    return out


@pytest.mark.parametrize("span", [1, 3, T, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_its_formula(
    kernel: str, num_kv_heads: int, span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_SPAN", span)
    query = random(B, H, T, 4, seed=1)
    key, value = random(2, B, num_kv_heads, T, 4, seed=2)
    expected = naive_attention(query, key, value)
    torch.testing.assert_close(
        KERNELS[kernel](query, key, value, 0.0), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "flash"])
def test_a_kernel_has_the_gradients_of_flash(
    kernel: str, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_SPAN", 3)
    inputs = [random(B, heads, T, 4, seed=heads) for heads in (H, num_kv_heads, num_kv_heads)]
    gradients = []
    for function in (flash_attention, KERNELS[kernel]):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves, 0.0).backward(random(B, H, T, 4, seed=9))
        gradients.append([leaf.grad for leaf in leaves])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_in_bfloat16_errs_by_its_inputs_rounding_alone(kernel: str) -> None:
    # 4,096 equal keys: a softmax summed in bfloat16 would stop growing at 256.
    query, key = torch.zeros(2, 1, 1, 4096, 8, dtype=torch.bfloat16)
    value = torch.ones(1, 1, 4096, 8, dtype=torch.bfloat16)
    out = KERNELS[kernel](query, key, value, 0.0)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, torch.ones_like(out), rtol=5e-3, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_drops_weights_and_keeps_their_mean(kernel: str) -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(2, 1, 1, 1, 4)
    value = torch.ones(4000, 1, 1, 4)
    query, key = query.expand(4000, 1, 1, 4), key.expand(4000, 1, 1, 4)
    out = KERNELS[kernel](query, key, value, 0.25)
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_kernel_is_chosen_for_all_layers_by_name() -> None:
    layers = torch.nn.ModuleList([module(), module()])
    use_kernel(layers, "explicit")
    assert [layer.kernel for layer in layers] == ["explicit", "explicit"]
    with pytest.raises(ValueError, match=r"'fast', expected flash, explicit"):
        use_kernel(layers, "fast")


def module(*, num_kv_heads: int = H, qk_norm: bool = False, bias: bool = False) -> Attention:
    torch.manual_seed(0)
    return Attention(D, H, num_kv_heads, bias=bias, qk_norm=qk_norm).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_the_module_projects_normalizes_rotates_attends_and_projects(
    num_kv_heads: int, qk_norm: bool, bias: bool
) -> None:
    attention = module(num_kv_heads=num_kv_heads, qk_norm=qk_norm, bias=bias)
    rotary = POSITIONS.build("rotary", width=D, head_width=D // H, sequence_length=T).double()
    if qk_norm:
        for gain in (attention.query_norm.weight, attention.key_norm.weight):
            gain.data = random(D // H, seed=7)  # type: ignore[union-attr]
    x = random(B, T, D)

    def heads(projected: Tensor, gain: Tensor | None) -> Tensor:
        # Head h owns columns h K to (h + 1) K - 1.
        split = torch.stack(projected.split(D // H, dim=-1), dim=1)
        if gain is None:
            return split
        return split / (split.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    gains = (attention.query_norm.weight, attention.key_norm.weight) if qk_norm else (None, None)
    query, key = rotary.rotate(
        heads(attention.query(x), gains[0]), heads(attention.key(x), gains[1])
    )
    out = naive_attention(query, key, heads(attention.value(x), None))
    expected = attention.output(torch.cat(out.unbind(1), dim=-1))
    torch.testing.assert_close(attention(x, rotary), expected, rtol=1e-12, atol=1e-12)


def test_shared_heads_equal_repeated_heads() -> None:
    shared, full = module(num_kv_heads=2), module()
    full.query.load_state_dict(shared.query.state_dict())
    full.output.load_state_dict(shared.output.state_dict())
    for name in ("key", "value"):
        weight = getattr(shared, name).weight.unflatten(0, (2, D // H))
        repeated = weight.repeat_interleave(H // 2, dim=0).flatten(0, 1)
        getattr(full, name).weight.data = repeated
    x, positions = random(B, T, D), Positions()
    torch.testing.assert_close(shared(x, positions), full(x, positions), rtol=1e-12, atol=1e-12)


@given(
    changed=st.integers(0, T - 1),
    seed=st.integers(0, 100),
    num_kv_heads=st.sampled_from([1, 3, 6]),
    qk_norm=st.booleans(),
    kernel=st.sampled_from(list(KERNELS)),
)
@settings(max_examples=examples(40))
def test_changing_a_row_leaves_the_rows_before_it_bitwise_unchanged(
    changed: int, seed: int, num_kv_heads: int, qk_norm: bool, kernel: str
) -> None:
    attention = module(num_kv_heads=num_kv_heads, qk_norm=qk_norm)
    use_kernel(attention, kernel)
    x = random(B, T, D, seed=seed)
    other = x.clone()
    other[:, changed] += 1.0
    before, after = attention(x, Positions()), attention(other, Positions())
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


def test_qk_norm_bounds_the_scores_whatever_the_weights() -> None:
    attention, x = module(qk_norm=True), random(B, T, D)
    before = attention(x, Positions())
    attention.query.weight.data *= 1e4
    attention.key.weight.data *= 1e4
    torch.testing.assert_close(attention(x, Positions()), before, rtol=1e-3, atol=1e-3)


def test_attention_weights_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    attention = Attention(D, H, H, dropout=0.5).double()
    x = random(B, T, D)
    assert not torch.equal(attention(x, Positions()), attention(x, Positions()))
    attention.eval()
    assert torch.equal(attention(x, Positions()), attention(x, Positions()))


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 4)])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads {heads}, num_kv_heads {kv_heads}"):
        Attention(D, heads, kv_heads)


@pytest.mark.parametrize(
    ("dtype", "masked", "heads_of_keys"),
    [
        (torch.bfloat16, False, 2),  # the flash kernel shares heads
        (torch.bfloat16, True, H),  # ... but takes no mask
        (torch.float32, False, H),  # ... and half types only
        (torch.float32, True, H),
        (torch.float16, False, H),  # GPUs without bfloat16 have no flash kernel
    ],
)
def test_on_a_gpu_shared_heads_go_where_a_fused_kernel_takes_them(
    dtype: torch.dtype, masked: bool, heads_of_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        seen.append((key.size(1), value.size(1), options["enable_gqa"]))
        return torch.empty_like(query)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", attend)
    with FakeTensorMode():  # of a GPU that is not here
        query = torch.empty(B, H, T, 4, device="cuda:0", dtype=dtype)
        key = torch.empty(B, 2, T, 4, device="cuda:0", dtype=dtype)
        if masked:
            visible = torch.empty(B, 1, T, T, device="cuda:0", dtype=torch.bool)
            attention_module.document_attention(visible, 0.0, query, key, key)
        else:
            flash_attention(query, key, key)
    assert seen == [(heads_of_keys, heads_of_keys, heads_of_keys != H)]


def test_copies_of_heads_are_the_heads_that_are_shared() -> None:
    query, key, value = random(B, H, T, 4), random(B, 2, T, 4, seed=1), random(B, 2, T, 4, seed=2)
    copied = attention_module._repeated(query, key, value)
    torch.testing.assert_close(flash_attention(query, *copied), flash_attention(query, key, value))
