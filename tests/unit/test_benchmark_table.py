"""The table of the benchmarks: what a run says it measured."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks import gpu
from tests.benchmarks.__main__ import PARTS, asked, main, measured
from tests.benchmarks.chart import of_goal
from tests.benchmarks.measures import Backlog
from tests.benchmarks.parts import Part, Run
from tests.benchmarks.pipeline import ratios
from tests.benchmarks.report import COLUMNS, Result, cells, percentile, publish, ratio


def test_a_ratio_is_the_median_of_its_rounds_and_not_of_its_arms() -> None:
    one = ratio("speed", 1.5, {"ours": [10, 40, 90], "theirs": [10, 10, 30]})
    assert one.rounds == [1, 4, 3] and one.value == 3 and one.met
    assert not ratio("cost", 1.15, {"ours": [1.2], "theirs": [1.0]}, at_least=False).met


def test_arms_with_different_rounds_are_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio("speed", 1.5, {"ours": [1, 2], "theirs": [1]})


def test_a_row_says_goal_rounds_spread_and_arms() -> None:
    row = dict(zip(COLUMNS, cells(ratio("speed", 1.5, {"ours": [2, 8], "theirs": [2, 4]})), strict=True))
    assert row["goal"] == "≥ 1.5" and row["rounds"] == "2" and row["spread"] == "1 to 2"
    assert row["arms (median)"] == "ours 5, theirs 3" and row["met"] == "yes"


def test_what_is_met_reaches_the_goal_in_the_picture_whichever_way_its_bound_goes() -> None:
    for one in (Result("up", 2, 1, "×", at_least=True), Result("down", 0.5, 1, "×")):
        assert one.met and of_goal(one) == 2


def test_the_servers_share_is_taken_off_what_the_pipeline_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    filled = Backlog(rate=30, seconds=10, cpu_seconds={"milvus": 3, "kafka": 2, "worker": 15})
    wall, left = ratios("a model", 0.95, filled, 35, 45)
    assert wall.value == pytest.approx(30 / 40) and left.value == pytest.approx(30 / 40 / 0.75)


def test_a_run_is_written_for_machines_and_people_and_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    missed = ratio("speed", 1.5, {"ours": [1], "theirs": [1]})
    publish([missed], {"backlog": {"worker": 3.0, "kafka": 1.0}}, Console(quiet=True), failed=["index"])
    document = json.loads(Path("build/bench.json").read_text())
    assert document["results"][0]["met"] is False and document["results"][0]["arms"] == {"ours": [1], "theirs": [1]}
    assert document["failed"] == ["index"]
    tables = Path("build/bench.md").read_text()
    assert "| speed | 1 × | ≥ 1.5 | no | 1 | 1 to 1 |" in tables and "| worker | 3.0 | 75 % |" in tables
    assert Path("build/bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_beside_other_work_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish([Result("speed", 1, 1, "×")], {}, Console(quiet=True), load=3.0)
    assert "the machine was busy (load 3.0" in Path("build/bench.md").read_text()
    publish([Result("speed", 1, 1, "×")], {}, Console(quiet=True), load=0.1)
    assert "busy" not in Path("build/bench.md").read_text()


def test_one_part_that_fails_costs_no_other_its_results() -> None:
    def broken(_: Run) -> list[Result]:
        raise RuntimeError("no disk")

    parts = [Part("broken", "", broken), Part("whole", "", lambda _: [Result("speed", 1, 1, "×")])]
    results, failed = measured(parts, Run(Console(quiet=True)))
    assert [one.id for one in results] == ["speed"] and failed == ["broken"]


def test_parts_are_asked_for_by_name() -> None:
    assert list(asked("")) == list(PARTS)
    assert [part.name for part in asked("index,decode")] == ["decode", "index"]
    with pytest.raises(SystemExit, match="no part indx"):
        asked("indx")


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([3, 1, 2], 0.5) == 2 and percentile([1, 2], 0.99) == 2


def test_the_gpu_table_has_a_row_for_each_batch_and_holds_the_whole_against_its_slower_half() -> None:
    console = Console(record=True, width=160, quiet=False, file=io.StringIO())
    console.print(gpu.batch_table([gpu.BatchRates("bf16", 64, [900, 1000, 1100], [800], [700])], "a card"))
    console.print(gpu.fed_table([gpu.FedRates("bf16", [500, 500], [2000, 2000], [400, 450])], "decoding"))
    text = console.export_text()
    assert "a card" in text and "1,000 (900 to 1,100)" in text and "64" in text
    assert "0.85" in text


def test_without_a_gpu_the_table_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--gpu"])
    main()
    assert "no NVIDIA GPU" in " ".join(capsys.readouterr().out.split())
