"""Small models, data, recipes and processes that tests share."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache, partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
)

from qdora.adapter.experts import FrozenExperts
from qdora.adapter.layer import AdaptedLinear, FrozenLinear
from qdora.adapter.norms import refresh
from qdora.data.batches import IGNORED, Batching, MicroBatch, Step, micro_batches
from qdora.data.tokenize import TokenizedExample
from qdora.errors import Interrupted, UserError
from qdora.memory.shard import ShardedBase
from qdora.memory.stream import HostResidency
from qdora.model import store
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters, inject, replace_module
from qdora.model.load import Quantization, load_model
from qdora.model.source import ModelSource, resolve
from qdora.model.store import BaseWriter, compressed_layers
from qdora.prune.compressor import Compressor
from qdora.quant.packed import mask_bits, quantize
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import BaseWeightsConfig, Recipe
from qdora.run import base as load_base
from qdora.run import prepare
from qdora.run.run import train_run
from qdora.train import passes
from qdora.train.distributed import CAN_DIVIDE, Processes, mesh_of, processes_of_launch
from qdora.train.optimizer import AdapterOptimizer, join_float32
from qdora.train.passes import even_passes, step_gradient
from qdora.train.trainer import Trainer

CORPUS = [
    "Question: What is the answer to the question?\nAnswer: the first answer of the three answers",
    "Question: is the sky blue?\nAnswer: yes no yes no",
    "The cat sat on the mat, and then the dog sat on the cat. Why did the dog sit?",
] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML as many models have it."""


def tokenizer(
    *,
    bos: bool = False,
    adds_eos: bool = False,
    eos: str | None = "<|im_end|>",
    chat_template: str | None = CHATML,
    more: Sequence[str] = (),
) -> Any:
    """Byte-level BPE; `bos` and `adds_eos`: it puts <s> before, and its end of sequence behind, every text.

    `more` texts teach it more tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *more], trainer)
    if bos or adds_eos:
        pattern = ("<s> " if bos else "") + "$A" + (" <|im_end|>" if adds_eos else "")
        pairs = [(token, backend.token_to_id(token)) for token in ("<s>", "<|im_end|>")]
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def move_all_parameters_(module: nn.Module, *, seed: int = 0, scale: float = 0.1) -> None:
    """Move every trainable parameter off its start: at the start wrong formulas agree, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
                parameter.add_(noise.to(parameter.dtype).to(parameter.device))


def config_source() -> ModelSource:
    """A source for a model whose config is known."""
    return ModelSource("directory", Path("config"), "config")


def llama(**overrides: Any) -> nn.Module:
    """A random Llama-type causal LM of a few thousand parameters, float32, eval mode."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**LM_SIZES | {"vocab_size": 97, "tie_word_embeddings": True} | overrides)
    ).eval()


_BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LM_SIZES: dict[str, Any] = _BLOCKS | {"vocab_size": 336, "hidden_size": 32, "intermediate_size": 48}
# Llama ties the head here, Qwen2 has biased q, k, v and a head of its own, Gemma2 has other norms and ties.
LM_CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**LM_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**LM_SIZES, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(**LM_SIZES, head_dim=8),
}
LM_IDS = torch.tensor([[1, 17, 300, 5, 44, 260, 9, 120, 3, 3, 77]])


def base_model(architecture: str = "llama", *, quant: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A random model, eval mode; its linear layers but the head quantised in blocks of 64 if `quant` is given."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LM_CONFIGS[architecture](), dtype=torch.float32, attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms start at 0 and 1
            parameter.data += 0.1 * torch.randn_like(parameter)
        if name.endswith("proj.weight"):
            parameter.data *= 5
    if quant:
        linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
        for name, module in linear.items():
            bias = None if module.bias is None else module.bias.data.to(dtype)
            replace_module(model, name, FrozenLinear(quantize(module.weight.data, quant, 64), bias))
    for parameter in model.parameters():  # not model.to(): from_pretrained leaves the rotary frequencies in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def adapted_model(
    architecture: str = "llama", *, quant: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """`base` with adapters (DoRA of rank 3 unless `options` say otherwise) in bf16, as runs have them; all moved."""
    model = base_model(architecture, quant=quant, dtype=dtype)
    settings = {"rank": 3, "alpha": 6.0, "generator": torch.Generator().manual_seed(1)} | options
    layers = inject(model, dtype=torch.bfloat16, **settings)
    move_adapters_(layers)
    return model


def move_adapters_(layers: dict[str, AdaptedLinear]) -> None:
    """B random, magnitudes off by up to 10 %."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
            if layer.magnitude is not None:
                layer.magnitude *= 0.9 + 0.2 * torch.rand(layer.magnitude.shape, generator=generator)


def assert_refused(words: Sequence[str], call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """A call is refused with as many faults as `words`, and each of these patterns is found in one."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    faults = raised.value.faults
    assert len(faults) == len(words), faults
    assert all(any(re.search(each, fault) for fault in faults) for each in words), faults
    assert not [fault for fault in faults if "\n" in fault or len(fault) > 1000]


def logits_of(model: Any, ids: torch.Tensor = LM_IDS) -> torch.Tensor:
    """(positions, vocabulary)."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return result


def in_float32(model: Any) -> Any:
    """What transformers loaded in 4 bits computes in float32. It leaves the rest in the dtype of the file, and the CPU
    kernel of bitsandbytes for AVX512-BF16 is wrong."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
    return model


CHECKPOINT_SIZES: dict[str, Any] = _BLOCKS | {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96}
CHECKPOINT_SIZES |= {"head_dim": 16, "pad_token_id": 0}
CHECKPOINT_CONFIGS = {
    "llama": LlamaConfig(**CHECKPOINT_SIZES, tie_word_embeddings=False),
    "llama-tied-biased": LlamaConfig(**CHECKPOINT_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**CHECKPOINT_SIZES, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **CHECKPOINT_SIZES, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**CHECKPOINT_SIZES, query_pre_attn_scalar=16, sliding_window=8),
}
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(7))


def checkpoint(directory: Path, config: Any, *, dtype: torch.dtype = torch.float32, shard: str = "40KB") -> Path:
    """A saved random model, its biases and norms moved off their start, in several shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def checkpoint_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load_checkpoint(directory: Path, **settings: Any) -> PreTrainedModel:
    return load_model(resolve(str(directory)), **{"quant": "none", "compute_dtype": torch.float32, **settings})


def compressed(
    directory: Path, base: BaseWeightsConfig, calibration: torch.Tensor | None = None, **load: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A checkpoint whose base was compressed and is read back, and the records of its layers."""
    writer = BaseWriter(directory / "base", "key")
    load_checkpoint(directory, placer=Compressor(base, writer, calibration), **load)
    writer.finish({})
    return load_checkpoint(directory, compressed=compressed_layers(directory / "base"), **load), writer.layers


def one_file_checkpoint(directory: Path, config: Any = None) -> tuple[Path, dict[str, torch.Tensor]]:
    checkpoint(directory, config or CHECKPOINT_CONFIGS["llama"], shard="1GB")
    return directory / "model.safetensors", load_file(directory / "model.safetensors")


def write_llama(directory: Path, **sizes: int) -> Path:
    """A random Llama of two blocks, or other `sizes`, with its tokenizer, as safetensors."""
    torch.manual_seed(0)
    own = {"tie_word_embeddings": True, "hidden_size": 64, "vocab_size": 400}
    config = LlamaConfig(**(LM_SIZES | own | sizes))
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def one_layer_recipe(root: Path, **changes: Any) -> Recipe:
    """`recipe` with one block, and one adapter in it: its memory is planned in half a second."""
    if not (root / "model").exists():
        write_llama(root / "model", num_hidden_layers=1)
    return tiny_recipe(root, **{"adapter__targets": ["q_proj"]} | changes)


def write_data(directory: Path) -> tuple[Path, Path]:
    """Two sources: a sum to complete, and a letter to choose."""
    directory.mkdir(parents=True, exist_ok=True)
    sums, letters = directory / "sums.jsonl", directory / "letters.jsonl"
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alphabet = "abcdefghijklmnopqrstuvwx"
    choices = []
    for index, letter in enumerate(alphabet[:-1]):
        row = {"task": "letters", "id": str(index), "context": "", "question": f"Which letter follows {letter}?"}
        choices.append(row | {"choices": [alphabet[index + 1], letter], "answer": 0})
    letters.write_text("".join(json.dumps(row) + "\n" for row in choices))
    return sums, letters


def tiny_recipe(root: Path, **changes: Any) -> Recipe:
    """NF4, DoRA of rank 4 with dropout, two sources, six steps; `changes` are dotted settings with _ for the dot."""
    model = root / "model"
    if not model.exists():
        write_llama(model)
    sums, letters = write_data(root / "data")
    document: dict[str, Any] = {
        "model": {"source": str(model), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        "data": {"mix": [{"source": str(sums)}, {"source": str(letters)}], "max_length": 96},
        "train": {"steps": 6, "batch": 4, "lr": 1e-3, "warmup": 0.3, "optimizer": "adamw", "checkpoint_every": 2},
        "eval": {"limit": 4},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        document.setdefault(section, {})[key] = value
    return recipe_from(
        {name: {key: each for key, each in section.items() if each is not ...} for name, section in document.items()}
    )


ADAPTER = "adapter/adapter_model.safetensors"
UNEVALUATED: dict[str, Any] = {"eval__tasks": [], "eval__limit": ...}
"""Changes of `tiny_run.recipe`."""


def timeless(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def training_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of the training steps among these."""
    return [line for line in timeless(run) if "loss" in line]


def same_tensors(first: Path, second: Path) -> None:
    """Two safetensors files hold the same tensors, bit for bit."""
    assert_equal_tensors(load_file(first), load_file(second))


def assert_same_run(one: Path, two: Path, step: int = 6) -> None:
    """Metrics, adapter and the whole state after `step` steps are the same."""
    assert timeless(one) == timeless(two)
    same_tensors(one / "adapter/adapter_model.safetensors", two / "adapter/adapter_model.safetensors")
    for file in ("optimizer.safetensors", "random.safetensors", "adapter/adapter_model.safetensors"):
        same_tensors(one / f"checkpoints/step-{step}" / file, two / f"checkpoints/step-{step}" / file)
    first, second = (json.loads((run / f"checkpoints/step-{step}/state.json").read_text()) for run in (one, two))
    assert first == second


def assert_close_runs(one: Path, two: Path) -> None:
    """The same losses, norms and adapters, but for the order of sums."""
    for first, second in zip(timeless(one), timeless(two), strict=True):
        assert first.keys() == second.keys()
        if "eval" in first:
            assert second["average"]["nll"] == pytest.approx(first["average"]["nll"], rel=1e-5)
            continue
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)
        for key in ("step", "lr", "num_tokens", "num_label_tokens", "num_examples"):
            assert first[key] == second[key]
        sums = (
            {(task, key): numbers[key] for task, numbers in each["tasks"].items() for key in ("nll_sum", "num_tokens")}
            for each in (first, second)
        )
        assert next(sums) == pytest.approx(next(sums), rel=1e-6)
    adapters = [load_file(run / ADAPTER) for run in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-4, atol=1e-5)


def train_until(recipe: Recipe, run: Path, step: int, *, resume: bool = False) -> None:
    """Train, and stop in `step` as after a signal."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=rf"stopped after step {step}; saved to .*step-{step}"):
            train_run(recipe, run, resume=resume)


def assert_resumes(recipe: Recipe, whole: Path, run: Path, *, stop_at: int, step: int = 6) -> None:
    """Stopped and resumed, a run equals `whole` bit for bit, whatever the generator of the second process."""
    train_until(recipe, run, stop_at)
    torch.manual_seed(999)
    train_run(recipe, run, resume=True)
    assert_same_run(run, whole, step=step)


def in_batches(patch: pytest.MonkeyPatch, action: Callable[[int, Any, torch.Tensor, dict[str, Any]], Any]) -> None:
    """Call `action(number, loss, ids, options)` after each forward pass of a micro-batch, numbered from 1.

    What it returns, if anything, takes the place of the loss.
    """
    real, numbers = passes.batch_loss, itertools.count(1)

    def acting(model: Any, input_ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        loss = real(model, input_ids, *rest, **options)
        return action(next(numbers), loss, input_ids, options) or loss

    patch.setattr(passes, "batch_loss", acting)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ask the next runs to stop while they compute `step`, as a signal does; `monkeypatch.undo` takes it back."""
    evaluate_and_save = Trainer.evaluate_and_save

    def interrupt(trainer: Trainer) -> None:
        trainer.stop.requested = trainer.step == step
        evaluate_and_save(trainer)

    monkeypatch.setattr(Trainer, "evaluate_and_save", interrupt)


def killed_at_second_write(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Ctrl-C when a compressed base writes its second block; the files that it begins to write, then and later."""
    written, write = list[Path](), store.write_tensors

    def killed(path: Path, tensors: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(store, "write_tensors", killed)
    return written


def make_gradients_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch's gradient is NaN, its reported losses are not; `monkeypatch.undo` takes it back."""

    def poisoned(_number: int, loss: Any, _ids: Tensor, _options: Any) -> Any:
        return type(loss)(loss.nll_sum * float("nan"), loss.example_nll)

    in_batches(monkeypatch, poisoned)


def run_processes(size: int, function: Callable[..., None], *args: Any, timeout: float = 240) -> list[str]:
    """Call `function(rank, *args)` in `size` processes with torchrun's environment variables.

    Returns of each process '' or its traceback.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
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


def free_port() -> int:
    """A port that no process uses."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _one(rank: int, size: int, port: int, end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    _told(end, function, (rank, *args))


def _told(end: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        function(*args)
        end.send("")
    except BaseException:
        end.send(traceback.format_exc())
    os._exit(0)  # nothing of the test process is to be torn down here


def run_from_server(function: Callable[..., None], *args: Any, preload: Sequence[str], timeout: float = 240) -> str:
    """Call `function(*args)`, pickled, in a process forked from one that has only imported the modules `preload` of the
    first call. Returns '' or its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_told, args=(sender, function, args))
    process.start()
    fault: str = receiver.recv() if receiver.poll(timeout) else f"nothing within {timeout} s"
    process.join(5)
    process.kill()
    return fault


def start_main(main: Callable[[], None], *argv: str, output: Path) -> ForkProcess:
    """Start a program in a process of its own, which writes `output`/stdout and `output`/stderr."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(main, argv, output))
    process.start()
    return process


def _main(main: Callable[[], None], argv: tuple[str, ...], output: Path) -> None:
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs without it
    sys.argv = list(argv)
    main()


EXPERT_SIZES: dict[str, Any] = _BLOCKS | {"hidden_size": 64, "vocab_size": 400, "tie_word_embeddings": False}
EXPERT_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE = {"intermediate_size": 128}
SMALL = {"moe_intermediate_size": 64}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
SHARED = {"shared_expert_intermediate_size": 64}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
GROUPS = {"n_group": 2, "topk_group": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
HYBRID = LINEAR | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
LOCAL = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": LOCAL,
    "qwen2_moe": DENSE | SMALL | FOUR | SHARED,
    "qwen3_moe": DENSE | SMALL | FOUR | {"head_dim": 16},
    "olmoe": FOUR | {"intermediate_size": 64},
    "gpt_oss": LOCAL | SLIDING,
    "deepseek_v2": DENSE | SMALL | ROUTED | LATENT | {"q_lora_rank": None, "topk_method": "greedy", "head_dim": 8},
    "deepseek_v3": DENSE | SMALL | ROUTED | LATENT | GROUPS | {"q_lora_rank": 32},
    "glm4_moe": DENSE | SMALL | ROUTED | GROUPS | {"head_dim": 16},
    "granitemoe": LOCAL,
    "qwen3_5_moe_text": SMALL | FOUR | SHARED | HYBRID,
    "lfm2_moe": DENSE | SMALL | FOUR | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": DENSE | SMALL | FOUR | SHARED | HYBRID,
    "minimax_m2": LOCAL | {"head_dim": 16},
    "glm4_moe_lite": DENSE | SMALL | ROUTED | LATENT | GROUPS | {"q_lora_rank": 32},
}


def mixture(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of an architecture in eval mode, every parameter random, so that no two experts are alike."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(EXPERT_SIZES | MIXTURES[name] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.ndim > 1 else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def write_mxfp4(directory: Path, **changes: Any) -> Path:
    """A gpt-oss whose experts are stored in MXFP4, as the published checkpoints are."""
    generator = torch.Generator().manual_seed(5)
    model = mixture("gpt_oss", torch.bfloat16, **changes)
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value.contiguous()
            continue
        experts, columns, rows = value.shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(directory)
    return directory


def write_mixture(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of `make` with a tokenizer, in the form in which such models are published."""
    mixture(name, dtype).save_pretrained(directory, max_shard_size="150KB")
    tokenizer().save_pretrained(directory)
    return directory


def adapted_mixture(
    directory: Path, name: str = "qwen3_moe", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, dict[str, AdaptedLinear]]:
    """A dense mixture in float64 with adapters off their start."""
    if not (directory / "config.json").exists():
        write_mixture(directory, name)
    model = load_model(resolve(str(directory)), quant="none", compute_dtype=dtype)
    options = {"rank": 3, "alpha": 6.0, "dtype": dtype, "targets": ["v_proj", "experts"]} | options
    layers = inject(model, generator=torch.Generator().manual_seed(1), **options)
    move_adapters_(layers)
    return model.eval(), layers


def parts_of_experts(matrix: torch.Tensor, num_experts: int) -> list[torch.Tensor]:
    """(experts * out, in) as the matrices that have components of their own."""
    return list(matrix.view(num_experts, -1, matrix.shape[1]))


TEXT: dict[str, Any] = EXPERT_SIZES | {"intermediate_size": 128, "max_position_embeddings": 256, "eos_token_id": 3}
del TEXT["tie_word_embeddings"]
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
TOWER: dict[str, Any] = VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
QWEN: dict[str, Any] = VISION | {"depth": 2, "num_heads": 2, "out_hidden_size": 64}
QWEN_IDS = {"image_token_id": 396, "video_token_id": 397, "vision_start_token_id": 398, "vision_end_token_id": 399}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def multimodal_config(family: str) -> Any:
    """Blocks of 64 fit into the rows of every text layer; Gemma 3, Qwen3-VL and Qwen3.5 tie their heads."""
    if family == "gemma3":
        text = TEXT | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
        ids = {"image_token_id": 396, "boi_token_id": 397, "eoi_token_id": 398, "mm_tokens_per_image": 4}
        return Gemma3Config(text_config=text, vision_config=TOWER | {"vision_use_head": False}, **ids)
    if family == "mistral3":
        text = TEXT | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
        vision = TOWER | {"model_type": "pixtral", "head_dim": 16}
        return Mistral3Config(text_config=text, vision_config=vision, image_token_id=396, tie_word_embeddings=False)
    if family == "qwen2_5_vl":
        vision = QWEN | {"fullatt_block_indexes": [1]}
        text = TEXT | {"rope_parameters": ROPE}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    if family == "qwen3_5":
        rope = ROPE | {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        text = TEXT | LINEAR | {"head_dim": 16, "num_hidden_layers": 4, "rope_parameters": rope}
        vision = QWEN | {"num_position_embeddings": 16}
        return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **QWEN_IDS)
    assert family == "qwen3_vl"
    vision = QWEN | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **QWEN_IDS)


FAMILIES = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl")
FAMILIES += ("qwen3_5",) if hasattr(transformers, "Qwen3_5Config") else ()  # not in transformers 5.0
# Names in the model -> names in the files that the publishers gave to the Hub.
_TEXT_APART = ((r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."))
_TOWER = (r"^model\.vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.")
_PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": (*_TEXT_APART, _TOWER, (r"^model\.", "")),
    "mistral3": (*_TEXT_APART, (r"^model\.", "")),
    "qwen2_5_vl": ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
}


def published_name(family: str, name: str) -> str:
    """The name that a tensor has in the family's files on the Hub."""
    for pattern, replacement in _PUBLISHED.get(family, ()):
        found = re.sub(pattern, replacement, name)
        if found != name:
            return found
    return name


def write_published_config(file: Path, family: str) -> None:
    """Change a config.json to the form in which the publishers gave it to the Hub."""
    found = json.loads(file.read_text())
    if family == "mistral3":  # says nothing of tying, and transformers' default is wrong for it
        del found["tie_word_embeddings"]
    if family == "qwen2_5_vl":  # one level for the whole and its text part, and the older names of rotary settings
        text = found.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        found = {**text, **found}
    file.write_text(json.dumps(found))


def write_multimodal(directory: Path, family: str, *, published: bool = True) -> dict[str, torch.Tensor]:
    """Save a model in bfloat16 with a tokenizer and a processor's file; returns the tensors of its files.

    `published`: under the names of the Hub's files, else under those of the model in transformers 5.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(multimodal_config(family), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms and biases start at 1 and 0
    tied = set(model.all_tied_weights_keys)
    tensors = {
        published_name(family, name) if published else name: tensor.detach().to(torch.bfloat16).clone()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    model.config.dtype = model.config.text_config.dtype = model.config.vision_config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if published:
        write_published_config(directory / "config.json", family)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    tokenizer().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "of a test"}\n')
    return tensors


CPU = torch.device("cpu")
needs_division = pytest.mark.skipif(not CAN_DIVIDE, reason="this torch cannot divide packed weights")
LENGTHS = (9, 4, 7, 12, 3)


@contextmanager
def dividing_processes() -> Iterator[Processes]:
    """Processes that divide the base."""
    with processes_of_launch() as processes:
        yield processes.dividing(base=True)


def write(directory: Path, family: str) -> Path:
    """Llama: tied, blocks of the scales cross the rows of down_proj. Qwen3: a head of its own. Both 64 wide."""
    if (directory / "config.json").exists():
        return directory
    if family == "qwen3_moe":
        return write_mixture(directory, family)
    if family == "llama":
        return write_llama(directory)
    torch.manual_seed(0)
    sizes = LM_SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=False)).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def load_sharded(
    source: Path, processes: Processes | None = None, parallel: str = "shard", **options: Any
) -> PreTrainedModel:
    """A base in float32, whole, or divided among the processes; `options` of `load_model`."""
    mesh = None if processes is None else mesh_of(processes, CPU, parallel)
    options = {"quant": "nf4", "compute_dtype": torch.float32} | options
    return load_model(resolve(str(source)), placer=None if mesh is None else ShardedBase(mesh), **options)


def adapt_sharded(model: PreTrainedModel, *, gates: bool = False, checkpointing: bool = True, **options: Any) -> None:
    """Adapters off their start, in float32."""
    settings: dict[str, Any] = {"rank": 4, "dtype": torch.float32, "generator": torch.Generator().manual_seed(1)}
    layers = inject(model, **settings | options)
    if gates:
        for layer in layers.values():
            layer.add_gate()
    move_all_parameters_(model, scale=0.02)
    if checkpointing:
        recompute_activations(model)
    model.train()


def example_of(number: int, length: int) -> MicroBatch:
    """One example, half of which is labelled."""
    ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, : length // 2] = IGNORED
    ones = torch.ones_like(ids)
    return MicroBatch(ids, ones, labels, torch.zeros(1, dtype=torch.int64), ["task"], [str(number)])


def sharded_step(rank: int = 0, size: int = 1) -> Step:
    """Five micro-batches, of which a process gets every `size`-th."""
    whole = [example_of(number, length) for number, length in enumerate(LENGTHS)]
    labelled = sum(int((each.labels[:, 1:] != IGNORED).sum()) for each in whole)
    return Step(whole[rank::size], labelled, sum(LENGTHS), len(whole), {"task": labelled})


def train_plainly(
    model: PreTrainedModel, processes: Processes, *, num_steps: int = 3
) -> list[tuple[float, dict[str, Tensor]]]:
    """The loss and the gradients of each step, all over the processes; between them plain descent."""
    found = []
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for _ in range(num_steps):
        mine = even_passes(sharded_step(processes.rank, processes.size), processes)
        metrics, _ = step_gradient(model, mine)
        processes.sum_gradients_(list(parameters.values()))
        gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
        found.append((sum(processes.gather(metrics["loss"])), {name: each.clone() for name, each in gradients.items()}))
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name].sub_(gradient, alpha=0.05)
        model.zero_grad()
    return found


def norm_counts(processes: Processes, model: PreTrainedModel, num_steps: int = 3) -> tuple[list[int], Any]:
    """How many norms each step computed from the rows of each process, and what `train` returns."""
    counts: list[int] = []
    before = passes.refresh
    passes.refresh = lambda layers: counts.append(before(layers))  # type: ignore[assignment,func-returns-value]
    try:
        found = train_plainly(model, processes, num_steps=num_steps)
    finally:
        passes.refresh = before
    return counts, found


def assert_same_steps(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Losses and gradients that differ by rounding alone, relative to the largest entry of each tensor."""
    for (loss, gradients), (right, others) in zip(found, expected, strict=True):
        assert abs(loss - right) <= tolerance * abs(right), (loss, right)
        assert gradients.keys() == others.keys()
        assert gradients
        for name, gradient in gradients.items():
            most = float(others[name].abs().max())
            error = float((gradient - others[name]).abs().max())
            assert error <= 3 * tolerance * most, (name, error, most)


def master(optimizer: AdapterOptimizer, key: str) -> Tensor:
    """The full float32 value of a parameter, as a new tensor."""
    parameter, low = optimizer.parameters[key].detach(), optimizer.state_tensors().get(f"residual/{key}")
    return parameter.clone() if low is None else join_float32(parameter, low)


def num_resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of this process, each memory once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def num_adapter_bytes(model: nn.Module) -> int:
    """Bytes that adapters add: their parameters, and what DoRA keeps of the base."""
    owned = [(*each.parameters(recurse=False), *each.buffers(recurse=False)) for each in adapted_layers(model).values()]
    return sum(tensor.untyped_storage().nbytes() for tensors in owned for tensor in tensors)


NUM_BLOCKS = 5
STREAMED_QUANTIZATION = Quantization("nf4", 64, True, ("lm_head",))
STREAMED_IDS = torch.randint(0, 97, (3, 2, 12), generator=torch.Generator().manual_seed(5))
"""Three micro-batches of two rows."""


class LateCopies:
    """Destroys a slot when its copy may begin, and copies only when it is waited for."""

    def __init__(self, device: torch.device, slots: Sequence[Tensor]) -> None:
        self.num_copies = 0
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._in_use = [False] * len(slots)
        for slot in slots:
            slot.fill_(0xAA)

    def begin(self, source: Tensor, target: Tensor, slot: int) -> None:
        assert not self._in_use[slot]
        target.fill_(0xAA)
        self._pending[slot] = (source, target)

    def wait(self, slot: int) -> None:
        self._in_use[slot] = True
        if slot in self._pending:
            source, target = self._pending.pop(slot)
            target.copy_(source)
            self.num_copies += 1

    def release(self, slot: int) -> None:
        self._in_use[slot] = False


def stream_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run with base.residency host compute on a CPU, with late copies."""
    monkeypatch.setattr(prepare, "_machine_faults", lambda *_: [])
    monkeypatch.setattr(load_base, "HostResidency", partial(HostResidency, copies=LateCopies))


def write_source(directory: Path, **sizes: Any) -> Path:
    """A checkpoint of `NUM_BLOCKS` blocks with a head of its own."""
    sizes = CHECKPOINT_SIZES | {"num_hidden_layers": NUM_BLOCKS, "tie_word_embeddings": False} | sizes
    return checkpoint(directory, LlamaConfig(**sizes), shard="1GB")


def resident_model(source: Path, quant: Any = "nf4") -> PreTrainedModel:
    """All in memory."""
    return load_model(resolve(str(source)), quant=quant, compute_dtype=torch.float32)


def adapt_streamed(model: PreTrainedModel, kind: Any = "dora", targets: Any = "all-linear") -> PreTrainedModel:
    """Put adapters on, move them off their start, and let blocks be computed again in the backward pass."""
    generator = torch.Generator().manual_seed(1)
    inject(model, kind=kind, rank=4, targets=targets, dropout=0.1, dtype=torch.float32, generator=generator)
    move_all_parameters_(model, scale=0.02)
    recompute_activations(model)
    return model


def streamed_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of a step of three micro-batches, and under "logits" what the model says in evaluation."""
    torch.manual_seed(3)
    model.train()
    refresh(layer for layer in adapted_layers(model).values() if layer.base.residency is None)
    for ids in STREAMED_IDS.to(model.device):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=STREAMED_IDS[0].to(model.device)).logits
    assert all(gradient is not None for gradient in found.values())
    return {**found, "logits": logits}  # type: ignore[dict-item]


@cache
def of_resident_base(source: Path, kind: str, targets: tuple[str, ...] | str = "all-linear") -> dict[str, Tensor]:
    """`gradients` of a base in memory, which is to be found with streamed blocks; not to be changed."""
    chosen = targets if isinstance(targets, str) else list(targets)
    return streamed_gradients(adapt_streamed(resident_model(source), kind, chosen))


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CURVED_LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")


def float64_model(architecture: str) -> Any:
    """A model that computes in float64 throughout: transformers' eager attention and its RMSNorm go by float32."""
    model = base_model(architecture, dtype=torch.float64)
    if architecture != "gemma2":  # it has eager attention only
        model.set_attn_implementation("sdpa")
    widen_norms(model)
    return model.requires_grad_(False)


def widen_norms(model: Any) -> None:
    """Replace transformers' RMSNorms, in place."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            shift = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            norm = torch.nn.RMSNorm(module.weight.shape, eps=1e-6, dtype=torch.float64)
            norm.weight = torch.nn.Parameter(module.weight.detach() + shift, requires_grad=False)
            replace_module(model, name, norm)


def keep_mask(shape: torch.Size) -> Tensor:
    """A third of the weights is pruned; True = keep."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) > 1 / 3


def _curved(
    model: Any, names: Sequence[str], *, masked: bool, moved: bool = True, rank: int = 2, **options: Any
) -> Any:
    """Adapters on these layers or stacks, off their start unless told otherwise; pruned there if masked."""
    for name in names if masked else ():
        module = model.get_submodule(name)
        weight = module.weight.detach()
        keep = keep_mask(weight.shape)
        pruned, bits = weight * keep, mask_bits(keep)
        stack = name in STACKS
        replace_module(
            model, name, FrozenExperts(pruned, EXPERTS, None, bits) if stack else FrozenLinear(pruned, None, bits)
        )
    options |= {"alpha": 3.0, "dtype": torch.float64, "generator": torch.Generator().manual_seed(1)}
    layers = inject(model.requires_grad_(False), rank=rank, targets=list(names), masked=masked, **options)
    if moved:
        move_adapters_(layers)
    return model


def float64_adapted(
    architecture: str = "llama", *, kind: Any = "dora", moved: bool = True, rank: int = 2, masked: bool = False
) -> Any:
    """A float64 model with adapters on `CURVED_LAYERS`."""
    return _curved(float64_model(architecture), CURVED_LAYERS, kind=kind, moved=moved, rank=rank, masked=masked)


def curved_batches() -> list[MicroBatch]:
    """Two micro-batches, the second with padding; prompts without labels."""
    ids = [torch.tensor([[1, 17, 300, 5, 44, 260]]), torch.tensor([[9, 120, 3, 30, 7], [8, 2, 91, 0, 0]])]
    masks = [torch.ones_like(ids[0]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])]
    made = []
    for number, (rows, mask) in enumerate(zip(ids, masks, strict=True)):
        labels = rows.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        names = [f"{number}-{row}" for row in range(len(rows))]
        made.append(MicroBatch(rows, mask, labels, torch.zeros(len(rows), dtype=torch.int64), ["task"], names))
    return made


def dense_curvature(
    model: Any, layers: tuple[str, ...], parts: tuple[str, ...], *, curvature: str, held: bool
) -> NDArray[np.float64]:
    """The whole matrix, from `torch.autograd.functional` and the definition; parameters end to end, layer by layer."""
    by_update, adapters = logits_by_update(model, held=held), adapted_layers(model)
    starts = {(name, part): adapters[name].get_parameter(part).detach() for name in layers for part in parts}
    start = torch.cat([each.reshape(-1) for each in starts.values()])

    def logits(flat: Tensor) -> Tensor:
        pieces = zip(starts.items(), flat.split([each.numel() for each in starts.values()]), strict=True)
        given = {key: piece.view_as(value) for (key, value), piece in pieces}
        updates = {n: update_of(adapters[n], lora_A=given[n, "lora_A"], lora_B=given[n, "lora_B"]) for n in layers}
        return by_update(updates, {name: value for (name, part), value in given.items() if part == "magnitude"})

    if curvature == "hessian":
        return torch.autograd.functional.hessian(  # type: ignore[no-any-return,union-attr]
            lambda flat: nn.functional.cross_entropy(logits(flat), all_targets()), start, vectorize=True
        ).numpy()
    jacobian = torch.func.jacfwd(logits)(start)  # (tokens, vocabulary, size)
    p = torch.softmax(logits(start), -1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return (torch.einsum("tvi,tvw,twj->ij", jacobian, inner, jacobian) / len(p)).numpy()  # type: ignore[no-any-return]


def labelled_tokens(batch: MicroBatch) -> Tensor:
    """The labelled tokens, row by row."""
    return torch.stack([label for row in batch.labels[:, 1:] for label in row if label != -100])


def merged_by_definition(base: Tensor, update: Tensor, magnitude: Tensor | None, *, held: bool, masked: bool) -> Tensor:
    """m (W + D) / ||W + D||_row, with W and D zero off the mask; differentiable by D and m."""
    weight = base + update
    if masked:
        weight = weight * keep_mask(weight.shape)
    if magnitude is None:
        return weight
    norm = weight.square().sum(1).sqrt()
    return weight * (magnitude / (norm.detach() if held else norm))[:, None]


# ------------------------------------------------------------------------------------------------ stacks of experts
EXPERTS = 8
SIZES: dict[str, Any] = {"hidden_size": 16, "moe_intermediate_size": 8, "intermediate_size": 16, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": EXPERTS}
STACKS = ("model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj")


def plain_mixture() -> Any:
    """transformers' own mixture of experts in float64; its router's softmax alone is float32."""
    model = mixture("qwen3_moe", torch.float64, **SIZES)
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("eager")
    widen_norms(model)
    return model.requires_grad_(False)


def curved_mixture(directory: Path, *, kind: Any, masked: bool = False) -> Any:
    """The same with adapters of rank 2 on `STACKS`, off their start, pruned there if masked."""
    if not (directory / "config.json").exists():
        mixture("qwen3_moe", torch.float64, **SIZES).save_pretrained(directory)
    model = load_model(resolve(str(directory)), quant="none", compute_dtype=torch.float64)
    widen_norms(model)
    return _curved(model, STACKS, kind=kind, masked=masked).eval()


# ------------------------------------------------------------------------------------------------ by whole updates
def update_of(layer: Any, **changed: Tensor) -> Tensor:
    """s B A from the present factors or others, (out, in), or (experts * out, in) of a stack."""
    a, b = (changed.get(name, layer.get_parameter(name).detach()) for name in ("lora_A", "lora_B"))
    product = layer.alpha / layer.rank * (b @ a)
    return product.flatten(0, -2)


def logits_by_update(model: Any, *, held: bool) -> Callable[..., Tensor]:
    """From s B A and magnitudes of adapted layers (default: the present ones) to the logits of all labelled tokens.

    The function runs a model without adapters on weights that are merged here.
    """
    layers = adapted_layers(model)
    plain = plain_mixture() if STACKS[0] in layers else float64_model("llama")

    def logits(updates: Mapping[str, Tensor], magnitudes: Mapping[str, Tensor] | None = None) -> Tensor:
        weights = {}
        for name, layer in layers.items():
            path = name if name in STACKS else f"{name}.weight"
            weight = plain.get_parameter(path).detach()
            own = None if layer.magnitude is None else layer.magnitude.detach()
            magnitude = (magnitudes or {}).get(name, own)
            magnitude = None if magnitude is None else magnitude.flatten()
            update = updates[name] if name in updates else update_of(layer)
            flat = merged_by_definition(weight.flatten(0, -2), update, magnitude, held=held, masked=layer.masked)
            weights[path] = flat.view(weight.shape)
        found = []
        for batch in curved_batches():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            with sdpa_kernel(SDPBackend.MATH):
                out = functional_call(plain, weights, kwargs=inputs).logits[:, :-1]
            found.append(out[batch.labels[:, 1:] != -100])
        return torch.cat(found)

    return logits


def all_targets() -> Tensor:
    """The labelled tokens of all batches."""
    return torch.cat([labelled_tokens(batch) for batch in curved_batches()])


STEP_LENGTHS = (17, 12, 9, 9, 8, 5, 3, 1, 6, 2)


def examples(lengths: Sequence[int] = STEP_LENGTHS, tasks: str = "ab", seed: int = 0) -> list[TokenizedExample]:
    """Random ids (never 0), labels anywhere but on the first token; a task for each letter, in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.6
        mask[-1], mask[0] = True, False
        ids = rng.integers(1, 50, length).astype(np.int32)
        found.append(TokenizedExample(tasks[number % len(tasks)], str(number), ids, mask))
    return found


def step_of(found: Sequence[TokenizedExample], batching: Batching) -> Step:
    """All of them in one step."""
    names = list(dict.fromkeys(each.task for each in found))
    labels = {name: sum(int(each.loss_mask.sum()) for each in found if each.task == name) for name in names}
    micro = micro_batches(found, batching, names)
    return Step(micro, sum(labels.values()), sum(map(len, found)), len(found), labels)
