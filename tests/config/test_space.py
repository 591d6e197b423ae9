"""The points of a sweep: how ranges are read, what is refused, and how a space is filled."""

import pytest

from gptcli.config import load_config
from gptcli.config.space import n_points, point, read_space
from gptcli.errors import ConfigError

BASE = load_config(None, ["model.n_head=2", "model.n_embd=32", "model.n_layer=2"])


def test_ranges_and_choices_are_read_with_the_types_of_their_keys() -> None:
    words = ["optim.lr=1e-3..1e-2:log", "model.n_layer=1..4", "optim.weight_decay=0..1",
             "optim.schedule=cosine,wsd", "model.n_kv_head=null,1"]  # fmt: skip
    space = read_space(words, BASE)
    points = [point(space, 7, number) for number in range(64)]
    rates = sorted(float(one["optim.lr"] or 0) for one in points)
    assert 1e-3 <= rates[0] and rates[-1] <= 1e-2
    assert 28 <= sum(rate < 10**-2.5 for rate in rates) <= 36  # half of the decade
    layers = [one["model.n_layer"] for one in points]
    assert all(type(one) is int for one in layers)
    assert all(12 <= layers.count(wanted) <= 20 for wanted in (1, 2, 3, 4))
    assert all(type(one["optim.weight_decay"]) is float for one in points)
    assert {one["optim.schedule"] for one in points} == {"cosine", "wsd"}
    assert {one["model.n_kv_head"] for one in points} == {None, 1}


def test_a_point_depends_on_the_seed_and_its_number_alone() -> None:
    space = read_space(["optim.lr=1e-3..1e-2", "model.n_layer=1,2,3"], BASE)
    assert point(space, 1, 5) == point(space, 1, 5) != point(space, 2, 5)
    assert n_points(space, None) == 20 and n_points(space, 7) == 7


def test_choices_alone_are_a_grid_in_random_order() -> None:
    space = read_space(["model.n_layer=1,2,3", "optim.name=adamw,muon"], BASE)
    assert n_points(space, None) == n_points(space, 50) == 6 and n_points(space, 4) == 4
    for seed in (1, 2):
        found = [tuple(point(space, seed, number).values()) for number in range(6)]
        assert len(set(found)) == 6
    assert found != [tuple(point(space, 1, number).values()) for number in range(6)]


def test_a_value_that_fits_only_another_swept_one_is_no_error() -> None:
    assert read_space(["model.n_embd=30,32", "model.n_head=3,4"], BASE)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.lr", "expected KEY=A,B or KEY=LO..HI"),
        ("optim.lr=1e-3", "two or more values"),
        ("optim.rate=1e-3,1e-2", "optim.rate=0.001: unknown key 'optim.rate'; did you mean"),
        ("optim.lr=1e-3,fast", 'optim.lr="fast": optim.lr: expected a number'),
        ("optim.lr=0..1e-2", "optim.lr=0: optim.lr: expected a value above 0"),
        ("optim.weight_decay=0..1:log", "above 0, the smaller first"),
        ("model.n_layer=4..2", "the smaller first"),
        ("model.n_layer=1.5..3", "model.n_layer=1.5: model.n_layer: expected a whole number"),
        ("optim.schedule=a..b", "expected two numbers"),
        ("train.freeze=[wte],[wpe]", "two or more values"),
        ("seed=1,2", "keep their data, evaluation windows and seeds"),
        ("data.seq_len=8,16", "keep their data"),
        ("model=1,2", "model: expected a section"),
        ("optim.lr=1e-3,2e-3,0.001", "one of these values is given twice"),
        ("optim.lr=.nan,1", "optim.lr: expected a number, got 'nan'"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(word: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_space([word], BASE)
    assert told in refused.value.message


def test_a_key_is_swept_once_and_a_grid_has_an_end() -> None:
    with pytest.raises(ConfigError, match="twice"):
        read_space(["optim.lr=1e-3,1e-2", "optim.lr=1..2"], BASE)
    many = ",".join(f"{n / 1000}" for n in range(1, 102))
    wide = read_space([f"optim.beta1={many}", f"optim.beta2={many}"], BASE)
    with pytest.raises(ConfigError, match="10,201 combinations"):
        n_points(wide, None)
