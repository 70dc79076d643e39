"""The definitions, written out in float64 and plain loops. Imports nothing of qdora.

Every expectation of a numeric test comes from here or from a hand-computed number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def low_rank(lora_a: Array, lora_b: Array, scaling: float, mask: Array | None = None) -> Array:
    """s M o (B A), row by row; every entry of M is 1 without a mask."""
    update = np.zeros((lora_b.shape[0], lora_a.shape[1]))
    for i in range(len(update)):
        for k in range(lora_a.shape[0]):
            update[i] += scaling * lora_b[i, k] * lora_a[k]
        if mask is not None:
            update[i, ~mask[i]] = 0.0
    return update


def row_norm(weight: Array, lora_a: Array, lora_b: Array, scaling: float, mask: Array | None = None) -> Array:
    """||W + s M o (B A)|| of each row, from the sum itself."""
    total = weight + low_rank(lora_a, lora_b, scaling, mask)
    return np.array([math.sqrt(sum(float(entry) ** 2 for entry in row)) for row in total])


def gain(magnitude: Array | None, norm: Array) -> Array:
    """g = m / norm of each row, 0 for a zero row; 1 without a magnitude."""
    if magnitude is None:
        return np.ones_like(norm)
    return np.array([m / n if n > 0 else 0.0 for m, n in zip(magnitude, norm, strict=True)])


def merged_weight(
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: float,
    magnitude: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """g_i (w_ij + s m_ij sum_k b_ik a_kj)."""
    norm = row_norm(weight, lora_a, lora_b, scaling, mask)
    merged: Array = gain(magnitude, norm)[:, None] * (weight + low_rank(lora_a, lora_b, scaling, mask))
    return merged


def forward(
    x: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: float,
    magnitude: Array | None = None,
    bias: Array | None = None,
    keep: Array | None = None,
    norm: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """y_t = g (W x_t + s M o (B A) (keep_t x_t)) + bias for tokens x (tokens, in); `norm` overrides the row norm."""
    if norm is None:
        norm = row_norm(weight, lora_a, lora_b, scaling, mask)
    update, gains = low_rank(lora_a, lora_b, scaling, mask), gain(magnitude, norm)
    out = np.zeros((x.shape[0], weight.shape[0]))
    for t in range(x.shape[0]):
        dropped = x[t] if keep is None else keep[t] * x[t]
        out[t] = gains * (weight @ x[t] + update @ dropped) + (0.0 if bias is None else bias)
    return out


@dataclass
class Gradients:
    """Gradients of sum(y * dy) with the row norm held fixed."""

    x: Array
    lora_a: Array
    lora_b: Array
    magnitude: Array | None


def gradients(
    x: Array,
    dy: Array,
    weight: Array,
    lora_a: Array,
    lora_b: Array,
    scaling: float,
    magnitude: Array | None = None,
    keep: Array | None = None,
    mask: Array | None = None,
) -> Gradients:
    """By the chain rule, token by token: y = g z, z = W x + U (keep x), U = s M o (B A)."""
    norm = row_norm(weight, lora_a, lora_b, scaling, mask)
    update, gains = low_rank(lora_a, lora_b, scaling, mask), gain(magnitude, norm)
    ones = np.ones_like(x) if keep is None else keep
    dx, d_update = np.zeros_like(x), np.zeros_like(update)
    dm = None if magnitude is None else np.zeros(weight.shape[0])
    for t in range(x.shape[0]):
        dropped, dz = ones[t] * x[t], gains * dy[t]
        z = weight @ x[t] + update @ dropped
        if dm is not None:
            dm += dy[t] * z * gain(np.ones_like(norm), norm)
        d_update += np.outer(dz, dropped)
        dx[t] = weight.T @ dz + ones[t] * (update.T @ dz)
    if mask is not None:
        d_update[~mask] = 0.0
    return Gradients(dx, scaling * lora_b.T @ d_update, scaling * d_update @ lora_a.T, dm)


def relative_error(got: Array, expected: Array) -> float:
    """||got - expected|| / ||expected||, Frobenius."""
    return float(np.linalg.norm(got - expected) / max(float(np.linalg.norm(expected)), 1e-300))


def token_nll(logits: Array, labels: NDArray[np.int64], ignore: int = -100) -> tuple[float, int]:
    """Sum of -log softmax(logits)[label] over positions whose label counts, and their number."""
    total, count = 0.0, 0
    for row, label in zip(logits, labels, strict=True):
        if label == ignore:
            continue
        peak = row.max()
        total += math.log(float(np.exp(row - peak).sum())) + float(peak) - float(row[label])
        count += 1
    return total, count


def adamw(
    values: Array,
    grads: list[Array],
    lr: float,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Array:
    """arXiv 1711.05101, algorithm 2: theta <- theta - lr decay theta - lr m_hat / (sqrt(v_hat) + eps)."""
    theta, m, v = values.copy(), np.zeros_like(values), np.zeros_like(values)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - lr * decay * theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta


def lion(
    values: Array, grads: list[Array], lr: float, decay: float = 0.0, betas: tuple[float, float] = (0.9, 0.99)
) -> Array:
    """arXiv 2302.06675, algorithm 2: theta <- theta - lr (sign(b1 m + (1 - b1) g) + decay theta), m with b2 after."""
    theta, m = values.copy(), np.zeros_like(values)
    for g in grads:
        theta = theta - lr * (np.sign(betas[0] * m + (1 - betas[0]) * g) + decay * theta)
        m = betas[1] * m + (1 - betas[1]) * g
    return theta


def head_nll(
    hidden: Array,
    weight: Array,
    labels: NDArray[np.int64],
    bias: Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Per token -log softmax(logits)[label] and its gradient by the hidden state, by the chain rule, entry by entry.

    z_v = w_v . h + b_v, logit_v = c tanh(scale z_v / c), or scale z_v without a softcap c.
    """
    nll, gradient = np.zeros(len(hidden)), np.zeros_like(hidden)
    for t in range(len(hidden)):
        logits, slopes = [], []
        for v in range(len(weight)):
            scaled = scale * (float(weight[v] @ hidden[t]) + (0.0 if bias is None else float(bias[v])))
            logits.append(scaled if softcap is None else softcap * math.tanh(scaled / softcap))
            slopes.append(scale if softcap is None else scale / math.cosh(scaled / softcap) ** 2)
        peak = max(logits)
        total = sum(math.exp(each - peak) for each in logits)
        nll[t] = math.log(total) + peak - logits[labels[t]]
        for v in range(len(weight)):
            by_logit = math.exp(logits[v] - peak) / total - (1.0 if v == labels[t] else 0.0)
            gradient[t] += by_logit * slopes[v] * weight[v]
    return nll, gradient


def cosine(first: Array, second: Array) -> float:
    """<a, b> / |a| |b|."""
    product = sum(float(a) * float(b) for a, b in zip(first, second, strict=True))
    lengths = [math.sqrt(sum(float(a) ** 2 for a in each)) for each in (first, second)]
    return product / (lengths[0] * lengths[1])


def gated(lora_b: Array, gate: Array) -> Array:
    """B diag(gate), row by row."""
    return np.array([row * gate for row in lora_b])


def gate_gradients(d_gated: Array, lora_b: Array, gate: Array) -> tuple[Array, Array]:
    """Of B and of the gate, from the gradient of B diag(gate)."""
    return np.array([row * gate for row in d_gated]), np.array(sum(d_gated[i] * lora_b[i] for i in range(len(lora_b))))


def bag_of_tokens(ids: NDArray[np.int64], embedding: Array, head: Array, dz: Array) -> tuple[Array, Array, Array]:
    """Logits z_t = V e(x_t) of each token, and the gradients of sum(z * dz) in the embedding E and the head V."""
    logits, of_embedding, of_head = np.zeros_like(dz), np.zeros_like(embedding), np.zeros_like(head)
    for t, token in enumerate(ids):
        for word in range(len(head)):
            for k in range(head.shape[1]):
                logits[t, word] += head[word, k] * embedding[token, k]
                of_embedding[token, k] += dz[t, word] * head[word, k]
                of_head[word, k] += dz[t, word] * embedding[token, k]
    return logits, of_embedding, of_head


def error_undone(merged: Array, base: Array, dense: Array, rank: int) -> tuple[float, float, float]:
    """<U, -E> / |E|^2, the same of the best matrix of this rank, and <U, -E> / (|U| |E|); U = merged - base, E = base -
    dense. The best one has the largest eigenvalues of E E^T."""
    product = of_error = of_update = 0.0
    for i in range(base.shape[0]):
        for j in range(base.shape[1]):
            update, error = merged[i, j] - base[i, j], base[i, j] - dense[i, j]
            product -= update * error
            of_error += error * error
            of_update += update * update
    error = base - dense
    best = float(np.sort(np.linalg.eigvalsh(error @ error.T))[::-1][:rank].sum())
    return product / of_error, best / of_error, product / math.sqrt(of_update * of_error)
