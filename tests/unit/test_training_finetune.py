"""Fine-tuning without a network that learns: what is made smaller, what comes when, what is kept."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigurationError
from processors.embedding.checkpoint import read_state, write_safetensors
from processors.training.batches import COPIES_EACH, Batching, batches, held_out_samples, split
from processors.training.edits import Edit
from processors.training.labelled import LabelledPicture
from processors.training.losses import copy_objective, entropy_term, group_objective
from processors.training.ranking import NOBODY
from processors.training.run_state import STATE_FILE, Progressed, read_run, write_run
from processors.training.trainer import Device, Hardware, TrainingPrecision, freeze, hardware, rate_at

EDITS = (Edit.CROP, Edit.JPEG, Edit.FLIP)


def by(*, copies: bool, **given: int) -> Batching:
    chosen = {"seed": 3, "at_once": 2, "batch_size": 8, "of_a_group": 2, **given}
    return Batching(copies=copies, edits=EDITS, **chosen)


def pictures(groups: str) -> tuple[list[LabelledPicture], list[bytes]]:
    """A letter for each picture's group, a dot for none; all of different bytes."""
    made = [LabelledPicture(Path(f"{number}.jpg"), None if name == "." else name) for number, name in enumerate(groups)]
    return made, [f"digest {number}".encode() for number in range(len(made))]


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def test_the_entropy_term_by_hand() -> None:
    """On a circle: to the nearest of the other group it is 60° from three of them, and 120° from the one at 180°."""
    vectors, groups = on_circle(0, 180, 60, 300), torch.tensor([1, 1, 2, 2])
    # The chord of 60° is 1, whose logarithm is 0.
    by_hand = -math.log(math.sqrt(3)) / 4
    assert float(entropy_term(vectors, groups)) == pytest.approx(by_hand)
    assert float(entropy_term(vectors, torch.zeros(4))) == 0.0


def test_equal_vectors_of_two_groups_have_a_gradient() -> None:
    vectors = on_circle(10, 10, 90).requires_grad_()
    entropy_term(vectors, torch.tensor([1, 2, 3])).backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None and vectors.grad.isfinite().all()


def test_the_objective_of_copies_by_hand() -> None:
    """InfoNCE: each vector's pair against the two of the other picture, here all at right angles to it or opposite."""
    vectors, groups = on_circle(0, 0, 90, 90), torch.tensor([1, 1, 2, 2])
    each = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2 * math.exp(0)))
    assert float(copy_objective(0.5, 0.0)(vectors, groups)) == pytest.approx(each, abs=1e-6)
    assert float(copy_objective(0.5, 3.0)(vectors, groups)) == pytest.approx(each - 3.0 * math.log(math.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_objective_of_groups_is_less_for_what_is_grouped_well(weight: float) -> None:
    groups, objective = torch.tensor([1, 1, 2, 2]), group_objective(weight)
    assert float(objective(on_circle(0, 5, 170, 180), groups)) < float(objective(on_circle(0, 90, 5, 100), groups))


def test_groups_are_held_out_whole_and_the_same_bytes_count_once() -> None:
    given, digests = pictures("aaabbcccddeeq..")
    digests[1] = digests[0]
    apart = split(given, digests, 0.4, copies=False, seed=1)
    of_training, of_held_out = ({one.group for one in part} for part in (apart.training, apart.held_out))
    assert len(of_held_out) == 2 and len(of_training) == 3 and not of_training & of_held_out
    # What has no other of its group is in the way of those that are looked for.
    assert sorted(one.picture.path.name for one in apart.in_the_way) == ["12.jpg", "13.jpg", "14.jpg"]
    assert len(apart.training) + len(apart.held_out) == 11
    assert split(given, digests, 0.4, copies=False, seed=1) == apart
    assert any(split(given, digests, 0.4, copies=False, seed=seed) != apart for seed in range(2, 9))


def test_without_labels_each_picture_is_a_group() -> None:
    given, digests = pictures("aab.....")
    apart = split(given, digests, 0.25, copies=True, seed=1)
    assert len(apart.held_out) == 2 and len(apart.training) == 6 and apart.in_the_way == apart.training
    asked = held_out_samples(apart, by(copies=True))
    assert len(asked.queries) == 2 * COPIES_EACH and len(set(asked.queries)) == len(asked.queries)
    assert all(len(query.edits) == 2 for query in asked.queries) and set(asked.own) == {NOBODY}
    # Two that could not be read are missing: a query still knows which reference is right.
    truth = asked.truth([0, COPIES_EACH], [1, 2])
    assert truth.query_groups.tolist() == [apart.held_out[0].group, apart.held_out[1].group]
    assert truth.reference_groups.tolist() == [apart.held_out[1].group, apart.training[0].group]


def test_a_held_out_picture_of_a_group_never_finds_itself() -> None:
    given, digests = pictures("aabbcc.")
    asked = held_out_samples(split(given, digests, 0.3, copies=False, seed=1), by(copies=False))
    assert asked.own == [0, 1] and len(asked.references) == 3
    truth = asked.truth([1], [1, 2])
    assert truth.own.tolist() == [0]


@pytest.mark.parametrize(("groups", "copies"), [("aabb", False), ("abcdef", False), ("..", True)])
def test_too_little_is_said(groups: str, copies: bool) -> None:
    given, digests = pictures(groups)
    with pytest.raises(ConfigurationError, match="too little to learn from"):
        split(given, digests, 0.5, copies=copies, seed=1)


def test_batches_of_copies_are_pairs_of_unlike_copies() -> None:
    given, digests = pictures("." * 13)
    training = split(given, digests, 0.2, copies=True, seed=1).training
    epochs = [batches(training, by(copies=True), epoch) for epoch in range(3)]
    for made in epochs:
        assert [len(batch.samples) for batch in made] == [8, 8]
        for batch in made:
            assert set(Counter(batch.groups).values()) == {2}
            assert all(1 <= len(sample.edits) <= 2 for sample in batch.samples)
    drawn = Counter((sample.picture.path, sample.draw) for made in epochs for batch in made for sample in batch.samples)
    assert set(drawn.values()) == {1} and 0 not in {draw for _, draw in drawn}
    assert epochs[0] != epochs[1] and batches(training, by(copies=True), 1) == epochs[1]
    # Fewer pictures than a batch has room for are one batch.
    assert [len(batch.samples) for batch in batches(training[:3], by(copies=True), 0)] == [6]


def test_batches_of_groups_have_so_many_of_each_and_are_the_same_again() -> None:
    given, digests = pictures("aaaabbbbbccddeeff")
    training = split(given, digests, 0.2, copies=False, seed=1).training
    epochs = [batches(training, by(copies=False), epoch) for epoch in range(4)]
    for made in epochs:
        for batch in made:
            assert set(Counter(batch.groups).values()) == {2} and len(batch.groups) == 8
    assert batches(training, by(copies=False), 2) == epochs[2] and len({str(made) for made in epochs}) == 4
    plain = [not sample.edits for made in epochs for batch in made for sample in batch.samples]
    assert 0 < sum(plain) < len(plain)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [rate_at(step, 100, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[10] == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001
    assert rate_at(0, 1, 0.5) == 0.5


def test_batch_norm_is_frozen_whole() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    freeze(network)
    assert not network.training
    assert {name for name, values in network.named_parameters() if values.requires_grad} == {"0.weight", "0.bias"}
    before = {name: values.clone() for name, values in network.state_dict().items()}
    network(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


@pytest.mark.parametrize(
    ("gpu", "device", "precision", "chosen"),
    [
        ("with bf16", "auto", "auto", Hardware("cuda", "bf16")),
        ("with bf16", "cuda", "fp32", Hardware("cuda", "fp32")),
        ("old", "auto", "auto", Hardware("cuda", "fp32")),
        ("with bf16", "cpu", "auto", Hardware("cpu", "fp32")),
        ("none", "auto", "auto", Hardware("cpu", "fp32")),
        ("old", "auto", "bf16", "has no bf16"),
        ("none", "cuda", "auto", "finds no GPU"),
    ],
)
def test_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, gpu: str, device: Device, precision: TrainingPrecision, chosen: Hardware | str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu != "none")
    # An old one computes bf16, too, in a slow way.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or gpu == "with bf16")
    if isinstance(chosen, Hardware):
        assert hardware(device, precision) == chosen
        return
    with pytest.raises(ConfigurationError, match=chosen):
        hardware(device, precision)


def test_a_run_goes_on_with_the_same_question_only(tmp_path: Path) -> None:
    assert read_run(tmp_path, "one") is None
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = Progressed(asked="one", epoch=2, step=7, losses=(0.5, 0.25), refused={"NOT_AN_IMAGE": 1})
    write_run(tmp_path, kept, {"features": layer.state_dict(), "optimizer": optimizer.state_dict()})
    found = read_run(tmp_path, "one")
    assert found is not None and found[0] == kept
    other = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    other.load_state_dict(found[1]["optimizer"])
    momenta = [state["exp_avg"] for state in other.state_dict()["state"].values()]
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(momenta, optimizer.state_dict()["state"].values(), strict=True))
    with pytest.raises(ConfigurationError, match="other pictures or settings"):
        read_run(tmp_path, "two")
    (tmp_path / STATE_FILE).write_bytes((tmp_path / STATE_FILE).read_bytes()[:200])
    with pytest.raises(ConfigurationError, match="remove it to begin anew"):
        read_run(tmp_path, "one")


def test_written_safetensors_are_read_by_us_and_by_the_formats_own_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    state = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "turned": torch.randn(4, 6).T,
        "half": torch.randn(2, 2).to(torch.bfloat16),
        "one": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    write_safetensors(path, state, {"format": "pt"})
    for found in (read_state(path, "safetensors"), load_file(path)):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], values) and found[name].dtype == values.dtype for name, values in state.items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
