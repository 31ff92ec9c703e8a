"""`image-search evaluate` on the sample pictures: the real model, real decode processes, real plots."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from infra import cli
from infra.local_stack import sample_pictures
from processors.embedding.catalog import CATALOG, fingerprint
from processors.embedding.weights import WeightFolders, obtain
from processors.training.edits import Edit
from tests.pictures import draw, edited_copy, encoded

SAMPLES = Path(sample_pictures.__file__).parent / "samples"
LITE0 = "efficientnet_lite0"


@pytest.fixture(scope="module", autouse=True)
def commands() -> None:
    cli.add_service_commands()


def evaluate(*arguments: str | Path) -> Result:
    """In this process: each new one imports for seconds."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(cli.cli, ["evaluate", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples, one of them twice, and what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for file in sorted(SAMPLES.glob("*.jpg"))[:8]:
        shutil.copy(file, folder)
    shutil.copy(folder / "cat.jpg", folder / "the $same$ 猫.jpg")
    (folder / "notes.txt").write_text("no picture")
    (folder / "cut.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:2000])
    return folder


def test_copies_of_pictures_are_found_among_distractors(pictures: Path, tmp_path: Path) -> None:
    distractors = tmp_path / "distractors"
    distractors.mkdir()
    for number in range(6):
        (distractors / f"{number}.png").write_bytes(encoded(draw(number, (200, 150)), "PNG"))
    done = evaluate(pictures, "--edits", "--distractors", distractors, "--output", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["references"] == 9 + 6 and report["queries"] == 9 * len(Edit)
    assert report["refused"] == {"CORRUPT_IMAGE": 1, "NOT_AN_IMAGE": 1}
    (model,) = report["models"]
    assert model["label"] == LITE0 and model["fingerprint"] == fingerprint(CATALOG[LITE0], "fp32")
    measures = model["measures"]
    # The same bytes twice are one picture: each of the two is right, and neither stands in the other's way.
    assert measures["recall_at"]["1"] >= 0.9 and measures["micro_average_precision"] >= 0.9
    assert 0 < measures["likely"]["score"] <= measures["surely"]["score"] <= 100.001
    assert set(model["kinds"]) == set(Edit)
    for easy in ("resize", "jpeg", "flip", "screenshot"):
        assert model["kinds"][easy]["recall_at_1"] == 1.0
    for name in ("precision-recall.png", "scores.png"):
        with Image.open(tmp_path / "out" / name) as plot:
            assert plot.width > 500 and len(set(plot.convert("L").tobytes())) > 50
    assert (tmp_path / "out" / f"misses-{LITE0}.png").is_file() == bool(model["worst_misses"])


def test_groups_and_two_models_side_by_side(tmp_path: Path) -> None:
    """A list of groups, a table, and misses: the group of strangers cannot be found by its pictures."""
    names = ["cat.jpg", "rocket.jpg", "drum.jpg"]
    rows = ["file,group"]
    for name in names:
        shutil.copy(SAMPLES / name, tmp_path)
        (tmp_path / f"copy-{name}").write_bytes(edited_copy((SAMPLES / name).read_bytes()))
        rows += [f"{name},{name}", f"copy-{name},{name}"]
    for name in ("dogs.jpg", "galaxies.jpg"):
        shutil.copy(SAMPLES / name, tmp_path / f"$x^ {name}")
        rows.append(f"$x^ {name},strangers")
    rows += ["gone.jpg,strangers"]
    (tmp_path / "groups.csv").write_text("\n".join(rows), encoding="utf-8")
    done = evaluate(tmp_path / "groups.csv", "--model", LITE0, "--model", f"{LITE0}:fp32", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "8 pictures against 8 pictures" in done.stdout and "left out: 1 × OBJECT_UNREADABLE" in done.stdout
    lines = [line.split("│") for line in done.stdout.splitlines() if "recall@1 " in line]
    assert [cell.strip() for cell in lines[0][1:4]] == ["recall@1", "75.0 %", "75.0 %"]
    for label in (LITE0, f"{LITE0}-fp32"):
        with Image.open(tmp_path / "out" / f"misses-{label}.png") as sheet:
            assert sheet.height > 400, "two misses, one below the other"
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["models"][0]["measures"] == report["models"][1]["measures"]
    assert {Path(miss["query"]).name for miss in report["models"][0]["worst_misses"]} == {"$x^ dogs.jpg", "$x^ galaxies.jpg"}


def test_the_same_seed_measures_the_same(pictures: Path) -> None:
    asked = (pictures, "--edit", "crop", "--originals", "3", "--seed", "4", "--json")
    first, again = (json.loads(evaluate(*asked).stdout) for _ in range(2))
    assert first["queries"] == 3 and first == again


def test_what_cannot_be_measured_is_said_in_one_line(pictures: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((pictures,), "no picture has another one to be found by"),
        ((pictures, "--edits", "--model", "nobody"), "there is no model 'nobody'"),
        ((pictures, "--edits", "--model", f"{LITE0}:fp8"), "IMAGE_SEARCH_MODEL_PRECISION"),
        ((pictures, "--originals", "3"), "give --edits"),
        ((tmp_path, "--edits"), "there is no file in"),
        ((pictures, "--edits", "--output", pictures / "cat.jpg" / "x"), "cannot be made"),
    ):
        done = evaluate(*arguments)
        assert done.exit_code == 2 and said in done.stderr


WITHOUT_PLOTS = """
import sys
sys.modules["matplotlib"] = None
from infra.cli import main
main()
"""


def test_without_matplotlib_it_says_what_to_install_before_any_work(pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PLOTS, "evaluate", str(pictures), "--edits", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "pip install 'image-search[training]'" in done.stderr
    assert not (tmp_path / "out").exists()


SERVING = """
import sys
import processors.app, processors.commands, processors.embedding, processors.pipeline, query_service.app, query_service.commands
loaded = sorted(name for name in sys.modules if name.startswith("processors.training"))
assert loaded == ["processors.training", "processors.training.commands"], loaded
heavy = sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "matplotlib"))
assert not heavy, heavy
"""


def test_a_serving_process_loads_the_command_and_nothing_else_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", SERVING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_of_ones_own_beside_the_default(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default's own weights under another name: the same vectors, so the same figures, under another fingerprint."""
    weights = obtain(CATALOG[LITE0], WeightFolders(own=None, downloads=tmp_path), print)
    for name, value in {
        "OWN_WEIGHTS": str(weights),
        "WEIGHTS_SHA256": CATALOG[LITE0].weights.sha256,
        "OWN_NETWORK": LITE0,
    }.items():
        monkeypatch.setenv(f"IMAGE_SEARCH_{name}", value)
    done = evaluate(pictures, "--edit", "blur", "--originals", "4", "--model", "own", "--model", LITE0, "--json")
    assert done.exit_code == 0, done.stderr
    own, default = json.loads(done.stdout)["models"]
    assert own["measures"] == default["measures"] and own["fingerprint"] != default["fingerprint"]
