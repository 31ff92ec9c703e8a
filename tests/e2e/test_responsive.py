"""Promise: nothing blocks the event loop (invariant 10). While a huge picture is decoded, the service answers others."""

from __future__ import annotations

import threading

import requests
from PIL import Image

from tests.e2e.conftest import WAIT_SECONDS, Deployment
from tests.pictures import encoded

HUGE = (7000, 6000)


def test_others_are_answered_while_a_huge_picture_is_decoded(deployment: Deployment) -> None:
    picture = encoded(Image.linear_gradient("L").resize(HUGE), "PNG")
    url = deployment.stack.query_url
    finished = threading.Event()
    statuses: list[int] = []

    def search() -> None:
        answer = requests.post(f"{url}/v1/search", data=picture, headers={"Content-Type": "image/png"}, timeout=WAIT_SECONDS)
        statuses.append(answer.status_code)
        finished.set()

    searching = threading.Thread(target=search)
    searching.start()
    answered_meanwhile = 0
    while not finished.is_set():
        assert requests.get(f"{url}/healthz/live", timeout=WAIT_SECONDS).status_code == 200
        answered_meanwhile += not finished.is_set()
    searching.join()
    assert statuses == [200]
    # Decoding takes some hundred milliseconds; a blocked loop lets a request or two through before and after it.
    assert answered_meanwhile > 10
