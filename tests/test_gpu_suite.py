"""The GPU suite's own logic, on a CPU: nothing may fail on a rented card that could have failed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_suite
from gpu_suite import SECTIONS, Section

# They start programs, or differ from others in their sizes.
SLOW = {"tests", "quickstart", "layer_2", "layer_3", "streamed_40gb", "step_in_turns_long", "step_8b_40gb"}
SLOW |= {name for name in SECTIONS if name.startswith("alone")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SECTIONS]
)
def test_a_section_runs_on_a_cpu_and_no_check_fails(name: str, tmp_path: Path) -> None:
    gpu_suite.run_here(name, tmp_path / "part.json", 600, smoke=True)
    written = json.loads((tmp_path / "part.json").read_text())
    assert len(written) >= 2
    assert gpu_suite.failed_checks({name: {"result": written}}) == []


# In place of the suite: a section's process writes what it has, then does what its name says.
SCRIPT = """
import json, os, sys, time
name, part, _ = sys.argv[sys.argv.index("--child") + 1:]
found = {"sections": list(json.load(open(OUT))["sections"])} if os.path.exists(OUT) else {}
json.dump(found, open(part, "w"))
if name == "crashes": raise RuntimeError("CUDA error: an illegal memory access")
if name == "hangs": time.sleep(60)
"""


def test_the_file_is_written_after_each_section_whatever_becomes_of_it(monkeypatch, tmp_path, capsys):
    out, script = tmp_path / "out.json", tmp_path / "script.py"
    script.write_text(f"OUT = {str(out)!r}\n{SCRIPT}")
    monkeypatch.setattr(gpu_suite, "__file__", str(script))
    names = ["crashes", "hangs", "works"]
    for name in names:
        monkeypatch.setitem(SECTIONS, name, Section("none:none", 0.3))  # type: ignore[arg-type]
    assert gpu_suite.main(["--smoke", "--out", str(out), "--sections", *names]) == 1
    found = json.loads(out.read_text())["sections"]
    assert [entry["status"] for entry in found.values()] == ["failed: exit 1", "timed out", "done"]
    assert [entry["result"].get("sections", []) for entry in found.values()] == [[], names[:1], names[:2]]
    assert found["crashes"]["last_lines"][-1] == "RuntimeError: CUDA error: an illegal memory access"
    capsys.readouterr()
    gpu_suite.main(["--smoke", "--out", str(out), "--continue", "--sections", "crashes", "works"])
    assert "works ..." not in capsys.readouterr().out
    out.write_text(json.dumps(json.loads(out.read_text()) | {"card": {"name": "A"}}))
    with pytest.raises(SystemExit, match="another card"):
        gpu_suite.started(out, {"name": "B"})
