"""Hashes of long prompts, computed beside the event loop: for 32k tokens it would stand still for milliseconds."""

import asyncio
import time
from functools import partial

from pdserve.core.request import Request
from pdserve.router.router import Router

LONG = 1024
"""Tokens of a prompt from which on a thread's turn costs less than what it takes off the event loop."""


class PromptHasher:
    """Prepares requests for a router. Called with one before it is generated."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, request: Request) -> None:
        """Returns when routing the request need not hash its prompt any more, as far as that is worth a wait."""
        if len(request.prompt_token_ids) < LONG:
            return
        # Hashing holds the GIL, and the event loop waits long for a thread that does not let go of it.
        hashed = partial(self._router.prepare, request, give_way=partial(time.sleep, 0))
        self._router.keep(request, await asyncio.to_thread(hashed))
