"""A plain PyTorch GPT, eager, to compare attnlab's speed on a CPU with.

The model is attnlab's default language model: pre-norm RMSNorm, rotary positions, SwiGLU, no biases,
untied embedding and head, causal `scaled_dot_product_attention`, AdamW with gradients clipped by their
global norm. It is written as a PyTorch user would write it, with PyTorch's own fused parts where they
exist (`F.rms_norm`, `F.scaled_dot_product_attention`, `AdamW(fused=True)`).

    python benchmarks/torch_gpt.py train --batch 8 --seq-len 512
    python benchmarks/torch_gpt.py decode --tokens 400
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults are attnlab's `micro`."""

    num_layers: int = 6
    dim: int = 256
    num_heads: int = 4
    mlp_dim: int = 704
    vocab_size: int = 272
    max_len: int = 4096
    rope_base: float = 10_000.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and clipping by the global gradient norm."""

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def import_torch() -> Any:
    """Returns the torch module, or ends the program with one line that says how to get it."""
    try:
        import torch
    except ImportError as e:
        raise SystemExit("benchmarks/torch_gpt.py needs PyTorch: pip install torch") from e
    return torch


def build_model(config: GPTConfig, seed: int = 0) -> torch.nn.Module:
    """Builds the GPT. `model(tokens_BT)` gives logits `[B, T, V]`.

    `model(token_B1, caches, position)` runs one position with the caches of `model.init_caches(B, S)`.
    """
    torch = import_torch()
    nn, F = torch.nn, torch.nn.functional
    head_dim = config.dim // config.num_heads

    def rotate(x_BHTd, cos_Td, sin_Td):
        a, b = x_BHTd.chunk(2, dim=-1)
        return x_BHTd * cos_Td + torch.cat((-b, a), dim=-1) * sin_Td

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
            self.out = nn.Linear(config.dim, config.dim, bias=False)

        def forward(self, x, rope, cache=None, position=0):
            B, T, D = x.shape
            q, k, v = self.qkv(x).view(B, T, 3, config.num_heads, head_dim).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, *rope), rotate(k, *rope)
            if cache is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:  # one position, or a prompt into an empty cache
                keys, values = cache
                keys[:, :, position : position + T] = k
                values[:, :, position : position + T] = v
                end = position + T
                y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=T > 1)
            return self.out(y.transpose(1, 2).reshape(B, T, D))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Linear(config.dim, 2 * config.mlp_dim, bias=False)
            self.down = nn.Linear(config.mlp_dim, config.dim, bias=False)

        def forward(self, x):
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm = nn.RMSNorm(config.dim, eps=1e-6)
            self.attention = Attention()
            self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-6)
            self.mlp = MLP()

        def forward(self, x, rope, cache=None, position=0):
            x = x + self.attention(self.attention_norm(x), rope, cache, position)
            return x + self.mlp(self.mlp_norm(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(config.vocab_size, config.dim)
            self.blocks = nn.ModuleList(Block() for _ in range(config.num_layers))
            self.norm = nn.RMSNorm(config.dim, eps=1e-6)
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
            frequency = config.rope_base ** (-torch.arange(0, head_dim, 2).float() / head_dim)
            angle = torch.arange(config.max_len).float()[:, None] * frequency
            self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
            self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, tokens, caches=None, position=0):
            T = tokens.shape[1]
            rope = self.cos[position : position + T], self.sin[position : position + T]
            x = self.embed(tokens)
            for i, block in enumerate(self.blocks):
                x = block(x, rope, None if caches is None else caches[i], position)
            return self.head(self.norm(x))

        def init_caches(self, batch, length):
            shape = (batch, config.num_heads, length, head_dim)
            return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]

    torch.manual_seed(seed)
    return GPT()


class Trainer:
    """One training step after another: `step(tokens)` with int64 `[B, T + 1]` returns the loss as a float."""

    def __init__(self, config: GPTConfig, optimizer: OptimizerConfig = OptimizerConfig()):
        self.torch = import_torch()
        self.config, self.clip_norm = config, optimizer.clip_norm
        self.model = build_model(config)
        self.optimizer = self.torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def step(self, tokens: Any) -> float:
        torch = self.torch
        tokens = torch.as_tensor(tokens, dtype=torch.int64)
        logits = self.model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, self.config.vocab_size), tokens[:, 1:].reshape(-1))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()


class Decoder:
    """Greedy decoding with a key-value cache; `model` is one that `build_model` made."""

    def __init__(self, config: GPTConfig, model: Any = None):
        self.torch = import_torch()
        self.model = build_model(config) if model is None else model

    def generate(self, prompt: Any, num_tokens: int) -> list[int]:
        """Continues the token ids `prompt` by `num_tokens` greedy tokens."""
        torch = self.torch
        tokens = torch.as_tensor(prompt, dtype=torch.int64)[None]
        generated = []
        with torch.inference_mode():
            caches = self.model.init_caches(1, tokens.shape[1] + num_tokens)
            position = 0
            for _ in range(num_tokens):
                logits = self.model(tokens, caches, position)
                position += tokens.shape[1]
                tokens = logits[:, -1:].argmax(-1)
                generated.append(tokens)
        return torch.cat(generated, dim=1)[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=None, help="torch.set_num_threads; default: PyTorch's own")
    args = parser.parse_args()
    torch = import_torch()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = GPTConfig()
    generator = torch.Generator().manual_seed(0)
    seconds = []
    if args.what == "train":
        trainer = Trainer(config)
        shape = (args.batch, args.seq_len + 1)
        for _ in range(args.steps + 1):  # the first is the warm-up
            tokens = torch.randint(config.vocab_size, shape, generator=generator)
            start = time.perf_counter()
            trainer.step(tokens)
            seconds.append(time.perf_counter() - start)
        count, what = args.batch * args.seq_len, f"train {args.batch}x{args.seq_len}"
    else:
        decoder = Decoder(config)
        prompt = torch.randint(config.vocab_size, (args.prompt,), generator=generator)
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            decoder.generate(prompt, args.tokens)
            seconds.append(time.perf_counter() - start)
        count, what = args.tokens, f"decode {args.prompt}+{args.tokens}"
    median = statistics.median(seconds[1:])
    print(
        f"torch {torch.__version__} threads={torch.get_num_threads()} {what}: "
        f"{count / median:.0f} tokens/s ({median * 1e3:.1f} ms)"
    )


if __name__ == "__main__":
    main()
