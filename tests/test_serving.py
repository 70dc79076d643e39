"""Exports in llama.cpp and in `transformers serve`: the guide's request ends by itself, with qdora's own answer.

They need `pip install xllamacpp "transformers[serving]"`, and llama.cpp's converter in QDORA_LLAMA_CPP.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch

from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.export.gguf import find_llama_cpp
from qdora.export.verify import float32_arithmetic, logits_of
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import load_run
from qdora.run.run import train_run

pytestmark = pytest.mark.slow
pytest.importorskip("openai")

GUIDE = Path(__file__).parents[1] / "qdora/guide/serving.md"
QUESTION = "What is the capital of France?"
LLAMA_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), 1, 1024
params.cpuparams.n_threads = 2
if len(sys.argv) > 3:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = sys.argv[3], 1.0
    params.lora_adapters = [adapter]
server = xllamacpp.Server(params)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    never = "eval.at_start=false eval.at_end=false eval.every=null"
    recipe = load_recipe("quickstart", f"adapter.kind=lora train.steps=30 train.epochs=null {never}".split())
    run = tmp_path_factory.mktemp("served") / "run"
    train_run(recipe, run)
    return run


def exported(run: Path, form: str) -> Path:
    out = run.with_name(form)
    if not out.is_dir():
        export_run(run, out, ExportOptions(format=form))
    return out


@contextmanager
def served(command: list[str], port: int, directory: Path) -> Iterator[None]:
    server = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE, cwd=directory)
    try:
        for _ in range(240):
            assert server.poll() is None, "the server has ended"
            try:
                if urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                    break
            except OSError:  # not yet, or 503 while it loads
                time.sleep(0.25)
        yield
    finally:
        server.kill()
        server.wait()


def answer_of(port: int) -> list[str]:
    """The guide's own code, with this port and question: the answer, and why it ended."""
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    code = code.replace("localhost:8000", f"127.0.0.1:{port}").replace("Why is the sky blue?", QUESTION)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip().rsplit(" ", 1)


def own_answer(run: Path) -> str:
    command = [sys.executable, "-m", "qdora.cli", "generate", str(run), "--prompt", QUESTION, "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_llama_cpp_answers_as_the_run(run: Path) -> None:
    pytest.importorskip("xllamacpp")
    try:
        find_llama_cpp(None, "f16")
    except UserError:
        pytest.skip("llama.cpp's converter is not here")
    expected, trained = own_answer(run), load_run(run)
    ids = trained.tokenizer(QUESTION).input_ids
    with float32_arithmetic(trained.model):
        wanted = logits_of(trained.model, torch.tensor([ids]))[-1].log_softmax(-1)
    merged, lora = exported(run, "gguf") / "model-f16.gguf", exported(run, "gguf-lora")
    base, adapter = lora / "base-f16.gguf", lora / "adapter.gguf"
    errors: list[float] = []
    for number, (model, *adapters) in enumerate(([merged], [base, adapter], [base])):
        port = 8611 + number
        with served(["-c", LLAMA_SERVER, str(model), str(port), *map(str, adapters)], port, run):
            body: dict[str, Any] = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0}
            request = Request(f"http://127.0.0.1:{port}/completion", json.dumps(body).encode())
            (token,) = json.loads(urlopen(request, timeout=60).read())["completion_probabilities"]
            errors.append(max(abs(each["logprob"] - float(wanted[each["id"]])) for each in token["top_logprobs"]))
            if number < 2:
                assert answer_of(port) == [expected, "stop"]
    assert max(errors[:2]) < 0.1 < errors[2], errors  # the base without the adapter is another model


def test_transformers_serve_answers_as_the_run(run: Path) -> None:
    pytest.importorskip("fastapi")
    command = ["-m", "transformers.cli.transformers", "serve", ".", "--port", "8615", "--device", "cpu"]
    with served(command, 8615, exported(run, "merged")):
        assert answer_of(8615) == [own_answer(run), "stop"]
