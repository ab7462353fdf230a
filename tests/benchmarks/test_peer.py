"""The PyTorch GPT that attnlab is timed against computes the same function, with as many parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import mixers
from attnlab.evaluate.generate import Sampling, compiled
from attnlab.train import config as run_config
from attnlab.train.state import Model
from benchmarks import torch_gpt

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def pair():
    """Model, parameters, and the PyTorch GPT with the same parameters."""
    config = run_config.load("configs/lm.py:mixer=softmax,size=micro", ["model.layers=2"]).model
    model = Model.of(config)
    params = jax.jit(lambda: model.init(0))()
    sizes = torch_gpt.GPTConfig()
    assert dataclasses.astuple(sizes)[1:5] == (config.width, config.mixers["M"].heads, config.hidden, config.vocab)
    peer = torch_gpt.build_model(dataclasses.replace(sizes, num_layers=2))
    lm = model.merge(params)
    put = lambda parameter, array: parameter.data.copy_(torch.tensor(np.asarray(array)))
    kernels = lambda *linears: np.concatenate([np.asarray(m.kernel[...]).T for m in linears])
    put(peer.embed.weight, lm.embedding[...])
    put(peer.head.weight, kernels(lm.head))
    put(peer.norm.weight, lm.norm.scale[...])
    for block, (ours,) in zip(peer.blocks, (p.blocks for p in lm.transformer.unstacked()), strict=True):
        attention, mlp = ours.sublayers
        put(block.attention_norm.weight, attention.norm.scale[...])
        put(block.attention.qkv.weight, kernels(attention.branch.q, attention.branch.k, attention.branch.v))
        put(block.attention.out.weight, kernels(attention.branch.out))
        put(block.mlp_norm.weight, mlp.norm.scale[...])
        put(block.mlp.gate_up.weight, kernels(mlp.branch.gate, mlp.branch.up))
        put(block.mlp.down.weight, kernels(mlp.branch.down))
    return model, params, peer


def test_same_parameters(pair):
    _, params, peer = pair
    assert sum(p.size for p in jax.tree.leaves(params)) == sum(p.numel() for p in peer.parameters())


def test_same_logits(pair):
    model, params, peer = pair
    tokens = np.random.default_rng(0).integers(0, 256, (2, 37)).astype(np.int32)
    lm = model.merge(params)
    ours = lm.logits(lm.hidden(jnp.asarray(tokens), mixers.Sequence.whole(2, 37)).y)
    with torch.inference_mode():
        theirs = peer(torch.tensor(tokens, dtype=torch.int64)).numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=2e-4 * np.abs(theirs).max())


def test_same_greedy_tokens(pair):
    model, params, peer = pair
    prompt = (np.arange(16) % 7).astype(np.int32)
    (ours,) = compiled(model.merge, params, [prompt], Sampling(tokens=24, temperature=0.0))(params)
    theirs = torch_gpt.Decoder(dataclasses.replace(torch_gpt.GPTConfig(), num_layers=2), peer).generate(prompt, 24)
    assert ours.tolist() == theirs
