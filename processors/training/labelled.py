"""Pictures and what is known of them: a folder for each class, or a list of groups."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.errors import ConfigurationError

FILE_COLUMN = "file"
GROUP_COLUMN = "group"


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    """`group`: pictures of one group show the same; None: it shows what no other does, so it can only be in the way."""

    path: Path
    group: str | None


def labelled_pictures(source: Path) -> list[LabelledPicture]:
    """All files below a folder, in the order of their names, or those that a CSV file names. Raises ConfigurationError.

    In a folder, what lies in (or below) one folder of the first level is a group; files beside those folders have none.
    """
    pictures = list(_in_folder(source)) if source.is_dir() else list(_in_list(source))
    if not pictures:
        raise ConfigurationError(f"there is no file in {source}")
    return pictures


def _in_folder(folder: Path) -> Iterator[LabelledPicture]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent) / name
            parts = path.relative_to(folder).parts
            # A pipe or a socket would keep its reader waiting.
            if path.is_file():
                yield LabelledPicture(path, parts[0] if len(parts) > 1 else None)


def _in_list(file: Path) -> Iterator[LabelledPicture]:
    try:
        # With a signature of UTF-8 before it, too, as spreadsheets write it.
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if not {FILE_COLUMN, GROUP_COLUMN} <= set(rows.fieldnames or ()):
                raise ConfigurationError(f"{file}: the first line must name the columns {FILE_COLUMN},{GROUP_COLUMN}")
            for row in rows:
                name = row[FILE_COLUMN]
                if not name:
                    raise ConfigurationError(f"{file}, line {rows.line_num}: no file is named")
                yield LabelledPicture(file.parent / name, row[GROUP_COLUMN] or None)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{file} is no folder, and cannot be read as a CSV file in UTF-8: {error}") from None
