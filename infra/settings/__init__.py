"""Every setting of every service: one validated class a service, prefix IMAGE_SEARCH_, units in names.

A value comes from the environment, else from the stack file that `image-search up` wrote, else from its default here.
A secret may be given by file: IMAGE_SEARCH_X_FILE names a file that holds the value of IMAGE_SEARCH_X.
docs/configuration.md and .env.example are generated from these classes, and a test holds them to it.
"""

from infra.settings.base import DEFAULT_STATE_DIR, ENV_PREFIX, LAST_PORT, STACK_FILE_NAME, AnySettings, load
from infra.settings.common import CommonSettings
from infra.settings.model import ModelSettings
from infra.settings.services import BridgeSettings, ClientSettings, ProcessorSettings, QuerySettings
from infra.settings.stack import StackSettings

__all__ = [
    "DEFAULT_STATE_DIR",
    "ENV_PREFIX",
    "LAST_PORT",
    "STACK_FILE_NAME",
    "AnySettings",
    "BridgeSettings",
    "ClientSettings",
    "CommonSettings",
    "ModelSettings",
    "ProcessorSettings",
    "QuerySettings",
    "StackSettings",
    "load",
]
