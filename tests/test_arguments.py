"""Out-of-range arguments of the public functions: each error names the argument, its value and what
is allowed.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cifar10
import experiments
from FP_layers import STE, FP_Conv, FP_Linear, check_n_bits, code_range
from pruning import DynamicPruning, global_prune_by_percentage, prune_by_percentage
from resnet20 import ResNet_Block, ResNetCIFAR
from train_utils import SoftTargets, evaluate, finetune, fit, learning_rate, train, training_speed

NET = ResNetCIFAR(num_layers=8)
IMAGES, LABELS = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
DATA = cifar10.CIFAR10(IMAGES, LABELS, IMAGES, LABELS)

no_number = st.one_of(
    st.none(), st.text(max_size=3), st.booleans(), st.just([1]), st.complex_numbers(max_magnitude=2)
)
no_integer = st.one_of(no_number, st.floats())
no_count = st.one_of(no_integer, st.integers(max_value=0))
no_natural = st.one_of(no_integer, st.integers(max_value=-1))
no_rate = st.one_of(
    no_number, st.floats(max_value=0, exclude_max=True), st.just(math.nan), st.just(math.inf)
)


def outside(low, high, high_is_out=False):
    """Numbers below low or above high, and what is no number."""
    return st.one_of(no_number, st.floats(max_value=low, exclude_max=True), st.just(math.nan),
                     st.floats(min_value=high, exclude_min=not high_is_out))


no_bits = st.one_of(
    no_integer.filter(lambda value: value is not None), st.integers(max_value=-1), st.integers(17)
)
# Hypothesis tries strings of the source too
ALLOWED = {"constant", "step", "cosine", "minmax", "learned", "ternary"}
words = st.text(max_size=8).filter(lambda word: word not in ALLOWED)
a_name = st.one_of(
    words.filter(lambda name: name.partition("@")[0] not in experiments.RUNS),
    st.just("pretrain@0"),
    st.just("pretrain@x"),
)


def fitting(argument):
    good = dict(epochs=1, batch_size=4, lr=0.1, weight_decay=0.0, data=DATA)
    return lambda value: fit(NET, **good | {argument: value})


FIT = {
    "epochs": (no_count, "a positive integer"),
    "batch_size": (no_count, "a positive integer"),
    "test_every": (no_count, "a positive integer"),
    "log_every_n": (no_count, "a positive integer"),
    "best_from": (no_count, "a positive integer"),
    "hold_zeros_from": (no_count.filter(lambda value: value is not None), "a positive integer"),
    "seed": (no_natural, "an integer >= 0"),
    "lr": (no_rate, "a finite number >= 0"),
    "weight_decay": (no_rate, "a finite number >= 0"),
    "momentum": (outside(0, 1, high_is_out=True), "a number from 0 to below 1"),
    "warmup": (outside(0, 1, high_is_out=True), "a number from 0 to below 1"),
    "label_smoothing": (outside(0, 1), "a number from 0 to 1"),
    "distill": (outside(0, 1), "a number from 0 to 1"),
    "schedule": (words, "'constant', 'step' or 'cosine'"),
}
CASES = [
    (f"fit {argument}", fitting(argument), argument, *case) for argument, case in FIT.items()
] + [
    (
        "train epochs",
        lambda v: train(NET, v, 4, 0.1, 0.0, checkpoint=None),
        "epochs",
        no_count,
        "a positive integer",
    ),
    (
        "train reg",
        lambda v: train(NET, 1, 4, 0.1, v, checkpoint=None),
        "reg",
        no_rate,
        "a finite number >= 0",
    ),
    (
        "finetune lr",
        lambda v: finetune(NET, 1, 4, v, 0.0, checkpoint=None),
        "lr",
        no_rate,
        "a finite number >= 0",
    ),
    (
        "finetune reg",
        lambda v: finetune(NET, 1, 4, 0.1, v, checkpoint=None),
        "reg",
        no_rate,
        "a finite number >= 0",
    ),
    (
        "evaluate",
        lambda v: evaluate(NET, DATA, v),
        "batch_size",
        no_count.filter(lambda value: value is not None),
        "a positive integer",
    ),
    (
        "training_speed",
        lambda v: training_speed(NET, v),
        "batch_size",
        no_count,
        "a positive integer",
    ),
    (
        "training_speed steps",
        lambda v: training_speed(NET, 4, v),
        "steps",
        no_count,
        "a positive integer",
    ),
    (
        "SoftTargets",
        lambda v: SoftTargets([], NET, v),
        "weight",
        outside(0, 1),
        "a number from 0 to 1",
    ),
    (
        "learning_rate schedule",
        lambda v: learning_rate(v, 0.1, 0.0, 0.5),
        "schedule",
        words,
        "'constant', 'step'",
    ),
    (
        "learning_rate progress",
        lambda v: learning_rate("step", 0.1, v),
        "progress",
        outside(0, 1),
        "from 0 to 1",
    ),
    (
        "learning_rate warmup",
        lambda v: learning_rate("cosine", 0.1, 0.5, v),
        "warmup",
        outside(0, 1, high_is_out=True),
        "a number from 0 to below 1",
    ),
    (
        "Batches",
        lambda v: cifar10.Batches(IMAGES, LABELS, v),
        "batch_size",
        no_count,
        "a positive integer",
    ),
    (
        "Batches seed",
        lambda v: cifar10.Batches(IMAGES, LABELS, 2, seed=v),
        "seed",
        no_natural,
        "an integer >= 0",
    ),
    (
        "random_crop_flip",
        lambda v: cifar10.random_crop_flip(IMAGES, torch.Generator(), v),
        "padding",
        no_natural,
        "an integer >= 0",
    ),
    (
        "hold_out",
        lambda v: cifar10.hold_out(DATA, v),
        "n",
        st.one_of(no_count, st.integers(4)),
        "an integer from 1",
    ),
    (
        "prune_by_percentage",
        lambda v: prune_by_percentage(NET.final_fc, v),
        "q",
        outside(0, 100),
        "from 0 to 100",
    ),
    (
        "global_prune",
        lambda v: global_prune_by_percentage(NET, v),
        "q",
        outside(0, 100),
        "from 0 to 100",
    ),
    ("DynamicPruning", lambda v: DynamicPruning(NET, v), "q", outside(0, 100), "from 0 to 100"),
    (
        "DynamicPruning every",
        lambda v: DynamicPruning(NET, 70.0, v),
        "every",
        no_count,
        "a positive integer",
    ),
    (
        "fit average",
        lambda v: fit(NET, epochs=1, batch_size=4, lr=0.1, weight_decay=0.0, average=v),
        "average",
        outside(0, 1, high_is_out=True),
        "a number from 0 to below 1",
    ),
    ("check_n_bits", check_n_bits, "Nbits", no_bits, "to 16"),
    (
        "check_n_bits symmetric",
        lambda v: check_n_bits(v, True),
        "Nbits",
        st.one_of(no_bits, st.just(1)),
        "None",
    ),
    (
        "symmetric",
        lambda v: check_n_bits(4, v),
        "symmetric",
        st.one_of(st.none(), st.integers(), st.floats(), words),
        "True or False",
    ),
    ("code_range", code_range, "Nbits", st.one_of(no_bits, st.sampled_from([None, 0, 1])), "to 16"),
    ("STE", lambda v: STE.apply(torch.ones(2), v), "Nbits", no_bits, "to 16"),
    ("FP_Conv", lambda v: FP_Conv(1, 1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("FP_Linear", lambda v: FP_Linear(1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("quantizer", lambda v: FP_Conv(1, 1, 1, quantizer=v), "quantizer", words, "minmax, learned"),
    (
        "ternary",
        lambda v: FP_Linear(1, 1, Nbits=v, quantizer="ternary"),
        "Nbits",
        st.sampled_from([0, 1, 3, 16]),
        "2",
    ),
    ("ResNet_Block", lambda v: ResNet_Block(1, 1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("ResNetCIFAR", lambda v: ResNetCIFAR(8, Nbits=v), "Nbits", no_bits, "to 16"),
    (
        "num_layers",
        ResNetCIFAR,
        "num_layers",
        st.one_of(
            no_integer, st.integers(max_value=7), st.integers(8).filter(lambda n: n % 6 != 2)
        ),
        "6n + 2",
    ),
    *(
        (f"experiments.{function.__name__}", function, "name", a_name, "must be one of pretrain")
        for function in (
            experiments.get,
            experiments.build,
            experiments.read_record,
            experiments.train_run,
            experiments.load_or_train,
            experiments.is_available,
            experiments.not_trained,
        )
    ),
]


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize(
    "call, argument, bad, allowed", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
@given(data=st.data())
def test_a_bad_argument_is_refused_with_its_name_its_value_and_what_is_allowed(
    call, argument, bad, allowed, data
):
    value = data.draw(bad)
    before = {name: tensor.clone() for name, tensor in NET.state_dict().items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        call(value)
    message = str(caught.value)
    assert message.startswith(argument) and allowed in message and repr(value) in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in NET.state_dict().items())


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(0, 16), symmetric=st.booleans())
def test_every_allowed_width_is_taken(bits, symmetric):
    if not (symmetric and bits == 1):
        assert check_n_bits(bits, symmetric) == bits
        assert torch.isfinite(STE.apply(torch.tensor([-1.0, 0.0, 2.0]), bits, symmetric)).all()


@settings(max_examples=50, deadline=None)
@given(schedule=st.sampled_from(["constant", "step", "cosine"]), progress=st.floats(0, 1),
       warmup=st.floats(0, 1, exclude_max=True), peak=st.floats(0, 10))
def test_a_learning_rate_is_never_above_its_peak_nor_below_zero(schedule, progress, warmup, peak):
    assert 0 <= learning_rate(schedule, peak, progress, warmup) <= peak * (1 + 1e-12)
