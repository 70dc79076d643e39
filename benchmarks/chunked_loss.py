"""The loss of a 128k vocabulary without its logits: bytes, time and gradients, chunked against plain.

    OMP_NUM_THREADS=2 python benchmarks/chunked_loss.py [--out benchmarks/results/chunked_loss.json] [--smoke]
        [--part bytes|gradients|time]

4,096 labelled tokens, a vocabulary of 128,256, bf16, a frozen head, loss = mean NLL. Plain is what transformers does:
all logits, widened to float32, then torch's cross-entropy. Bytes are those that a step needs beside hidden states, head
and labels, gradient of the hidden states included: peaks of forward and backward by `LiveBytes`, on fake tensors for a
hidden size of 4,096 and on real ones for 1,024. Gradients: the largest difference from the plain loss in float32 on the
same values, in units of the largest gradient, for the chunked and the plain loss in bf16 and for the chunked one in
float32. Time: forward and backward in turns, hidden size 1,024. A part that is asked for is added to what the file has.
"""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from typing import Any

import torch
from measure import facts, in_turns, parser_of, ratio, save, spread, write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from qdora.memory.allocator import keep_freed_memory
from qdora.ops.loss import auto_chunk, chunked_nll
from qdora.plan.live_bytes import LiveBytes

VOCABULARY, NUM_TOKENS = 128_256, 4096
FAKE_HIDDEN, REAL_HIDDEN = 4096, 1024
REFERENCE_TOKENS = 512
"""Tokens of a slice of the float32 reference; each token's loss is its own."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """The asked parts, added to what the result file holds."""
    parser = parser_of(__doc__, "chunked_loss", smoke="a small vocabulary")
    parser.add_argument("--part", choices=("bytes", "gradients", "time"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(2)
    vocabulary, num_tokens, sizes = VOCABULARY, NUM_TOKENS, (FAKE_HIDDEN, REAL_HIDDEN)
    if args.smoke:
        vocabulary, num_tokens, sizes = 4000, 20_000, (16, 16)
    parts = ("bytes", "gradients", "time") if args.part is None else (args.part,)
    # Smoke results are not added to anything.
    result = {} if args.smoke or not args.out.is_file() else json.loads(args.out.read_text())
    result |= facts("OMP_NUM_THREADS=2 python benchmarks/chunked_loss.py")
    result |= {"vocabulary": vocabulary, "num_tokens": num_tokens, "chunk": auto_chunk(vocabulary, 2)}
    for part in parts:
        result[part] = part_result(part, num_tokens, sizes, vocabulary, 2 if args.smoke else args.repeats)
        save(args.out, result)
    write(args.out, result)


def part_result(part: str, num_tokens: int, sizes: tuple[int, int], vocabulary: int, repeats: int) -> dict[str, Any]:
    """What a part of the result file holds."""
    given = inputs(num_tokens, sizes[1], vocabulary)
    if part == "gradients":
        return {"hidden": sizes[1], **gradients(given)}
    if part == "time":
        return {"hidden": sizes[1], **times(given, repeats)}
    real = bytes_of_both(given)
    with FakeTensorMode():
        large = bytes_of_both(inputs(num_tokens, sizes[0], vocabulary))
    return {"fake": {"hidden": sizes[0], **large}, "real": {"hidden": sizes[1], **real}}


def inputs(num_tokens: int, hidden: int, vocabulary: int) -> Inputs:
    """Hidden states (tokens, hidden) that want a gradient and head (vocabulary, hidden) in bf16, labels (tokens,).

    Logits from N(0, 3^2): far from uniform, as those of a model are.
    """
    torch.manual_seed(0)
    states = torch.empty(num_tokens, hidden, dtype=torch.bfloat16).normal_()
    head = torch.empty(vocabulary, hidden, dtype=torch.bfloat16).normal_(0.0, 3.0 * hidden**-0.5)
    return states.requires_grad_(), head, torch.randint(vocabulary, (num_tokens,))


def chunked(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL."""
    return chunked_nll(hidden, head, labels).mean()


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The same from all logits."""
    return cross_entropy((hidden @ head.T).float(), labels)


LOSSES: dict[str, Loss] = {"chunked": chunked, "plain": plain}


def forward_backward(loss: Loss, given: Inputs) -> None:
    """From no gradient to a gradient."""
    given[0].grad = None
    loss(*given).backward()  # type: ignore[no-untyped-call]


def bytes_of_both(given: Inputs) -> dict[str, Any]:
    """Peak of each beside what is given, and their ratio."""
    peaks = {}
    for name, loss in LOSSES.items():
        given[0].grad = None
        gc.collect()
        with LiveBytes() as live:
            forward_backward(loss, given)
            peaks[name] = live.peak_bytes
    return {"peak_bytes": peaks, "plain / chunked": peaks["plain"] / peaks["chunked"]}


def gradients(given: Inputs) -> dict[str, float]:
    """Largest difference of each gradient from the float32 reference, over the reference's largest entry."""
    hidden, head, labels = given
    wide = (hidden.detach().float(), head.float(), labels)
    expected = torch.empty_like(wide[0])
    for start in range(0, len(labels), REFERENCE_TOKENS):
        rows = slice(start, start + REFERENCE_TOKENS)
        part = wide[0][rows].clone().requires_grad_()
        cross_entropy(part @ wide[1].T, labels[rows], reduction="sum").backward()  # type: ignore[no-untyped-call]
        assert part.grad is not None
        expected[rows] = part.grad / len(labels)
    largest = expected.abs().max()

    def difference(loss: Loss, values: Inputs) -> float:
        forward_backward(loss, values)
        assert values[0].grad is not None
        return float((values[0].grad.float() - expected).abs().max() / largest)

    found = {f"{name}, bfloat16": difference(loss, given) for name, loss in LOSSES.items()}
    return {**found, "chunked, float32": difference(chunked, (wide[0].requires_grad_(), *wide[1:]))}


def times(given: Inputs, repeats: int) -> dict[str, Any]:
    """Seconds of forward and backward, and the ratios of the same round."""
    keep_freed_memory()
    calls = {name: functools.partial(forward_backward, loss, given) for name, loss in LOSSES.items()}
    seconds = in_turns(calls, repeats)
    return {
        "seconds": {name: spread(found) for name, found in seconds.items()},
        "chunked / plain": ratio(seconds["chunked"], seconds["plain"]),
    }


if __name__ == "__main__":
    main()
