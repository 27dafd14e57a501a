"""The quantizers against torch.fake_quantize_per_tensor_affine, and their properties."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from FP_layers import (
    STE,
    FP_Conv,
    FP_Linear,
    LearnedStep,
    TernaryLevels,
    check_n_bits,
    code_range,
    fit_levels,
    fit_step,
)

BITS = range(1, 17)
SYMMETRIC_BITS = range(2, 17)
MODES = [(bit, False) for bit in BITS] + [(bit, True) for bit in SYMMETRIC_BITS]


def steps(bit, symmetric):
    """Steps between the grid's middle (symmetric) or its lowest level and its highest."""
    return 2 ** (bit - 1) - 1 if symmetric else 2**bit - 1


def step_size(w, bit, symmetric):
    return float((w.abs().max() if symmetric else w.max() - w.min()) / steps(bit, symmetric))


def pruned_weights(seed, shape=(8, 4, 3, 3)):
    """Normal weights, about a third of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return w * (torch.rand(shape, generator=generator) > 1 / 3)


weights = st.lists(
    st.one_of(st.just(0.0), st.floats(-8, 8, width=32, allow_subnormal=False)),
    min_size=1,
    max_size=48,
).map(lambda values: torch.tensor(values, dtype=torch.float32))
modes = st.sampled_from(MODES)


# ---------------------------------------------------------------- against PyTorch's own quantizer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bit", range(2, 9))
def test_symmetric_equals_fake_quantize(bit, seed):
    w, top = pruned_weights(seed), steps(bit, True)
    expected = torch.fake_quantize_per_tensor_affine(w, step_size(w, bit, True), 0, -top, top)
    torch.testing.assert_close(STE.apply(w, bit, True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bit", range(1, 9))
def test_asymmetric_equals_fake_quantize_from_the_minimum(bit, seed):
    w = pruned_weights(seed)
    grid = torch.fake_quantize_per_tensor_affine(
        w - w.min(), step_size(w, bit, False), 0, 0, steps(bit, False)
    )
    expected = torch.where(w == 0, 0, grid + w.min())
    torch.testing.assert_close(STE.apply(w, bit), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bit, zero_point", [(2, 1), (3, 5), (4, 3), (8, 117)])
def test_asymmetric_equals_fake_quantize_with_a_zero_point(bit, zero_point):
    """Where zero is on the grid, no special treatment of pruned weights is needed to agree."""
    scale, top = 2.0**-5, steps(bit, False)
    ends = torch.tensor([-zero_point * scale, (top - zero_point) * scale])
    inside = (
        torch.rand(500, generator=torch.Generator().manual_seed(bit)) * (ends[1] - ends[0])
        + ends[0]
    )
    w = torch.cat([ends, inside, torch.zeros(3)])
    expected = torch.fake_quantize_per_tensor_affine(w, scale, zero_point, 0, top)
    torch.testing.assert_close(STE.apply(w, bit), expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- properties


@given(weights, modes)
@example(torch.tensor([0.0, 1.0, 2.0]), (1, False))
def test_values_stay_near_in_range_and_on_few_levels(w, mode):
    bit, symmetric = mode
    quantized = STE.apply(w, bit, symmetric)
    tolerance = 2e-6 * float(w.abs().max())
    lowest, highest = (-w.abs().max(), w.abs().max()) if symmetric else (w.min(), w.max())
    levels = 2 * steps(bit, True) + 1 if symmetric else 2**bit

    assert quantized.shape == w.shape
    assert (quantized[w == 0] == 0).all()
    assert (quantized - w).abs().max() <= step_size(w, bit, symmetric) / 2 + tolerance
    assert lowest - tolerance <= quantized.min() and quantized.max() <= highest + tolerance
    assert quantized.unique().numel() <= levels + (not symmetric and bool((w == 0).any()))


@given(weights, modes)
def test_quantizing_twice_changes_nothing(w, mode):
    once = STE.apply(w, *mode)
    torch.testing.assert_close(
        STE.apply(once, *mode), once, rtol=0, atol=4e-6 * float(w.abs().max())
    )


@pytest.mark.parametrize("bit, symmetric", [mode for mode in MODES if mode[0] <= 8])
def test_a_dense_tensor_uses_every_level(bit, symmetric):
    w = torch.linspace(-1, 1, 10_000)
    levels = 2 * steps(bit, True) + 1 if symmetric else 2**bit
    assert STE.apply(w, bit, symmetric).unique().numel() == levels


def test_a_pruned_zero_off_the_grid_is_one_level_more():
    w = torch.tensor([-1.0, 0.0, 0.9, 2.0])
    assert STE.apply(w, 1).tolist() == [-1, 0, 2, 2]


@pytest.mark.parametrize(
    "bit, symmetric", [(None, False), (0, False), (None, True), (0, True), *MODES]
)
def test_the_gradient_is_the_identity(bit, symmetric):
    w = pruned_weights(0).requires_grad_()
    gradient = torch.randn_like(w)
    STE.apply(w, bit, symmetric).backward(gradient)
    assert torch.equal(w.grad, gradient)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_bits_given_is_the_identity_and_0_bits_are_zeros(symmetric):
    w = pruned_weights(1)
    assert torch.equal(STE.apply(w, None, symmetric), w)
    assert torch.equal(STE.apply(w, 0, symmetric), torch.zeros_like(w))


@pytest.mark.parametrize(
    "bit, symmetric", [(1, False), (2, False), (2, True), (8, True), (16, False)]
)
@pytest.mark.parametrize("value", [0.0, -0.3, 7.0, 1e-30])
def test_a_constant_tensor_is_returned_unchanged(value, bit, symmetric):
    w = torch.full((3, 4), value)
    assert torch.equal(STE.apply(w, bit, symmetric), w)


@pytest.mark.parametrize("bit", [None, 0, 4])
def test_an_empty_tensor_stays_empty(bit):
    assert STE.apply(torch.empty(0, 3), bit).shape == (0, 3)


@pytest.mark.parametrize("bit, symmetric", [(4, False), (4, True)])
def test_the_argument_is_not_changed(bit, symmetric):
    w = pruned_weights(2)
    before = w.clone()
    STE.apply(w, bit, symmetric).add_(1)
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_dtypes_are_computed_in_float32(dtype, symmetric):
    w = pruned_weights(3).to(dtype)
    quantized = STE.apply(w, 4, symmetric)
    assert quantized.dtype == dtype
    assert torch.equal(quantized, STE.apply(w.float(), 4, symmetric).to(dtype))


def test_float64_keeps_its_precision():
    w = torch.linspace(-1, 1, 2**16, dtype=torch.float64) / 3
    quantized = STE.apply(w, 16)
    assert quantized.dtype == torch.float64
    torch.testing.assert_close(quantized, w, rtol=0, atol=1e-15)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(poison, symmetric):
    with pytest.raises(ValueError, match="w must be finite"):
        STE.apply(torch.tensor([0.5, poison, -1.0]), 4, symmetric)


def test_a_range_beyond_the_dtype_is_refused():
    with pytest.raises(ValueError, match="finite range"):
        STE.apply(torch.tensor([-3e38, 3e38]), 4)


def test_integer_weights_are_refused():
    with pytest.raises(TypeError, match="floating-point tensor.*int64"):
        STE.apply(torch.arange(4), 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda *bad: STE.apply(torch.ones(2), *bad),
        lambda n, s: FP_Linear(2, 2, Nbits=n, symmetric=s),
        lambda n, s: FP_Conv(2, 2, 1, Nbits=n, symmetric=s),
    ],
    ids=["STE", "FP_Linear", "FP_Conv"],
)
@pytest.mark.parametrize(
    "bit, symmetric, error",
    [
        (1.5, False, TypeError),
        (4.0, False, TypeError),
        (True, False, TypeError),
        ("4", False, TypeError),
        (-1, False, ValueError),
        (17, False, ValueError),
        (1, True, ValueError),
        (-1, True, ValueError),
    ],
)
def test_bits_without_a_quantizer_are_refused(make, bit, symmetric, error):
    with pytest.raises(error, match="Nbits must be None") as caught:
        make(bit, symmetric)
    assert str(bit) in str(caught.value)


def test_symmetric_must_be_a_bool():
    with pytest.raises(TypeError, match="symmetric must be True or False, got 'yes'"):
        STE.apply(torch.ones(2), 4, "yes")


def test_any_integer_type_counts_bits():
    assert check_n_bits(np.int64(4)) == 4 and type(check_n_bits(np.int64(4))) is int


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_cuda_equals_cpu(dtype, tolerance):
    w = pruned_weights(4).to(dtype)
    for bit, symmetric in MODES:
        on_gpu = STE.apply(w.cuda(), bit, symmetric)
        assert on_gpu.device.type == "cuda" and on_gpu.dtype == dtype
        torch.testing.assert_close(
            on_gpu.cpu(), STE.apply(w, bit, symmetric), rtol=0, atol=tolerance
        )


# ---------------------------------------------------------------- the learned step


RANGES = [code_range(n, symmetric) for n in (2, 3, 4, 8) for symmetric in (False, True)]


def test_codes_of_a_learned_step():
    assert [code_range(n) for n in (2, 3, 4)] == [(-2, 1), (-4, 3), (-8, 7)]
    assert [code_range(n, symmetric=True) for n in (2, 3, 4)] == [(-1, 1), (-3, 3), (-7, 7)]


@pytest.mark.parametrize("bit", [None, 0, 1])
def test_a_learned_step_needs_two_bits(bit):
    with pytest.raises(ValueError, match=f"Nbits must be 2 to 16 for a learned step, got {bit}"):
        code_range(bit)


STEPS = torch.linspace(0.05, 1.5, 6).view(6, 1, 1, 1)


@pytest.mark.parametrize("lowest, highest", RANGES)
def test_learned_step_equals_fake_quantize_per_channel(lowest, highest):
    w = pruned_weights(0, (6, 4, 3, 3))
    zero_points = torch.zeros(6, dtype=torch.int)
    expected = torch.fake_quantize_per_channel_affine(
        w, STEPS.flatten(), zero_points, 0, lowest, highest
    )
    torch.testing.assert_close(
        LearnedStep.apply(w, STEPS, lowest, highest), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("lowest, highest", RANGES)
def test_gradients_are_those_autograd_finds_when_only_rounding_is_passed_straight_through(
    lowest, highest
):
    """The paper defines them by this composition; PyTorch's own kernel lets w's gradient pass half
    a step further.
    """
    w, step = pruned_weights(0, (6, 4, 3, 3)).requires_grad_(), STEPS.clone().requires_grad_()
    v = (w / step).clamp(lowest, highest)
    composed = (v + (v.round() - v).detach()) * step
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(composed, (w, step), upstream)
    found = torch.autograd.grad(LearnedStep.apply(w, step, lowest, highest), (w, step), upstream)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] / (4 * 3 * 3 * highest) ** 0.5)


@given(weights, st.floats(0.01, 4), st.sampled_from(RANGES))
def test_learned_step_yields_codes_times_the_step_and_keeps_zeros(w, step, limits):
    step = torch.tensor([step])
    quantized = LearnedStep.apply(w, step, *limits)
    codes = (quantized / step).round()
    # bit for bit: this is how a compressed file stores it
    assert torch.equal(quantized, codes * step)
    assert limits[0] <= codes.min() and codes.max() <= limits[1]
    assert (quantized[w == 0] == 0).all()
    torch.testing.assert_close(
        LearnedStep.apply(quantized, step, *limits), quantized, rtol=0, atol=0
    )


@pytest.mark.parametrize("lowest, highest", RANGES)
def test_fitted_step_is_as_good_as_a_fine_search(lowest, highest):
    w = pruned_weights(1, (5, 4, 3, 3)).double() * torch.tensor([0.01, 0.1, 1, 10, 100]).view(
        5, 1, 1, 1
    )
    fitted = fit_step(w, lowest, highest)
    assert fitted.shape == (5, 1, 1, 1) and (fitted > 0).all()
    for row, step in zip(w.flatten(1), fitted.flatten()):
        def error(s):
            return ((row / s).round().clamp(lowest, highest) * s - row).square().sum(-1)

        search = (
            torch.linspace(1e-3, 1, 5000, dtype=torch.float64).unsqueeze(1)
            * row.abs().max()
            / highest
        )
        assert error(step) <= 1.05 * error(search).min()


def test_fitting_recovers_a_grid_exactly_and_survives_zeros():
    codes = torch.tensor([[-1.0, 0, 1, 1], [0, 0, 0, 0]])
    assert torch.allclose(fit_step(codes * 0.37, -1, 1), torch.tensor([[0.37], [1.0]]))


# ---------------------------------------------------------------- trained ternary levels


LEVELS = torch.tensor([0.3, 0.7])  # for negative and positive weights


def test_ternary_levels_on_a_worked_example():
    w = torch.tensor([-2.0, -0.11, -0.1, 0.0, 0.05, 0.1, 0.5])  # up to 0.05 * 2 counts as zero
    assert TernaryLevels.apply(w, LEVELS).tolist() == pytest.approx([-0.3, -0.3, 0, 0, 0, 0, 0.7])


def test_gradients_of_ternary_levels_are_those_of_the_chosen_levels():
    w, levels = pruned_weights(0, (6, 4, 3, 3)).requires_grad_(), LEVELS.clone().requires_grad_()
    large = w.detach().abs() > 0.05 * w.detach().abs().max()
    composed = torch.where(
        large & (w > 0), levels[1], torch.where(large & (w < 0), -levels[0], 0.0)
    )
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    expected, = torch.autograd.grad(composed, levels, upstream)
    found = torch.autograd.grad(TernaryLevels.apply(w, levels), (w, levels), upstream)
    assert torch.equal(found[0], upstream)
    torch.testing.assert_close(found[1], expected / w.numel() ** 0.5)


def test_fitted_levels_recover_a_ternary_tensor_and_survive_zeros():
    ternary = torch.tensor([[-0.3, 0.0, 0.7], [0.7, 0.7, -0.3]])
    torch.testing.assert_close(fit_levels(ternary), LEVELS)
    torch.testing.assert_close(TernaryLevels.apply(ternary, fit_levels(ternary)), ternary)
    assert fit_levels(torch.zeros(3)).tolist() == [1, 1]


# ---------------------------------------------------------------- layers


def conv_case(**fixed_point):
    torch.manual_seed(0)
    layer = FP_Conv(3, 5, 3, stride=2, padding=1, bias=True, **fixed_point)
    return layer, layer.conv, nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 9, 9)


def linear_case(**fixed_point):
    torch.manual_seed(0)
    layer = FP_Linear(6, 4, **fixed_point)
    return layer, layer.linear, nn.Linear(6, 4), torch.randn(3, 6)


both_layers = pytest.mark.parametrize("case", [conv_case, linear_case])


@both_layers
def test_without_bits_a_layer_is_the_plain_one(case):
    layer, inner, plain, x = case()
    assert type(inner) is type(plain)
    plain.load_state_dict(inner.state_dict())
    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(inner.weight.grad, plain.weight.grad) and torch.equal(
        inner.bias.grad, plain.bias.grad
    )


@both_layers
@pytest.mark.parametrize("bit, symmetric", [(2, False), (2, True), (4, False)])
def test_a_layer_with_a_learned_step_starts_from_the_fitted_one_and_trains_it(case, bit, symmetric):
    layer, inner, _, x = case(Nbits=bit, symmetric=symmetric, quantizer="learned")
    assert dict(layer.named_parameters())["step"].shape == (
        len(inner.weight),
        *[1] * (inner.weight.dim() - 1),
    )
    assert torch.equal(layer.step, fit_step(inner.weight, *code_range(bit, symmetric)))
    expected = LearnedStep.apply(inner.weight, layer.step, *code_range(bit, symmetric))
    assert torch.equal(layer.quantized_weight(), expected)
    layer(x).square().sum().backward()
    assert layer.step.grad.any() and inner.weight.grad.any()


@both_layers
def test_a_step_that_training_made_negative_still_works_by_its_size(case):
    layer, _, _, x = case(Nbits=3, quantizer="learned")
    expected = layer(x)
    layer.step.data.neg_()
    assert torch.equal(layer(x), expected)


@both_layers
def test_a_layer_with_ternary_levels_starts_from_fitted_ones_and_trains_them(case):
    layer, inner, _, x = case(Nbits=2, quantizer="ternary")
    assert torch.equal(layer.levels, fit_levels(inner.weight))
    assert torch.equal(layer.quantized_weight(), TernaryLevels.apply(inner.weight, layer.levels))
    layer(x).square().sum().backward()
    assert layer.levels.grad.any() and inner.weight.grad.any()
    expected = layer(x)
    layer.levels.data.neg_()  # training cannot flip them
    assert torch.equal(layer(x), expected)
    layer.reset_step()
    assert torch.equal(layer.levels, fit_levels(inner.weight))


@both_layers
def test_resetting_fits_the_step_to_the_weight_as_it_is(case):
    layer, inner, _, _ = case(Nbits=3, quantizer="learned")
    before, parameter = layer.step.detach().clone(), layer.step
    inner.weight.data *= 2
    layer.reset_step()
    assert layer.step is parameter  # an optimizer that holds it still does
    torch.testing.assert_close(layer.step.detach(), 2 * before)


@both_layers
def test_without_bits_a_quantizer_has_no_step(case):
    layer, *_ = case(quantizer="learned")
    assert "step" not in layer.state_dict()


@both_layers
def test_another_quantizer_is_refused(case):
    with pytest.raises(
        ValueError, match="quantizer must be one of minmax, learned, ternary, got 'log'"
    ):
        case(Nbits=3, quantizer="log")


@both_layers
@pytest.mark.parametrize("bit, symmetric", [(0, False), (2, False), (4, False), (4, True)])
def test_a_layer_computes_and_differentiates_at_its_quantized_weight(case, bit, symmetric):
    layer, inner, plain, x = case(Nbits=bit, symmetric=symmetric)
    float_weight = inner.weight.detach().clone()
    plain.load_state_dict(inner.state_dict())
    plain.weight.data = STE.apply(float_weight, bit, symmetric)

    assert torch.equal(layer(x), plain(x))
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert torch.equal(inner.weight.grad, plain.weight.grad) and inner.weight.grad.any()
    assert torch.equal(inner.weight, float_weight)


def test_a_conv_has_no_bias_unless_asked():
    assert FP_Conv(3, 5, 3).conv.bias is None


def test_star_import_yields_what_notebooks_of_the_course_use():
    names = {}
    exec("from FP_layers import *", names)
    assert names["torch"] is torch and names["nn"] is nn and names["F"] is F and names["np"] is np
    assert names["math"].pi and (names["STE"], names["FP_Conv"], names["FP_Linear"]) == (
        STE,
        FP_Conv,
        FP_Linear,
    )
    assert names["device"] == torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bit, symmetric", [(2, False), (4, True)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_where_weights_are_not_checked_what_is_not_finite_stays_visible(
    monkeypatch, poison, bit, symmetric
):
    """As on a GPU and inside torch.compile; no weight but the pruned ones may come out finite."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    quantized = STE.apply(torch.tensor([0.5, poison, 0.0, -1.0]), bit, symmetric)
    assert quantized.isnan().tolist() == [True, True, False, True]
