"""Out-of-range arguments of the public functions: each error names the argument, its value and what
is allowed.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arguments import BELOW_ONE, COUNT, FRACTION, NATURAL, PERCENTAGE, RATE, check
from cifar10 import CIFAR10, hold_out
from conftest import same, state_of
from experiments import pool, records, results, run, runs
from FP_layers import STE, FP_Conv, FP_Linear, Learned, MinMax, check_n_bits, code_range
from model_file import coders
from pruning import global_prune_by_percentage, prune_by_percentage
from resnet20 import ResNet_Block, ResNetCIFAR
from train_utils import evaluate, finetune, fit, train
from training.batches import Batches
from training.distillation import Distillation
from training.execution import Execution, seconds_a_step
from training.journal import Journal
from training.recipe import Pruning, Recipe

NET = ResNetCIFAR(num_layers=8)
IMAGES, LABELS = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
DATA = CIFAR10(IMAGES, LABELS, IMAGES, LABELS)

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
ALLOWED = {"constant", "step", "cosine", "layer", "global", "best", "last", "packed", "context"}
words = st.text(max_size=8).filter(lambda word: word not in ALLOWED)
no_word = st.one_of(words, st.integers(), st.booleans(), st.just(["step"]))
no_bool = st.one_of(st.none(), st.integers(), st.floats(), words)
a_name = st.one_of(
    words.filter(lambda name: name.partition("@")[0] not in runs.RUNS),
    st.just("pretrain@0"),
    st.just("pretrain@x"),
)
no_fraction, no_percentage = outside(0, 1), outside(0, 100)
no_decay = outside(0, 1, high_is_out=True)

RECIPE = {
    "epochs": (no_count, "a positive integer"),
    "batch_size": (no_count, "a positive integer"),
    "test_every": (no_count, "a positive integer"),
    "cutout": (no_natural, "an integer >= 0"),
    "lr": (no_rate, "a finite number >= 0"),
    "weight_decay": (no_rate, "a finite number >= 0"),
    "temperature": (no_rate | st.just(0), "a finite number above 0"),
    "momentum": (no_decay, "a number from 0 to below 1"),
    "warmup": (no_decay, "a number from 0 to below 1"),
    "distill": (no_fraction, "a number from 0 to 1"),
    "nesterov": (no_bool, "True or False"),
    "schedule": (no_word, "'constant', 'step' or 'cosine'"),
}
PRUNING = {
    "method": (no_word, "None, 'layer' or 'global'"),
    "q": (no_percentage, "a percentage from 0 to 100"),
    "epochs": (no_natural, "an integer >= 0"),
    "hold_zeros": (no_bool, "True or False"),
}


def fields_of(cls, cases):
    """A case for each field of a dataclass, which checks itself when it is made."""
    return [(f"{cls.__name__} {field}", lambda value, field=field: cls(**{field: value}), field,
             *case) for field, case in cases.items()]


CASES = [
    *fields_of(Recipe, RECIPE),
    *fields_of(Pruning, PRUNING),
    ("Recipe nesterov", lambda v: Recipe(nesterov=True, momentum=v), "momentum", st.just(0.0),
     "a finite number above 0"),
    *((f"Execution {way}", lambda v, way=way: Execution(**{way: v}), way, no_bool, "True or False")
      for way in ("bf16", "compile", "graph")),
    ("Execution threads", lambda v: Execution(threads=v), "threads",
     no_count.filter(lambda value: value is not None), "a positive integer"),
    ("pool.run", lambda v: pool.run([], Path(), v), "jobs",
     no_count.filter(lambda value: value is not None), "a positive integer"),
    ("results.accuracies", lambda v: results.accuracies("pretrain", v), "which", words,
     "'best' or 'last'"),
    ("coders.encode", lambda v: coders.encode(v, [], []), "coder", words, "'context'"),
    ("temperature 0", lambda v: Recipe(temperature=v), "temperature", st.just(0), "above 0"),
    ("Recipe.rate", Recipe().rate, "progress", no_fraction, "from 0 to 1"),
    ("fit seed", lambda v: fit(NET, Recipe(epochs=1), DATA, seed=v), "seed", no_natural,
     "an integer >= 0"),
    ("Journal", lambda v: Journal(log_every_n=v), "log_every_n", no_count, "a positive integer"),
    *((f"{entry.__name__} {argument}",
       lambda v, entry=entry, argument=argument: entry(
           NET, **dict(epochs=1, batch_size=4, lr=0.1, reg=0.0, checkpoint=None) | {argument: v}),
       argument, bad, allowed)
      for entry in (train, finetune)
      for argument, bad, allowed in (
          ("epochs", no_count, "a positive integer"),
          ("batch_size", no_count, "a positive integer"),
          ("log_every_n", no_count, "a positive integer"),
          ("lr", no_rate, "a finite number >= 0"),
          ("reg", no_rate, "a finite number >= 0"))),
    ("finetune hold_zeros", lambda v: finetune(NET, 1, 4, 0.1, 0.0, checkpoint=None, hold_zeros=v),
     "hold_zeros", no_bool, "True or False"),
    ("evaluate", lambda v: evaluate(NET, DATA, v), "batch_size",
     no_count.filter(lambda value: value is not None), "a positive integer"),
    ("seconds_a_step", lambda v: seconds_a_step(NET, v), "batch_size", no_count,
     "a positive integer"),
    ("seconds_a_step steps", lambda v: seconds_a_step(NET, 4, steps=v), "steps", no_count,
     "a positive integer"),
    ("Distillation", lambda v: Distillation(NET, v), "weight", no_fraction,
     "a number from 0 to 1"),
    ("Batches", lambda v: Batches(IMAGES, LABELS, v), "batch_size", no_count,
     "a positive integer"),
    ("Batches seed", lambda v: Batches(IMAGES, LABELS, 2, seed=v), "seed", no_natural,
     "an integer >= 0"),
    ("Batches cutout", lambda v: Batches(IMAGES, LABELS, 2, cutout=v), "cutout", no_natural,
     "an integer >= 0"),
    ("Batches epoch", lambda v: Batches(IMAGES, LABELS, 2, epoch=v), "epoch", no_count,
     "a positive integer"),
    ("hold_out", lambda v: hold_out(DATA, v), "n", st.one_of(no_count, st.integers(4)),
     "an integer from 1"),
    ("prune_by_percentage", lambda v: prune_by_percentage(NET.final_fc, v), "q", no_percentage,
     "from 0 to 100"),
    ("global_prune", lambda v: global_prune_by_percentage(NET, v), "q", no_percentage,
     "from 0 to 100"),
    ("check_n_bits", check_n_bits, "Nbits", no_bits, "to 16"),
    ("check_n_bits symmetric", lambda v: check_n_bits(v, True), "Nbits",
     st.one_of(no_bits, st.just(1)), "None"),
    ("symmetric", lambda v: check_n_bits(4, v), "symmetric", no_bool, "True or False"),
    ("code_range", code_range, "Nbits", st.one_of(no_bits, st.sampled_from([None, 0, 1])),
     "to 16"),
    ("STE", lambda v: STE.apply(torch.ones(2), v), "Nbits", no_bits, "to 16"),
    ("MinMax", MinMax, "Nbits", no_bits, "to 16"),
    ("Learned", Learned, "Nbits", st.one_of(no_bits, st.sampled_from([None, 0, 1])), "to 16"),
    ("FP_Conv", lambda v: FP_Conv(1, 1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("FP_Linear", lambda v: FP_Linear(1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("Nbits", lambda v: setattr(NET.final_fc, "Nbits", v), "Nbits", no_bits, "to 16"),
    ("quantizer", lambda v: FP_Conv(1, 1, 1, quantizer=v), "quantizer", words, "MinMax, Learned"),
    ("learned", lambda v: FP_Linear(1, 1, Nbits=v, quantizer=Learned), "Nbits",
     st.sampled_from([0, 1]), "2 to 16"),
    ("ResNet_Block", lambda v: ResNet_Block(1, 1, 1, Nbits=v), "Nbits", no_bits, "to 16"),
    ("ResNetCIFAR", lambda v: ResNetCIFAR(8, Nbits=v), "Nbits", no_bits, "to 16"),
    ("num_layers", ResNetCIFAR, "num_layers",
     st.one_of(no_integer, st.integers(max_value=7), st.integers(8).filter(lambda n: n % 6 != 2)),
     "6n + 2"),
    *((f"experiments.{function.__name__}", function, "name", a_name, "must be one of teacher")
      for function in (runs.get, run.build, run.train_run, run.load_or_train,
                       records.read_record, records.weights_path, records.not_trained)),
]


@settings(max_examples=25)
@pytest.mark.parametrize(
    "call, argument, bad, allowed", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
@given(data=st.data())
def test_a_bad_argument_is_refused_with_its_name_its_value_and_what_is_allowed(
    call, argument, bad, allowed, data
):
    value = data.draw(bad)
    before = state_of(NET)
    with pytest.raises((ValueError, TypeError)) as caught:
        call(value)
    message = str(caught.value)
    assert message.startswith(argument) and allowed in message and repr(value) in message
    assert same(NET.state_dict(), before)


@settings(max_examples=25)
@given(bits=st.integers(0, 16), symmetric=st.booleans())
def test_every_allowed_width_is_taken(bits, symmetric):
    if not (symmetric and bits == 1):
        assert check_n_bits(bits, symmetric) == bits
        assert torch.isfinite(STE.apply(torch.tensor([-1.0, 0.0, 2.0]), bits, symmetric)).all()


@settings(max_examples=50)
@given(schedule=st.sampled_from(["constant", "step", "cosine"]), progress=st.floats(0, 1),
       warmup=st.floats(0, 1, exclude_max=True))
def test_a_rate_is_never_above_its_peak_nor_below_zero(schedule, progress, warmup):
    assert 0 <= Recipe(schedule=schedule, warmup=warmup).rate(progress) <= 1 + 1e-12


# ---------------------------------------------------------------- the checker


@pytest.mark.parametrize("allowed, good", [
    (COUNT, [1, 7, np.int64(3)]), (NATURAL, [0, 7]), (RATE, [0, 0.0, 1e30]),
    (BELOW_ONE, [0, 0.5, math.nextafter(1, 0)]), (FRACTION, [0, 0.5, 1, 1.0]),
    (PERCENTAGE, [0, 33.3, 100]), ((True, False), [True, False]), ((None, "a", 2), [None, "a", 2]),
])
def test_what_is_allowed_is_taken(allowed, good):
    for value in good:
        check(allowed, argument=value)


@pytest.mark.parametrize("allowed, value, complaint", [
    ((True, False), 1, "b must be True or False, got 1"),
    ((True, False), 0.0, "b must be True or False, got 0.0"),
    ((0, 1), True, "b must be 0 or 1, got True"),
    (("a", "b", "c"), "d", "b must be 'a', 'b' or 'c', got 'd'"),
    ((None, "a"), "None", "b must be None or 'a', got 'None'"),
    (COUNT, 0, "b must be a positive integer, got 0"),
    (FRACTION, math.nan, "b must be a number from 0 to 1, got nan"),
    (RATE, -math.inf, "b must be a finite number >= 0, got -inf"),
])
def test_the_first_argument_that_is_not_is_named(allowed, value, complaint):
    good = allowed[0] if isinstance(allowed, tuple) else 1
    with pytest.raises(ValueError) as caught:
        check(allowed, a=good, b=value, c=value)
    assert str(caught.value) == complaint
