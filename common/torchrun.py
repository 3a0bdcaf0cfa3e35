"""What the ranks need to know of torchrun, which starts them, and again after a fault."""

import hashlib
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

SPEAK_AFTER = timedelta(seconds=8)
"""How long a rank leaves it to the first one to show a message."""
MEET_WITHIN = timedelta(minutes=30)
"""How long ranks wait for each other, as torch.distributed does."""


def started_us() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_gone(parent: int) -> bool:
    """Whether the torchrun that started this rank has died. parent: os.getppid() at the start.

    A rank without one must end: nobody would end it when the run is started again.
    """
    return started_us() and os.getppid() != parent


def launcher() -> str:
    """The torchrun process that started this rank: host, number, time of start. Empty without one.

    It outlives the ranks that it starts again.
    """
    if not started_us():
        return ""
    parent = os.getppid()
    try:  # the 22nd field, counted behind the program's name, which may hold spaces
        began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = "?"
    return f"{socket.gethostname()} {parent} {began}"


def store_of_this_start(rank: int, ranks: int) -> dist.Store | None:
    """A store in which the ranks find each other, and none that are dead; None without torchrun's.

    torchrun (2.13) keeps its store over restarts, and the addresses of dead ranks in it: a rank
    that is quick would connect to those. So the first rank gives each start a name, and the others
    ask until a first rank that lives has answered. TORCHELASTIC_RESTART_COUNT does not do, for two
    nodes may count differently. Raises DistStoreError after MEET_WITHIN.
    """
    store = _agent_store(MEET_WITHIN)
    if store is None:
        return None
    me = uuid.uuid4().hex
    if rank == 0:
        store.set("hourglass/start", me)
        for other in range(1, ranks):
            asking = store.get(f"hourglass/{me}/asks/{other}").decode()
            store.set(f"hourglass/{me}/answer/{asking}", "")
        return dist.PrefixStore(f"hourglass/{me}", store)
    for _ in range(int(MEET_WITHIN.total_seconds())):
        start = store.get("hourglass/start").decode()
        store.set(f"hourglass/{start}/asks/{rank}", me)
        try:
            store.wait([f"hourglass/{start}/answer/{me}"], timedelta(seconds=1))
        except dist.DistStoreError:
            continue
        return dist.PrefixStore(f"hourglass/{start}", store)
    raise dist.DistStoreError("the first rank did not answer")


def speaks(text: str) -> bool:
    """Give torchrun the message that this rank ends with; whether the rank is to show it itself."""
    tell(text)
    return first_to_say(text)


def tell(text: str) -> None:
    """Write a message where torchrun's summary of failures takes it from, under `traceback`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    with suppress(OSError):  # the message is what counts
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def first_to_say(text: str) -> bool:
    """Whether no other rank says the same text. The ranks ask in torchrun's store.

    The first rank always speaks. Another one waits whether it does, because torchrun can be told to
    show the first rank alone.
    """
    words = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {text}"
    key = "hourglass/said/" + hashlib.sha256(words.encode()).hexdigest()
    try:
        store = _agent_store(SPEAK_AFTER)
        if store is None:
            return True
        if os.environ["RANK"] == "0":
            store.set(key, "")
            return True
        try:
            store.wait([key], SPEAK_AFTER)
        except dist.DistStoreError:
            return store.add(key + "/others", 1) == 1
    except (RuntimeError, OSError):  # torchrun is gone; better twice than never
        return True
    return False


def _agent_store(timeout: timedelta) -> dist.TCPStore | None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)
