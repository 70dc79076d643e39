"""How much memory this process may take: the machine's, and less in a container."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from qdora.files import environment
from qdora.files.environment import available_memory_bytes, machine_memory_bytes

GIB = 2**30
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"
NO_LIMIT = {"memory.max": "max\n", "memory.current": f"{9 * GIB}\n"}
FOUR = {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n"}
NO_LIMIT_V1 = {"memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": f"{9 * GIB}\n"}
FOUR_V1 = {"memory.limit_in_bytes": f"{4 * GIB}\n", "memory.usage_in_bytes": f"{3 * GIB}\n"}
STAT = f"anon {GIB}\nfile {2 * GIB}\nshmem {GIB}\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n"
STAT_V1 = f"cache 5\ninactive_file 7\nactive_file 7\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 4}\n"

# /proc/self/cgroup, the files of each folder, and GiB in all and free; the machine has 64, of which 48 are free.
CASES = {
    "no groups": ("", {}, (64, 48)),
    "no limit": ("0::/user.slice\n", {f"{V2}/user.slice": NO_LIMIT, V2: {}}, (64, 48)),
    "a container": ("0::/\n", {V2: FOUR}, (4, 1)),
    "pages of files": ("0::/\n", {V2: FOUR | {"memory.stat": STAT}}, (4, 1.75)),
    "a parent": ("0::/pod/box\n", {f"{V2}/pod/box": NO_LIMIT, f"{V2}/pod": FOUR}, (4, 1)),
    "a path of the host": ("0::/docker/0a1b\n", {V2: FOUR}, (4, 1)),
    "full": ("0::/\n", {V2: FOUR | {"memory.current": f"{5 * GIB}\n"}}, (4, 0)),
    "larger than the machine": ("0::/\n", {V2: {"memory.max": f"{99 * GIB}", "memory.current": "0"}}, (64, 48)),
    "v1": ("5:cpu:/x\n4:memory:/docker/0a1b\n", {V1: FOUR_V1 | {"memory.stat": STAT_V1}}, (4, 1.75)),
    "v1 and v2": ("4:memory:/a\n0::/\n", {f"{V1}/a": FOUR_V1, V1: NO_LIMIT_V1}, (4, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_container_leaves_of_the_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, folders, (total, free) = CASES[case]
    texts = {f"{folder}/{name}": text for folder, files in folders.items() for name, text in files.items()}
    texts["/proc/self/cgroup"] = groups
    monkeypatch.setattr(environment, "_system_text", lambda path: texts.get(path.replace("/./", "/"), ""))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    assert (machine_memory_bytes(), available_memory_bytes()) == (total * GIB, free * GIB)
