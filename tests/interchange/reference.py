"""The forward pass of every family in NumPy and float64, from published tensors by their published names.

Written position by position where that is plainest; nothing of the package under test is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.interchange.checkpoints import EPS, Facts, H, K


def forward(tree: dict[str, Any], facts: Facts, arrays: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one document."""
    w = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    x = facts.embedding_scale * w["model.embed_tokens.weight"][tokens]
    norm = lambda x, name: rms(x, facts.shift + w[f"{name}.weight"], EPS)
    for layer in range(tree["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, f"{at}input_layernorm")
        if layer in facts.deltas:
            y = delta_rule(w, f"{at}linear_attn.", facts, h)
        else:
            y = attention(w, f"{at}self_attn.", facts, h, facts.windows[layer], facts.ropes[layer], tree["head_dim"])
        x = x + (norm(y, f"{at}post_attention_layernorm") if facts.four else y)
        h = norm(x, at + ("pre_feedforward_layernorm" if facts.four else "post_attention_layernorm"))
        y = linear(w, f"{at}mlp.down_proj", act(linear(w, f"{at}mlp.gate_proj", h), facts.activation)
                   * linear(w, f"{at}mlp.up_proj", h))  # fmt: skip
        x = x + (norm(y, f"{at}post_feedforward_layernorm") if facts.four else y)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    logits = norm(x, "model.norm") @ head.T
    return logits if facts.output_cap is None else facts.output_cap * np.tanh(logits / facts.output_cap)


def rms(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def act(z, kind):
    if kind == "silu":
        return z * sigmoid(z)
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def turned(vector, position, rope):
    """One head's vector: channel i of the first half of those that turn with channel i of the second."""
    base, width, divisor = rope
    out, half = vector.copy(), width // 2
    for i in range(half):
        angle = position * base ** (-2 * i / width) / divisor
        a, b = vector[i], vector[half + i]
        out[i] = a * np.cos(angle) - b * np.sin(angle)
        out[half + i] = b * np.cos(angle) + a * np.sin(angle)
    return out


def attention(w, at, facts, h, window, rope, head):
    """Query by query, head by head; head n of the queries reads head n // (H / K) of the keys."""
    T, group = len(h), H // K
    q, gates = linear(w, f"{at}q_proj", h), np.ones((T, H, 1))
    if facts.gate == "none":
        q = q.reshape(T, H, head)
    elif facts.gate == "heads":
        q, gates = np.split(q.reshape(T, H, 2 * head), 2, axis=-1)
    else:
        q = q.reshape(T, K, -1)
        q, gates = q[..., : group * head].reshape(T, H, head), q[..., group * head :].reshape(T, H, -1)
    k, v = (linear(w, f"{at}{side}_proj", h).reshape(T, K, head) for side in "kv")
    if f"{at}q_norm.weight" in w:
        q, k = (rms(y, facts.shift + w[f"{at}{side}_norm.weight"], EPS) for y, side in ((q, "q"), (k, "k")))
    out = np.zeros((T, H, head))
    for n in range(H):
        keys = np.stack([turned(k[s, n // group], s, rope) for s in range(T)])
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            logits = keys[first : t + 1] @ turned(q[t, n], t, rope) * facts.scale
            if facts.cap is not None:
                logits = facts.cap * np.tanh(logits / facts.cap)
            weights = np.exp(logits - logits.max())
            out[t, n] = weights / weights.sum() @ v[first : t + 1, n // group]
    if facts.gate != "none":
        out = out * sigmoid(gates)
    return linear(w, f"{at}o_proj", out.reshape(T, -1))


def delta_rule(w, at, facts, h):
    """The gated delta rule, position by position."""
    keys, values, dk, dv = facts.delta
    T, R = len(h), values // keys
    if facts.fused:
        parts = linear(w, f"{at}in_proj_qkvz", h).reshape(T, keys, -1)
        q, k, v, z = np.split(parts, [dk, 2 * dk, 2 * dk + R * dv], axis=-1)
        b, a = np.split(linear(w, f"{at}in_proj_ba", h).reshape(T, keys, 2 * R), 2, axis=-1)
        qkv = np.concatenate([y.reshape(T, -1) for y in (q, k, v)], axis=-1)
        z, b, a = z.reshape(T, values, dv), b.reshape(T, values), a.reshape(T, values)
    else:
        qkv, z, b, a = (linear(w, f"{at}in_proj_{side}", h) for side in ("qkv", "z", "b", "a"))
        z = z.reshape(T, values, dv)
    taps, mixed = w[f"{at}conv1d.weight"][:, 0], np.zeros_like(qkv)
    for t in range(T):
        for back in range(min(4, t + 1)):
            mixed[t] += taps[:, 3 - back] * qkv[t - back]
    q, k, v = np.split(act(mixed, "silu"), [keys * dk, 2 * keys * dk], axis=-1)
    q, k, v = q.reshape(T, keys, dk), k.reshape(T, keys, dk), v.reshape(T, values, dv)
    q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    decay = np.exp(-np.exp(w[f"{at}A_log"]) * np.log1p(np.exp(a + w[f"{at}dt_bias"])))
    out = np.zeros((T, values, dv))
    for n in range(values):
        memory = np.zeros((dk, dv))
        for t in range(T):
            key, query = k[t, n // R], q[t, n // R] / np.sqrt(dk)
            memory = decay[t, n] * memory
            memory = memory + np.outer(key, sigmoid(b[t, n]) * (v[t, n] - key @ memory))
            out[t, n] = query @ memory
    out = rms(out, w[f"{at}norm.weight"], EPS) * act(z, "silu")
    return linear(w, f"{at}out_proj", out.reshape(T, -1))
