"""OpenVINO, imported so that it does not call home: the only place that imports it.

Its mere import reports to its maker's analytics service, and so does each conversion, unless its telemetry package is
missing; then it uses a stub of its own.
"""

from __future__ import annotations

import sys

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None is how an import is made to fail

import openvino  # type: ignore[import-untyped]  # noqa: E402 - no types of its own; after the line above

__all__ = ["openvino"]
