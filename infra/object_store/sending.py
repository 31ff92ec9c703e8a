"""A put whose body streams: what is sent, and what the store answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
from miniopy_async.error import S3Error, ServerError

from infra.object_store.interface import Over

LONGEST_ANSWER_BYTES = 64 * 1024


class Source:
    """The chunks of a body, and what went wrong with them: the library only tells that the connection broke."""

    def __init__(self, chunks: AsyncIterator[bytes], size: int) -> None:
        self._chunks = chunks
        self._size = size
        self.failure: Exception | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        sent = 0
        try:
            async for chunk in self._chunks:
                sent += len(chunk)
                if sent > self._size:
                    break
                yield chunk
        except Exception as error:
            self.failure = error
            raise
        if sent != self._size:
            raise ValueError("the body is not as long as it was said to be")


def condition_headers(over: Over | None) -> dict[str, str]:
    if over is None:
        return {}
    return {"If-None-Match": "*"} if over.etag is None else {"If-Match": f'"{over.etag}"'}


async def etag_of_answer(response: aiohttp.ClientResponse) -> str:
    """Raises S3Error or ServerError for what is no success, as the client does for its own calls."""
    if response.status == 200:
        return response.headers["ETag"].strip('"')
    text = (await response.content.read(LONGEST_ANSWER_BYTES)).decode(errors="replace")
    if "xml" in response.headers.get("Content-Type", ""):
        raise S3Error.fromxml(response, text)
    raise ServerError("the store refuses a put", response.status)
