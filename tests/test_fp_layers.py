"""The quantizers against torch.fake_quantize_per_tensor_affine, and their properties."""

import copy
import io
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import FP_layers
from conftest import same, state_of
from FP_layers import (
    STE, FP_Conv, FP_Linear, Learned, LearnedStep, MinMax, check_n_bits, code_range, fit_step,
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


@pytest.mark.parametrize("bit, error", [("4", TypeError), (17, ValueError)])
def test_a_type_and_a_value_are_told_apart(bit, error):
    with pytest.raises(error, match="Nbits must be None"):
        check_n_bits(bit)


def test_symmetric_must_be_a_bool():
    with pytest.raises(TypeError, match="symmetric must be True or False, got 'yes'"):
        STE.apply(torch.ones(2), 4, "yes")


def test_any_integer_type_counts_bits():
    assert check_n_bits(np.int64(4)) == 4 and type(check_n_bits(np.int64(4))) is int
    assert MinMax(4, np.True_).symmetric is Learned(4, np.True_).symmetric is True


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


@pytest.mark.parametrize("lowest, highest", RANGES)
def test_a_weight_at_an_end_of_the_range_is_inside(lowest, highest):
    w = (0.25 * torch.tensor([lowest - 0.25, lowest, highest, highest + 0.25])).requires_grad_()
    step = torch.tensor([0.25], requires_grad=True)
    LearnedStep.apply(w, step, lowest, highest).sum().backward()
    assert w.grad.tolist() == [0, 1, 1, 0]
    assert step.grad.item() == pytest.approx((lowest + highest) / (4 * highest) ** 0.5)


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
        codes = (row / step).round().clamp(lowest, highest)  # for them, no step is better
        torch.testing.assert_close(step, (row @ codes) / (codes @ codes), rtol=1e-12, atol=0)


def test_fitting_recovers_a_grid_exactly_and_survives_zeros():
    codes = torch.tensor([[-1.0, 0, 1, 1], [0, 0, 0, 0]])
    assert torch.allclose(fit_step(codes * 0.37, -1, 1), torch.tensor([[0.37], [1.0]]))


@pytest.mark.parametrize("sign", [-1, 1])
def test_fitting_of_weights_of_one_sign_and_zeros(sign):
    w = sign * torch.tensor([[0.5, 0.0, 0.5, 0.0]])
    assert fit_step(w, -1, 1).item() == 0.5


def test_a_fitted_step_is_no_part_of_the_graph():
    assert not fit_step(torch.ones(2, 3, requires_grad=True), -2, 1).requires_grad


def test_fitting_survives_weights_that_a_step_can_hardly_tell_from_zero():
    step = fit_step(torch.tensor([[1e-45, 0.0], [0.0, -1e-38]]), -4, 3)
    assert torch.isfinite(step).all() and (step > 0).all()


def test_a_fitted_step_is_positive_and_near_though_the_largest_weight_is_far_off():
    """A negative step would fit better: it has the code for 1.4 = -2 * -0.7."""
    w = torch.tensor([-0.7, 0.7, 1.4]).repeat(20_000)
    step = fit_step(torch.cat([w, torch.tensor([100.0])]).view(1, -1), -2, 1).item()
    search = torch.linspace(0.05, 2, 400)
    errors = [(w - (w / s).round().clamp(-2, 1) * s).square().sum() for s in (step, *search)]
    assert step > 0 and errors[0] <= 1.05 * min(errors)


# ---------------------------------------------------------------- layers


def layer_name(inner):
    return "conv" if isinstance(inner, nn.Conv2d) else "linear"


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
    layer, inner, _, x = case(Nbits=bit, symmetric=symmetric, quantizer=Learned)
    step = dict(layer.named_parameters())["quantizer.step"]
    assert step is layer.quantizer.step
    assert step.shape == (len(inner.weight), *[1] * (inner.weight.dim() - 1))
    assert torch.equal(step, fit_step(inner.weight, *code_range(bit, symmetric)))
    expected = LearnedStep.apply(inner.weight, step, *code_range(bit, symmetric))
    assert torch.equal(layer.quantized_weight(), expected)
    layer(x).square().sum().backward()
    assert step.grad.any() and inner.weight.grad.any()


@both_layers
def test_a_step_that_training_made_negative_still_works_by_its_size(case):
    layer, _, _, x = case(Nbits=3, quantizer=Learned)
    expected = layer(x)
    layer.quantizer.step.data.neg_()
    assert torch.equal(layer(x), expected)


@both_layers
def test_a_step_that_training_made_zero_still_yields_finite_weights(case):
    layer, _, _, x = case(Nbits=3, quantizer=Learned)
    layer.quantizer.step.data.zero_()
    assert (layer.quantizer.positive_step() == torch.finfo(torch.float32).tiny).all()
    assert torch.isfinite(layer(x)).all()


@both_layers
def test_fitting_again_fits_the_step_to_the_weight_as_it_is(case):
    layer, inner, _, _ = case(Nbits=3, quantizer=Learned)
    before, parameter = layer.quantizer.step.detach().clone(), layer.quantizer.step
    inner.weight.data *= 2
    layer.fit_quantizer()
    assert layer.quantizer.step is parameter  # an optimizer that holds it still does
    torch.testing.assert_close(layer.quantizer.step.detach(), 2 * before)


@both_layers
@pytest.mark.parametrize("bit, quantizer", [(None, Learned), (None, MinMax), (3, MinMax)])
def test_fitting_where_nothing_is_learned_changes_nothing(case, bit, quantizer):
    layer, _, _, x = case(Nbits=bit, quantizer=quantizer)
    expected, before = layer(x), state_of(layer)
    layer.fit_quantizer()
    assert torch.equal(layer(x), expected)
    assert same(layer.state_dict(), before)


@both_layers
@pytest.mark.parametrize("options", [dict(quantizer=Learned), dict(Nbits=3)], ids=str)
def test_only_a_learned_step_is_in_the_state(case, options):
    layer, *_ = case(**options)
    assert not any("quantizer" in name for name in layer.state_dict())


@both_layers
@pytest.mark.parametrize("bad", ["learned", "minmax", None, 3, MinMax(4)])
@pytest.mark.parametrize("bit", [None, 3])
def test_a_quantizer_that_is_no_class_is_refused(case, bad, bit):
    with pytest.raises(TypeError, match="quantizer must be MinMax, Learned or a class, got "
                       + re.escape(repr(bad))):
        case(Nbits=bit, quantizer=bad)


@both_layers
@pytest.mark.parametrize("quantizer", [MinMax, Learned])
def test_without_bits_no_quantizer_is_called(case, quantizer, monkeypatch):
    def called(*_):
        raise AssertionError("a quantizer was called")

    layer, inner, _, x = case(quantizer=quantizer)
    monkeypatch.setattr(STE, "apply", called)
    monkeypatch.setattr(LearnedStep, "apply", called)
    assert layer.Nbits is None and layer.quantizer is None
    assert layer.quantized_weight() is inner.weight and layer.weight is inner.weight
    assert torch.isfinite(layer(x)).all()
    layer.Nbits = 4
    with pytest.raises(AssertionError):  # so the line before could have failed
        layer(x)


# ---------------------------------------------------------------- Nbits set later, copies, states


@both_layers
@pytest.mark.parametrize("before", [None, 2, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bits_set_later_are_as_good_as_bits_at_construction(case, before, symmetric):
    for quantizer, after in ((MinMax, (None, 0, 3, 8)), (Learned, (None, 3, 8))):
        for bit in after:
            layer, inner, _, x = case(Nbits=before, symmetric=symmetric, quantizer=quantizer)
            inner.weight.data *= 1.5  # what is learned is fitted to the weight as it is
            layer.Nbits = bit
            anew, other, *_ = case(Nbits=bit, symmetric=symmetric, quantizer=quantizer)
            other.load_state_dict(inner.state_dict())
            anew.fit_quantizer()
            assert layer.Nbits == bit
            assert layer.state_dict().keys() == anew.state_dict().keys()
            assert torch.equal(layer(x), anew(x))


@both_layers
@pytest.mark.parametrize("bit, symmetric", [(2, True), (4, False), (np.int64(8), True)])
def test_bits_set_on_a_learned_layer_give_a_fitted_quantizer_of_that_width(case, bit, symmetric):
    layer, inner, _, x = case(Nbits=3, symmetric=symmetric, quantizer=Learned)
    layer.Nbits = bit
    limits = code_range(bit, symmetric)
    assert type(layer.quantizer) is Learned and type(layer.Nbits) is int and layer.Nbits == bit
    assert layer.quantizer.symmetric is symmetric and layer.quantizer.limits == limits
    assert torch.equal(layer.quantizer.step, fit_step(inner.weight, *limits))
    expected = LearnedStep.apply(inner.weight, fit_step(inner.weight, *limits), *limits)
    assert torch.equal(layer.quantized_weight(), expected)
    layer(x).square().sum().backward()
    assert layer.quantizer.step.grad.any()


@both_layers
@pytest.mark.parametrize("quantizer, symmetric, bad, error", [
    (Learned, False, 0, ValueError), (Learned, False, 1, ValueError),
    (Learned, True, 1, ValueError), (Learned, False, 17, ValueError),
    (Learned, False, "4", TypeError), (MinMax, False, -1, ValueError),
    (MinMax, True, 1, ValueError), (MinMax, False, 4.0, TypeError),
])
@pytest.mark.parametrize("before", [None, 3])
def test_bits_that_are_refused_leave_the_layer_as_it_was(
    case, before, quantizer, symmetric, bad, error
):
    layer, _, _, x = case(Nbits=before, symmetric=symmetric, quantizer=quantizer)
    kept, expected = layer.quantizer, layer(x)
    state = state_of(layer)
    with pytest.raises(error, match="Nbits must be") as caught:
        layer.Nbits = bad
    assert str(bad) in str(caught.value)
    assert layer.quantizer is kept and layer.Nbits == before
    assert torch.equal(layer(x), expected) and same(layer.state_dict(), state)


@both_layers
def test_a_deep_copy_of_a_learned_layer_is_equal_and_its_own(case):
    layer, inner, _, x = case(Nbits=3, symmetric=True, quantizer=Learned)
    layer.quantizer.step.data *= 1.1  # no longer the fitted one
    twin, expected = copy.deepcopy(layer), layer(x)
    assert torch.equal(twin(x), expected) and twin.quantizer.limits == (-3, 3)
    twin.quantizer.step.data *= 2
    twin.weight.data.zero_()
    assert torch.equal(layer(x), expected)
    twin.Nbits = 2
    assert layer.Nbits == 3 and type(twin.quantizer) is Learned and twin.quantizer.symmetric


@both_layers
def test_the_state_of_a_learned_layer_goes_there_and_back(case):
    layer, inner, _, x = case(Nbits=3, quantizer=Learned)
    layer.quantizer.step.data *= 1.1
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other, *_ = case(Nbits=3, quantizer=Learned)
    other.weight.data.neg_()
    assert not torch.equal(other(x), layer(x))
    state = torch.load(buffer, weights_only=True)
    assert state.keys() == {f"{layer_name(inner)}.weight", f"{layer_name(inner)}.bias",
                            "quantizer.step"}
    other.load_state_dict(state)  # strict
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="quantizer.step"):  # no step, no other shape, no extra
        other.load_state_dict({k: v for k, v in state.items() if k != "quantizer.step"})
    with pytest.raises(RuntimeError, match="quantizer.step"):
        case()[0].load_state_dict(state)


@pytest.mark.parametrize("quantizer, text", [(MinMax, "MinMax"), (Learned, "Learned")])
def test_a_layer_shows_how_it_quantizes(quantizer, text):
    shown = repr(FP_Conv(3, 5, 3, Nbits=4, symmetric=True, quantizer=quantizer))
    assert f"Nbits=4, symmetric=True, quantizer={text}" in shown
    assert ("(quantizer): Learned" in shown) == (quantizer is Learned)


# ---------------------------------------------------------------- what layers compute


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


def test_a_conv_has_no_bias_stride_or_padding_unless_asked():
    layer, x = FP_Conv(3, 5, 3), torch.randn(2, 3, 7, 7)
    assert layer.conv.bias is None
    assert torch.equal(layer(x), F.conv2d(x, layer.conv.weight))


def test_levels_are_not_symmetric_unless_asked():
    assert check_n_bits(1) == 1  # which no symmetric grid has
    w = pruned_weights(0)
    assert torch.equal(MinMax(3)(w), STE.apply(w, 3, False))
    assert Learned(3).limits == code_range(3) == (-4, 3) and not Learned(3).symmetric
    for layer in (FP_Linear(6, 4, Nbits=3), FP_Conv(3, 5, 3, Nbits=3)):
        assert torch.equal(layer.quantized_weight(), STE.apply(layer.weight, 3, False))
    for layer in (FP_Linear(6, 4, Nbits=3, quantizer=Learned),
                  FP_Conv(3, 5, 3, Nbits=3, quantizer=Learned)):
        assert layer.quantizer.limits == (-4, 3)


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
    for other in ("devic", "devices", "DEVICE"):
        with pytest.raises(AttributeError, match=f"'FP_layers' has no attribute '{other}'"):
            getattr(FP_layers, other)


@pytest.mark.parametrize("bit, symmetric", [(2, False), (4, True)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_where_weights_are_not_checked_what_is_not_finite_stays_visible(
    monkeypatch, poison, bit, symmetric
):
    """As on a GPU and inside torch.compile; no weight but the pruned ones may come out finite."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    quantized = STE.apply(torch.tensor([0.5, poison, 0.0, -1.0]), bit, symmetric)
    assert quantized.isnan().tolist() == [True, True, False, True]
