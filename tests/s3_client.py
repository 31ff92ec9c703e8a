"""A bucket as a stranger's S3 client sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import boto3
from botocore.config import Config

from infra.settings import CommonSettings


class Bucket:
    """Blocking calls run beside the event loop."""

    def __init__(self, settings: CommonSettings) -> None:
        self.name = settings.buckets[0]
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint,
            aws_access_key_id=settings.s3_access_key,
            aws_secret_access_key=settings.s3_secret_key.get_secret_value(),
            region_name=settings.s3_region,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    async def do(self, operation: str, key: str, **arguments: object) -> Any:  # noqa: ANN401 - whatever boto3 answers
        return await asyncio.to_thread(getattr(self._client, operation), Bucket=self.name, Key=key, **arguments)

    async def put(self, key: str, data: bytes = b"picture") -> None:
        await self.do("put_object", key, Body=data)

    async def copy(self, source: str, key: str) -> None:
        await self.do("copy_object", key, CopySource={"Bucket": self.name, "Key": source})

    async def put_in_parts(self, key: str, *parts: bytes) -> None:
        upload = (await self.do("create_multipart_upload", key))["UploadId"]
        done = []
        for number, part in enumerate(parts, 1):
            answer = await self.do("upload_part", key, UploadId=upload, PartNumber=number, Body=part)
            done.append({"PartNumber": number, "ETag": answer["ETag"]})
        await self.do("complete_multipart_upload", key, UploadId=upload, MultipartUpload={"Parts": done})

    async def head(self, key: str) -> tuple[str, float]:
        answer = await self.do("head_object", key)
        return answer["ETag"].strip('"'), answer["LastModified"].timestamp()
