"""Several processes in a test: forked, so that none imports torch again, and joined by gloo as under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from typing import Any


def run(size: int, function: Callable[..., None], *args: Any, timeout: float = 240) -> list[str]:
    """Call `function(rank, *args)` in `size` processes with torchrun's environment variables.

    Returns:
        Of each process '' or its traceback.
    """
    context = multiprocessing.get_context("fork")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pairs = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_one, args=(rank, size, port, pairs[rank][1], function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    ends = [pair[0].recv() if pair[0].poll(timeout) else f"nothing within {timeout} s" for pair in pairs]
    for process in processes:
        process.join(5)
        process.kill()
    return ends


def _one(rank: int, size: int, port: int, end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        function(rank, *args)
        end.send("")
    except BaseException:
        end.send(traceback.format_exc())
    os._exit(0)  # nothing of the test process is to be torn down here
