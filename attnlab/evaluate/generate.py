"""Generation: prefill and decode through `extend`, in one jitted program."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab import config as config_lib
from attnlab import memory, mixers
from attnlab.errors import UserError
from attnlab.models.lm import LanguageModel

_BUCKET = 32  # prompts are padded on the left to a multiple, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      tokens: new tokens per prompt, at most.
      temperature: divides the logits; 0, or less than the smallest normal float32, takes the likeliest token.
      top_k: only the k likeliest tokens; 0: all.
      top_p: only the likeliest tokens that together have this probability; 1: all.
      seed: each prompt of a batch draws from its own stream of it.
      stop: token id that ends a sample, kept as its last, or several of them; none: no token does.
      vocab: ids below it are drawn: a model may have more than its tokenizer; none: all.
    """

    tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: int | tuple[int, ...] | None = None
    vocab: int | None = None

    def __post_init__(self) -> None:
        need = config_lib.require
        need(self.tokens >= 1, "tokens", self.tokens, "1 or more")
        need(0 <= self.temperature < math.inf, "temperature", self.temperature, "a finite number, 0 or more")
        need(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        need(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        need(0 <= self.seed < 2**31, "seed", self.seed, "0 to 2^31 - 1")


def prepare(
    tokenizer: Any, sampling: Sampling, prompts: Sequence[str], samples: int, stop: str
) -> tuple[Sampling, list[np.ndarray]]:
    """Prompts as ids, each `samples` times, and the sampling with its stop token.

    Args:
      tokenizer: an `attnlab.data.Tokenizer`.
      stop: `eod`, `none`, or the text of one token.

    Raises:
      UserError: `stop` is not one token.
    """
    stop_id: int | None = tokenizer.eod_id
    if stop == "none":
        stop_id = None
    elif stop != "eod":
        ids = tokenizer.encode(stop)
        if len(ids) != 1:
            raise UserError(f"stop = {stop!r} is {len(ids)} tokens; allowed: eod, none, or the text of one token")
        stop_id = int(ids[0])
    start = np.asarray([tokenizer.eod_id], np.int32)
    ids = [np.concatenate([start, tokenizer.encode(p)]) for p in prompts for _ in range(samples)]
    return dataclasses.replace(sampling, stop=stop_id, vocab=tokenizer.vocab_size), ids


@dataclasses.dataclass(frozen=True)
class Generated:
    """Samples and how long they took.

    Attributes:
      tokens: the new ids of each prompt.
      compile_seconds, seconds: compilation, and prefill with decoding.
    """

    tokens: list[np.ndarray]
    compile_seconds: float
    seconds: float


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def on_one_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as it is."""
    return fn


def generate(
    merge: Callable[[Any], LanguageModel],
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    traced: Wrapper = on_one_device,
) -> Generated:
    """Continues prompts of any lengths, as one batch.

    Args:
      merge: makes the model from its parameters.
      params: parameters, a pytree of arrays.
      prompts: ids of each prompt, one or more; a document starts with the end-of-document id.
      sampling: how to draw.
      traced: makes of a function one that is traced for the mesh on which `params` lie; as it is, for one device.

    Raises:
      UserError: the samples need more memory than the machine has.
    """
    started = time.perf_counter()
    run = compiled(merge, params, prompts, sampling, traced)
    compiled_at = time.perf_counter()
    tokens = run(params)
    return Generated(tokens, compiled_at - started, time.perf_counter() - compiled_at)


def compiled(
    merge: Callable[[Any], LanguageModel],
    params: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    traced: Wrapper = on_one_device,
) -> Callable[[Any], list[np.ndarray]]:
    """What `generate` runs, from parameters to the new ids of each prompt; arguments as there."""
    if any(len(p) == 0 for p in prompts) or not prompts:
        raise ValueError("every prompt needs at least one token")
    length = -(-max(map(len, prompts)) // _BUCKET) * _BUCKET
    tokens, segments = padded(prompts, length)
    keys = keys_of(sampling.seed, range(len(prompts)))
    state = jax.eval_shape(lambda p: merge(p).init_state(len(prompts), length + sampling.tokens), params)
    memory.require(
        memory.size((params, state)) + 4 * len(prompts) * (length + sampling.tokens),
        f"{len(prompts)} samples of up to {length + sampling.tokens} tokens",
        "lower tokens or samples",
    )
    made = program if traced is on_one_device else _kept_program
    executable = (
        made(merge, dataclasses.replace(sampling, seed=0), traced).lower(params, tokens, segments, keys).compile()
    )

    def run(params: Any) -> list[np.ndarray]:
        out, counts = jax.device_get(executable(params, tokens, segments, keys))
        return [row[:n] for row, n in zip(out, counts)]

    return run


def padded(prompts: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and segments, int32 [B, length], padded on the left, as `decode` takes them."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def keys_of(seed: int, numbers: Sequence[int]) -> jax.Array:
    """The random key of each prompt, [B], by its number."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(np.asarray(numbers))


def program(merge: Callable[[Any], LanguageModel], sampling: Sampling, traced: Wrapper = on_one_device) -> Any:
    """`decode` of (params, tokens, segments, keys), jitted; arguments as of `generate`. The seed is in the keys."""

    def run(params: Any, tokens: jax.Array, segments: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return decode(merge(params), tokens, segments, keys, sampling)

    return jax.jit(traced(run))


@functools.lru_cache(maxsize=4)
def _kept_program(merge: Callable[[Any], LanguageModel], sampling: Sampling, traced: Wrapper) -> Any:
    """`program`, once for all runs that share an `attnlab.train.program.Program`, of which `merge` and `traced` are."""
    return program(merge, sampling, traced)


def decode(
    model: LanguageModel, prompt_BT: jax.Array, segments_BT: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """New tokens [B, sampling.tokens] and how many of each row count, for prompts padded on the left.

    Args:
      prompt_BT: ids.
      segments_BT: 1 on the prompt, 0 on the padding before it.
      keys_B: a random key per row.
    """
    batch, length = prompt_BT.shape
    periods = model.transformer.unstacked()
    lengths_B = jnp.sum(segments_BT, axis=1)
    positions = jnp.maximum(jnp.arange(length)[None] - (length - lengths_B)[:, None], 0).astype(jnp.int32)
    ones = jnp.ones((batch, 1), jnp.int32)

    def pick(hidden_BD: jax.Array, i: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, i)
        return sample(model.logits(hidden_BD), keys, sampling)

    state = model.init_state(batch, length + sampling.tokens)
    hidden, state = model.extend(periods, prompt_BT, mixers.Sequence(positions, segments_BT), state)
    first = pick(hidden[:, -1], jnp.int32(0))
    out = jnp.zeros((batch, sampling.tokens), jnp.int32).at[:, 0].set(first)

    def more(carry: Any) -> jax.Array:
        i, _, _, done, _, _ = carry
        return (i < sampling.tokens) & ~jnp.all(done)

    def step(carry: Any) -> Any:
        i, out, last, done, counts, state = carry
        seq = mixers.Sequence((lengths_B + i - 1)[:, None].astype(jnp.int32), ones)
        hidden, state = model.extend(periods, last[:, None], seq, state)
        token = pick(hidden[:, 0], i)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], i, axis=1)
        return i + 1, out, token, done | stops(token), counts + ~done, state

    def stops(token: jax.Array) -> jax.Array:
        if sampling.stop is None:
            return jnp.zeros(token.shape, bool)
        return jnp.isin(token, np.atleast_1d(np.asarray(sampling.stop, np.int32)))

    carry = (jnp.int32(1), out, first, stops(first), jnp.ones((batch,), jnp.int32), state)
    _, out, _, _, counts, _ = jax.lax.while_loop(more, step, carry)
    return out, counts


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token per row from logits; top-k first, then top-p of what is left."""
    if sampling.vocab is not None:
        logits_BV = logits_BV[:, : sampling.vocab]
    least_normal = float(jnp.finfo(logits_BV.dtype).tiny)
    # What is not a normal number is 0 on the device, and so is the inverse of what is too large for one.
    if sampling.temperature < least_normal:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The largest is 0 and stays 0 at any temperature; what overflows is never drawn.
    logits = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    logits = logits / min(sampling.temperature, 1 / least_normal)
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        kept = (before < sampling.top_p).at[:, 0].set(True)  # the likeliest, though top_p were 0 in float32
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)
