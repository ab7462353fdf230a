"""What PyTorch computes in `benchmarks.kernels`: its fused attention, and attention with a mask that is compiled in."""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.kernels_cases import Case
from benchmarks.kernels_recurrences import Recurrence, in_fla


class Torch:
    """Answers the requests of `benchmarks.kernels`."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.peers = {"torch sdpa": self._sdpa, "torch flex_attention": self._flex}
        if importlib.util.find_spec("fla") is not None:
            self.peers["fla"] = in_fla

    def about(self) -> dict[str, Any]:
        if not self.dry and not torch.cuda.is_available():
            return {"torch": torch.__version__, "peers": [], "without_a_gpu": "torch sees no GPU"}
        facts = {"torch": torch.__version__, "peers": list(self.peers)}
        if not self.dry:
            facts |= {"torch_cuda": torch.version.cuda, "torch_cudnn": torch.backends.cudnn.version()}
        return facts

    def time(self, case: Case | Recurrence, peer: str) -> dict[str, Any]:
        """As `benchmarks.kernels_jax.Jax.time`."""
        if isinstance(case, Recurrence):
            return self._time_recurrence(case, peer)
        case = case.tiny() if self.dry else case
        if case.deterministic:
            return {"unsupported": f"{peer} promises no order"}
        attend = self.peers[peer](case)
        if isinstance(attend, str):
            return {"unsupported": attend}
        given = case.arrays()
        heads = lambda x: torch.tensor(x, dtype=torch.bfloat16, device=self.device).transpose(1, 2)
        # flex_attention has no gradient on a CPU, and takes nothing there that wants one.
        forward_only = self.dry and peer == "torch flex_attention"
        q, k, v = (heads(given[name]).requires_grad_(not forward_only) for name in "qkv")
        do = heads(given["do"])

        def forward() -> None:
            with torch.no_grad():
                attend(q, k, v)

        def both() -> None:
            torch.autograd.grad(attend(q, k, v), (q, k, v), do)

        if self.dry:
            from benchmarks.kernels_jax import check_same_attention

            check_same_attention(case, attend(q, k, v).detach().transpose(1, 2).float().numpy())
        return {"forward": self._timed(forward), "both": self._timed(forward if forward_only else both)}

    def _time_recurrence(self, case: Recurrence, peer: str) -> dict[str, Any]:
        """Layouts are jax's."""
        run = self.peers[peer](case)
        if isinstance(run, str):
            return {"unsupported": run}
        if self.dry:
            return {"unsupported": "Triton's kernels need a GPU"}
        dtype = lambda name: torch.float32 if name in ("log_decay", "beta") else torch.bfloat16
        arrays = {name: torch.tensor(x, dtype=dtype(name), device=self.device) for name, x in case.arrays().items()}
        do = arrays.pop("do")
        # Of a constant decay fla gives no gradient; nobody is asked for one.
        wanted = [x.requires_grad_() for name, x in arrays.items() if case.decay != "constant" or name != "log_decay"]

        def forward() -> None:
            with torch.no_grad():
                run(**arrays)

        return {
            "forward": self._timed(forward),
            "both": self._timed(lambda: torch.autograd.grad(run(**arrays), wanted, do)),
        }

    def _timed(self, call: Callable[[], None]) -> dict[str, float]:
        """As `benchmarks.kernels_jax.timed`, by the GPU's own clock."""
        call()
        if self.dry:
            return {"ms": 0.0, "low": 0.0, "high": 0.0, "samples": 1}
        for _ in range(5):
            call()

        def sample(repeat: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeat):
                call()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / repeat

        repeat = max(1, round(20 / sample(1)))
        samples = [sample(repeat) for _ in range(20)]
        low, median, high = statistics.quantiles(samples, n=4)
        return {"ms": median, "low": low, "high": high, "samples": 20 * repeat}

    def _sdpa(self, case: Case) -> Callable[..., Any] | str:
        if case.extras:
            return f"torch's fused attention has no {' and no '.join(case.extras)}"
        if case.mask not in ("all", "causal"):
            return f"torch's fused attention has no mask {case.mask!r}"
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=case.mask == "causal",
            enable_gqa=case.H != case.K,
        )

    def _flex(self, case: Case) -> Callable[..., Any] | str:
        if set(case.extras) - {"cap"}:
            return f"flex_attention needs another program for {', '.join(case.extras)}"
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        starts, ends = (torch.tensor(np.ascontiguousarray(x), device=self.device) for x in case.bounds())
        seen = lambda b, h, i, j: (j >= starts[b % len(starts), i]) & (j < ends[b % len(ends), i])
        mask = None
        if case.mask != "all":
            mask = create_block_mask(seen, case.B, None, case.T, case.T, device=self.device)
        cap = case.soft_cap
        score = None if cap is None else (lambda s, b, h, i, j: cap * torch.tanh(s / cap))
        run = flex_attention if self.dry else torch.compile(flex_attention)
        return lambda q, k, v: run(q, k, v, score_mod=score, block_mask=mask, enable_gqa=case.H != case.K)
