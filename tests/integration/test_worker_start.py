"""What a worker refuses to start with, and what wrong rights may not do to the index."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from infra.settings import ProcessorSettings
from schemas.events import ReasonCode
from schemas.identity import content_hash_of
from schemas.tables import RowState
from schemas.topics import HEADER_REASON
from tests.conftest import FreshSettings
from tests.deployment import deployed
from tests.pictures import jpeg


async def test_a_worker_of_another_model_refuses_to_start_and_says_what_to_do(
    fresh_settings: FreshSettings, tmp_path: Path
) -> None:
    async with deployed(fresh_settings(ProcessorSettings), tmp_path) as deployment:
        worker = deployment.worker(model="resnet50")
        assert await worker.wait_dead() != 0
        said = worker.log.read_text()
        assert "was made with efficientnet_lite0" in said
        assert "IMAGE_SEARCH_MODEL=efficientnet_lite0" in said


async def test_denied_access_takes_nothing_out_of_the_index(fresh_settings: FreshSettings, tmp_path: Path) -> None:
    settings = fresh_settings(ProcessorSettings, decode_workers=1, read_give_up_seconds=1.0)
    async with deployed(settings, tmp_path) as deployment:
        worker = deployment.worker()
        await deployment.send([await deployment.put("a.jpg", jpeg(1))])
        await deployment.settle()
        assert await worker.stop() == 0

        denied = deployment.worker(s3_secret_key=SecretStr("wrong"))
        await deployment.send([await deployment.put("a.jpg", jpeg(2)), await deployment.put("b.jpg", jpeg(3))])
        await deployment.settle()
        assert await denied.stop() == 0
        kept, unseen = await deployment.row("a.jpg"), await deployment.row("b.jpg")
        assert kept is not None
        assert (kept.state, kept.content_hash) == (RowState.INDEXED, content_hash_of(jpeg(1)))
        assert unseen is not None
        assert (unseen.state, unseen.reason) == (RowState.FAILED, ReasonCode.ACCESS_DENIED)
        reasons = [letter.headers[HEADER_REASON] for letter in await deployment.dead_letters()]
        assert reasons == [ReasonCode.ACCESS_DENIED] * 2
