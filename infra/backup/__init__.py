"""Rows and vectors in a folder, and back from it: what saves embedding every picture again."""

from __future__ import annotations

from infra.backup.restore import Restored, restore_backup
from infra.backup.take import take_backup

__all__ = ["Restored", "restore_backup", "take_backup"]
