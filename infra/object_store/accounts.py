"""Accounts of a MinIO server. The services never need this; what sets up a server does."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from miniopy_async.credentials.providers import StaticProvider
from miniopy_async.error import MinioAdminException
from miniopy_async.minioadmin import MinioAdmin

from infra.metrics import store_error
from infra.object_store.s3 import trusted
from infra.settings import CommonSettings


async def add_accounts(settings: CommonSettings, passwords: Mapping[str, str], policies: Path) -> None:
    """An account for each of `passwords`, with the policy `policies`/<name>.json alone. Repeated, it changes nothing.

    `settings` are of an administrator. Raises StoreUnavailable.
    """
    endpoint = urlsplit(settings.s3_endpoint)
    administrator = StaticProvider(settings.s3_access_key, settings.s3_secret_key.get_secret_value())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted(settings))) as session:
        admin = MinioAdmin(endpoint.netloc, administrator, secure=endpoint.scheme == "https", session=session)
        try:
            async with asyncio.timeout(settings.s3_timeout_seconds):
                for name, password in passwords.items():
                    await admin.user_add(name, password)
                    await admin.policy_add(name, str(policies / f"{name}.json"))
                    await admin.policy_set(name, user=name)
        except (MinioAdminException, aiohttp.ClientError, OSError) as error:
            raise store_error("object store", f"its accounts could not be made ({type(error).__name__})") from error
