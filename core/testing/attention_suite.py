"""Conformance suite for attention backends. A third party subclasses it:

    class TestMyAttention(AttentionConformance):
        backend = MyAttention
        device = "cuda"

Every output is compared with attention computed densely in float64. The suite knows nothing of the cache's layout:
it fills the cache with garbage, and only the backend writes to it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

import torch

from interlace.interfaces.attention import AttentionBackend, AttentionSpec
from interlace.testing.paging import Pager


class PagedAttention:
    """One backend over one poisoned cache, with named sequences of random queries, keys and values."""

    def __init__(
        self,
        backend: type[AttentionBackend],
        spec: AttentionSpec,
        block_size: int,
        dtype: str = "float32",
        device: str = "cpu",
        poison: float = torch.nan,
        num_blocks: int = 400,
        max_len: int = 512,
    ) -> None:
        self.spec = spec
        self.backend = backend(backend.Options(), spec, block_size, dtype, device)
        self._pager = Pager([spec.window], block_size, num_blocks, max_len, device)
        layout = self.backend.cache_layout(num_blocks)
        self.cache = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device=device)
        assert self.cache.nbytes == layout.nbytes, "cache_layout states another size than its shape and dtype have"
        if self.cache.dtype.is_floating_point:
            self.cache.fill_(min(poison, torch.finfo(self.cache.dtype).max) if poison < torch.inf else poison)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device
        self._keys: dict[str, torch.Tensor] = {}
        self._values: dict[str, torch.Tensor] = {}

    def step(self, lengths: Mapping[str, int]) -> float:
        """Run the next `lengths[name]` tokens of each sequence in one batch. Returns the largest error; infinite
        where a result is not a number."""
        spec, total = self.spec, sum(lengths.values())
        query = self._random(total, spec.num_heads)
        key, value = self._random(total, spec.num_kv_heads), self._random(total, spec.num_kv_heads)
        batch = self._pager.next_batch({name: [0] * length for name, length in lengths.items()})
        metadata = self.backend.prepare(batch, 0)
        out = self.backend.forward(query.clone(), key.clone(), value.clone(), self.cache, metadata)
        assert out.shape == query.shape and out.dtype == query.dtype, "the output is not shaped and typed as the query"
        largest = 0.0
        for row, name in enumerate(lengths):
            own = slice(batch.query_start[row], batch.query_start[row + 1])
            self._keys[name] = torch.cat((self._keys.get(name, key[:0]), key[own]))
            self._values[name] = torch.cat((self._values.get(name, value[:0]), value[own]))
            expected = dense_attention(spec, query[own], self._keys[name], self._values[name])
            error = (out[own].double() - expected).abs().amax().item()
            largest = max(largest, error if error == error else torch.inf)
        return largest

    def _random(self, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, self.spec.head_size).to(self._device, self._dtype)


def dense_attention(spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: `query` [queries, heads, head_size] are the last of the [tokens, kv_heads,
    head_size] of a sequence. Returns [queries, heads, head_size]."""
    repeats = spec.num_heads // spec.num_kv_heads
    wide_query = query.double().transpose(0, 1)  # [heads, queries, head_size]
    wide_key, wide_value = (x.double().repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
    scores = wide_query @ wide_key.transpose(1, 2) * spec.softmax_scale
    if spec.softcap:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    other = torch.arange(len(key), device=key.device)
    own = other[len(key) - len(query) :, None]
    seen = other <= own
    if spec.kind == "window":
        seen &= other > own - spec.window
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ wide_value).transpose(0, 1)


class AttentionConformance:
    """What every attention backend must do. Specs that `supports` refuses are left out; plain full attention in the
    first of `tolerances` must be accepted."""

    backend: ClassVar[type[AttentionBackend]]
    device: ClassVar[str] = "cpu"
    block_sizes: ClassVar[tuple[int, ...]] = (1, 4, 16, 32)
    head_sizes: ClassVar[tuple[int, ...]] = (5, 8, 16, 64)
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}
    """dtype → largest error allowed for values of size one."""

    def test_plain_attention_is_supported(self) -> None:
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=self.head_sizes[-1])
        dtype = next(iter(self.tolerances))
        assert self.backend.supports(spec, self.block_sizes[-1], dtype, self.device) is None

    def test_refusals_are_reasons(self) -> None:
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, kind="no-such-kind")
        reason = self.backend.supports(spec, 16, "float32", self.device)
        assert isinstance(reason, str) and "no-such-kind" in reason

    def test_random_traffic(self) -> None:
        """Sequences of all lengths start, prefill in chunks and decode side by side."""
        for seed in range(40):
            rng = random.Random(seed)
            torch.manual_seed(seed)
            spec = self._random_spec(rng)
            paged = self._make(spec, rng.choice(self.block_sizes), next(iter(self.tolerances)))
            if paged is None:
                continue
            for step in range(6):
                names = rng.sample(range(9), rng.randint(1, 9))
                lengths = {str(name): rng.choice([1, 1, 1, 2, 7, 33]) for name in names}
                error = paged.step(lengths)
                assert error < self._tolerance(), f"error {error} in seed {seed}, step {step} of {lengths} with {spec}"

    def test_unwritten_slots_do_not_leak(self) -> None:
        for poison in (torch.nan, torch.inf, 3e38):
            for window, softcap in ((0, 0.0), (6, 0.0), (0, 2.0), (6, 2.0)):
                torch.manual_seed(0)
                kind = "window" if window else "full"
                spec = AttentionSpec(4, 2, self.head_sizes[-1], kind=kind, window=window, softcap=softcap)
                paged = self._make(spec, self.block_sizes[-1], next(iter(self.tolerances)), poison)
                if paged is None:
                    continue
                for lengths in ({"a": 9, "b": 3, "c": 1}, {"a": 1, "b": 1, "c": 1, "d": 5}, {"d": 13, "a": 1, "e": 1}):
                    assert paged.step(lengths) < self._tolerance(), f"poison {poison}, {lengths}, {spec}"

    def test_long_contexts(self) -> None:
        torch.manual_seed(0)
        for window in (0, 100):
            kind = "window" if window else "full"
            spec = AttentionSpec(4, 2, self.head_sizes[-1], kind=kind, window=window)
            paged = self._make(spec, self.block_sizes[-1], next(iter(self.tolerances)), max_len=2048)
            if paged is not None:
                for lengths in ({"a": 1100, "b": 3}, {"b": 1, "a": 600}, {"a": 1, "b": 700, "c": 1}):
                    assert paged.step(lengths) < self._tolerance(), f"{lengths}, {spec}"

    def test_every_type(self) -> None:
        torch.manual_seed(0)
        spec = AttentionSpec(num_heads=6, num_kv_heads=2, head_size=self.head_sizes[-1])
        for dtype, tolerance in self.tolerances.items():
            paged = self._make(spec, self.block_sizes[-1], dtype)
            if paged is not None:
                for lengths in ({"a": 40, "b": 7}, {"a": 1, "b": 9, "c": 1}):
                    assert paged.step(lengths) < tolerance, f"{dtype}, {lengths}"

    def test_empty_batch(self) -> None:
        paged = self._make(AttentionSpec(6, 2, self.head_sizes[-1]), self.block_sizes[-1], next(iter(self.tolerances)))
        assert paged is not None and paged.step({}) == 0.0

    def _make(
        self, spec: AttentionSpec, block_size: int, dtype: str, poison: float = torch.nan, max_len: int = 512
    ) -> PagedAttention | None:
        if self.backend.supports(spec, block_size, dtype, self.device) is not None:
            return None
        num_blocks = 10 + 9 * max_len // block_size
        return PagedAttention(self.backend, spec, block_size, dtype, self.device, poison, num_blocks, max_len)

    def _tolerance(self) -> float:
        return next(iter(self.tolerances.values()))

    def _random_spec(self, rng: random.Random) -> AttentionSpec:
        kv_heads = rng.choice([1, 2, 3])
        window = rng.choice([0, 0, 1, 3, 8, 40])
        return AttentionSpec(
            num_heads=kv_heads * rng.choice([1, 2, 3, 4]),
            num_kv_heads=kv_heads,
            head_size=rng.choice(self.head_sizes),
            kind="window" if window else "full",
            window=window,
            softcap=rng.choice([0.0, 0.0, 1.5]),
            scale=rng.choice([0.0, 0.3]),
        )
