"""Where pictures and their groups come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.errors import ConfigurationError
from processors.training.labelled import labelled_pictures


def test_folders_of_the_first_level_are_groups(tmp_path: Path) -> None:
    for name in ("cats/b.jpg", "cats/young/a.jpg", "dogs/c.jpg", "lost.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "cats" / "pipe")
    found = [(str(picture.path.relative_to(tmp_path)), picture.group) for picture in labelled_pictures(tmp_path)]
    assert found == [("lost.jpg", None), ("cats/b.jpg", "cats"), ("cats/young/a.jpg", "cats"), ("dogs/c.jpg", "dogs")]


def test_a_list_names_files_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "groups.csv"
    file.write_text('\ufefffile,note,group\na.jpg,x,1\n"sub/b, c.jpg",,1\n/far/d.jpg,,\n', encoding="utf-8")
    found = [(picture.path, picture.group) for picture in labelled_pictures(file)]
    assert found == [(tmp_path / "a.jpg", "1"), (tmp_path / "sub/b, c.jpg", "1"), (Path("/far/d.jpg"), None)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"path,group\na,b\n", "must name the columns file,group"),
        (b"", "must name the columns"),
        (b"file,group\n", "there is no file in"),
        (b"file,group\n,1\n", "line 2: no file is named"),
        (b"file,group\n\xff\xfe,1\n", "cannot be read as a CSV file in UTF-8"),
    ],
)
def test_a_list_that_is_none_says_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "groups.csv"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        labelled_pictures(file)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        labelled_pictures(tmp_path)
