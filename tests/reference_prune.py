"""Pruning by its definitions, in float64 and plain loops. Imports nothing of qdora or torch."""

from __future__ import annotations

import numpy as np


def prune_lowest(costs, count):
    """Indices of the `count` lowest costs of a list; of equal ones the first."""
    return set(sorted(range(len(costs)), key=lambda index: (costs[index], index))[:count])


def groups_of(shape, pattern):
    """Comparison groups as lists of (i, j), in order; `pattern` is "tensor", "row" or (n, m)."""
    rows, columns = shape
    if pattern == "tensor":
        return [[(i, j) for i in range(rows) for j in range(columns)]]
    if pattern == "row":
        return [[(i, j) for j in range(columns)] for i in range(rows)]
    m = pattern[1]
    return [[(i, j) for j in range(start, start + m)] for i in range(rows) for start in range(0, columns, m)]


def keep_mask(scores, pattern, sparsity=None):
    """True = keep. n of m are kept for (n, m); else round(sparsity * size) of each group are pruned."""
    keep = np.ones(scores.shape, dtype=bool)
    for group in groups_of(scores.shape, pattern):
        count = pattern[1] - pattern[0] if isinstance(pattern, tuple) else round(sparsity * len(group))
        for index in prune_lowest([scores[at] for at in group], count):
            keep[group[index]] = False
    return keep


def damped(products, damping):
    """X^T X plus a share of the mean of its diagonal; the identity added where nothing was measured."""
    mean = np.mean(np.diag(products))
    return products + np.eye(len(products)) * (damping * mean if mean > 0 else 1.0)


def rounding_costs(weight, costs, block, values, factors):
    """Of each block, (blocks, factors): the squared errors, times `costs`, of rounding to `values` times the block's
    largest magnitude times each factor. And these magnitudes."""
    found, flat = [], list(zip(weight.ravel(), costs.ravel(), strict=True))
    largest = [max(abs(w) for w, _ in flat[start : start + block]) for start in range(0, len(flat), block)]
    for index, most in enumerate(largest):
        part = flat[index * block : (index + 1) * block]
        found.append([sum(cost * np.min(np.abs(values * most * f - w)) ** 2 for w, cost in part) for f in factors])
    return np.array(found), np.array(largest)


def gptq(weight, products, damping, values, scales, order, keep=None):
    """Codes, column after column in `order`: the nearest of `values` times `scales`, (out, in), or of 0 where `keep` is
    False. Each error is moved by the inverse of what is left, formed anew."""
    work, hessian, left = weight.astype(np.float64).copy(), damped(products, damping), list(order)
    codes = np.zeros(work.shape, dtype=np.uint8)
    while left:
        j, inverse = left[0], np.linalg.inv(hessian[np.ix_(left, left)])
        for i in range(work.shape[0]):
            is_kept = keep is None or keep[i, j]
            code = np.argmin(np.abs(values * scales[i, j] - work[i, j])) if is_kept else np.argmax(values == 0)
            error = work[i, j] - values[code] * scales[i, j]
            codes[i, j] = code
            work[i, left] -= error / inverse[0, 0] * inverse[0]
        left = left[1:]
    return codes


def obs(weight, products, damping, *, block, sparsity=None, n_of_m=None):
    """The same with the mask chosen on the way: for `block` columns at a time, or for m at a time."""
    work, hessian = weight.astype(np.float64).copy(), damped(products, damping)
    rows, columns = work.shape
    keep = np.ones(work.shape, dtype=bool)
    width = block if n_of_m is None else n_of_m[1]
    for j in range(columns):
        if j % width == 0:
            stop = min(j + width, columns)
            costs = np.zeros((rows, stop - j))
            for k in range(j, stop):
                costs[:, k - j] = work[:, k] ** 2 / np.linalg.inv(hessian[k:, k:])[0, 0]
            if n_of_m is None:
                count = round(sparsity * rows * stop) - round(sparsity * rows * j)
                flat = list(costs.reshape(-1))
                for index in prune_lowest(flat, count):
                    keep[index // (stop - j), j + index % (stop - j)] = False
            else:
                keep[:, j:stop] = keep_mask(costs, n_of_m)
        inverse = np.linalg.inv(hessian[j:, j:])
        for i in range(rows):
            if not keep[i, j]:
                work[i, j:] -= work[i, j] / inverse[0, 0] * inverse[0]
                work[i, j] = 0.0
    return work, keep
