"""Conformance suite for attention backends. A third party subclasses it:

    class TestMyAttention(AttentionConformance):
        attention = "mine"
        device = "cuda"

Every output is compared with attention computed densely in float64. The suite knows nothing of the cache's layout:
it fills the cache with garbage, only the backend writes to it, and blocks that are given back are filled with garbage
again. `head_sizes`, `block_sizes` and `tolerances` say what to draw from; what `supports` refuses is left out, except
plain full attention, which every backend must serve.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from interlace.interfaces.attention import AttentionBackend, AttentionSpec
from interlace.kv.specs import NULL_BLOCK
from interlace.testing.captured_decode import CapturedDecode
from interlace.testing.conformance import Conformance, shuffled, skip
from interlace.testing.paging import Pager
from interlace.testing.reference import dense_attention
from interlace.worker.batch import ForwardBatch

Streams = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value of every token a sequence may have: [max_len, heads, head_size]."""


class PagedAttention:
    """One backend over poisoned caches, with named sequences of random queries, keys and values.

    The tokens of a sequence follow from `seed` and its name alone, however they are cut into steps. The KV group under
    test is the second of two, so that a backend that takes the first group's blocks is wrong. Each of `layers` has a
    cache and tokens of its own, and all share the metadata of a step.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        spec: AttentionSpec,
        block_size: int,
        dtype: str = "float32",
        device: str = "cpu",
        poison: float = torch.nan,
        max_len: int = 256,
        *,
        options: BaseModel | None = None,
        num_sequences: int = 9,
        layers: int = 1,
        seed: int = 0,
    ) -> None:
        self.spec = spec
        self.backend = backend(options or backend.Options(), spec, block_size, dtype, device)
        self.outputs: dict[str, list[torch.Tensor]] = {}
        """Per sequence the first layer's results of each of its steps."""
        num_blocks = 10 + 2 * num_sequences * -(-max_len // block_size)
        self._pager = Pager([0, spec.window], block_size, num_blocks, max_len, device)
        layout = self.backend.cache_layout(num_blocks)
        self._poison = poison
        self.caches = [
            torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype), device=device) for _ in range(layers)
        ]
        assert self.caches[0].nbytes == layout.nbytes, f"{layout} states another size than its shape and type have"
        self._fill(range(num_blocks))
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = device
        self._max_len = max_len
        self._seed = seed
        self._captured: CapturedDecode | None = None
        self._streams: dict[tuple[str, int], Streams] = {}
        self._lengths: dict[str, int] = {}

    def step(self, lengths: Mapping[str, int]) -> float:
        """Run the next `lengths[name]` tokens of each sequence in one batch. Returns the largest error; infinite
        where a result is not a number."""
        batch = self._pager.next_batch({name: [0] * length for name, length in lengths.items()})
        self._fill(self._pager.take_freed())
        with torch.inference_mode():
            run = self._prepare(batch)
            errors = [self._run_layer(layer, lengths, batch, run) for layer in range(len(self.caches))]
        for name, length in lengths.items():
            self._lengths[name] = self._lengths.get(name, 0) + length
        return max(errors)

    def capture(self, num_rows: int) -> None:
        """From now on steps of single tokens, of up to `num_rows` sequences, run as a device graph runs them."""
        width = -(-self._max_len // self.backend.block_size)
        with torch.inference_mode():
            self._captured = CapturedDecode(self.backend, self.caches, num_rows, width, self._device)
        self._fill([NULL_BLOCK])

    def free(self, name: str) -> None:
        """A sequence ends; its blocks are poisoned and used by others."""
        self._pager.free(name)
        del self._lengths[name]
        for layer in range(len(self.caches)):
            self._streams.pop((name, layer), None)

    def move_blocks(self, rng: random.Random) -> None:
        """Every block's content goes elsewhere, as when blocks are offloaded and fetched again."""
        num_blocks = len(self.caches[0])
        places = shuffled([block for block in range(num_blocks) if block != NULL_BLOCK], rng)
        moves = dict(zip((block for block in range(num_blocks) if block != NULL_BLOCK), places, strict=True))
        self._pager.rename_blocks(moves)
        for cache in self.caches:
            cache[list(moves.values())] = cache[list(moves)].clone()

    def _prepare(self, batch: ForwardBatch) -> Callable[..., torch.Tensor]:
        """(layer, query, key, value) -> `forward` of that layer in this step."""
        if self._captured is not None and batch.max_query_len == 1:
            self._captured.load(batch)
            return self._captured.run
        metadata = self.backend.prepare(batch, 1)
        return lambda layer, query, key, value: self.backend.forward(query, key, value, self.caches[layer], metadata)

    def _run_layer(
        self, layer: int, lengths: Mapping[str, int], batch: ForwardBatch, run: Callable[..., torch.Tensor]
    ) -> float:
        spec, cache = self.spec, self.caches[layer]
        given = [
            [stream[self._lengths.get(name, 0) :][:length] for stream in self._stream(name, layer)]
            for name, length in lengths.items()
        ]
        # Slices of one fused tensor, as a model's projection yields them.
        rows = [torch.cat(parts, dim=1) for parts in given]
        heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        empty = torch.empty(0, sum(heads), spec.head_size, dtype=self._dtype, device=self._device)
        query, key, value = torch.cat([empty, *rows]).split(heads, dim=1)  # type: ignore[no-untyped-call]
        before = _bytes(cache).clone()
        out = run(layer, query, key, value)
        assert out.shape == query.shape, f"the output is {list(out.shape)}, the query {list(query.shape)}"
        assert out.dtype == query.dtype, f"the output is in {out.dtype}, the query in {query.dtype}"
        self._check_writes(before, _bytes(cache), batch)
        largest = 0.0
        for row, (name, length) in enumerate(lengths.items()):
            own = out[batch.query_start[row] : batch.query_start[row + 1]]
            _, keys, values = (stream[: self._lengths.get(name, 0) + length] for stream in self._stream(name, layer))
            error = (own.double() - dense_attention(spec, given[row][0], keys, values)).abs().amax().item()
            largest = max(largest, error if error == error else torch.inf)
            if layer == 0:
                self.outputs.setdefault(name, []).append(own.clone())
        return largest

    def _check_writes(self, before: torch.Tensor, after: torch.Tensor, batch: ForwardBatch) -> None:
        changed = set((before != after).any(dim=1).nonzero().flatten().tolist())
        allowed = {NULL_BLOCK} if self._captured is not None else set()  # padding rows write there
        allowed |= set((batch.slot_mappings[1] // self.backend.block_size).tolist())
        assert changed <= allowed, f"blocks {sorted(changed - allowed)} were written; the step's are {sorted(allowed)}"

    def _fill(self, blocks: Sequence[int]) -> None:
        for cache in self.caches:
            limits = torch.finfo(cache.dtype) if cache.dtype.is_floating_point else torch.iinfo(cache.dtype)
            poison = self._poison
            if abs(poison) < torch.inf:
                poison = min(poison, limits.max)
            elif not cache.dtype.is_floating_point:
                poison = -1  # all bits set: not a number, too, where part of the cache holds floats
            cache[list(blocks)] = poison

    def _stream(self, name: str, layer: int) -> Streams:
        if (name, layer) not in self._streams:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name} {layer}".encode()))
            query, key, value = (
                torch.randn(self._max_len, heads, self.spec.head_size, generator=generator)
                .to(self._dtype)
                .to(self._device)
                for heads in (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
            )
            self._streams[name, layer] = (query, key, value)
        return self._streams[name, layer]


class AttentionConformance(Conformance):
    """What every attention backend must do."""

    kind = "attention"
    selector = "attention"
    attention: ClassVar[str | type[AttentionBackend]]
    seeds = range(40)
    device: ClassVar[str] = "cpu"
    block_sizes: ClassVar[tuple[int, ...]] = (1, 4, 16, 32)
    head_sizes: ClassVar[tuple[int, ...]] = (5, 8, 16, 64)
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-5, "bfloat16": 4e-2, "float16": 5e-3}
    """dtype → largest error allowed for values of size one. The first one must be supported."""

    @classmethod
    def parameters(cls) -> Mapping[str, Sequence[Any]]:
        return {**super().parameters(), "poison": (torch.nan, torch.inf, 3e38), "dtype": tuple(cls.tolerances)}

    def test_plain_attention_is_supported(self) -> None:
        reason = self.target.supports(self._plain(), self.block_sizes[-1], self._first_dtype, self.device)
        assert reason is None, f"full attention in {self._first_dtype} with blocks of {self.block_sizes[-1]}: {reason}"

    def test_refusals_are_reasons(self, seed: int) -> None:
        """Whatever is asked, the answer is None or a clause, and the same answer again."""
        rng = random.Random(seed)
        spec, block_size, dtype = self._random_spec(rng), rng.choice([*self.block_sizes, 3]), rng.choice(self._dtypes)
        reason = self.target.supports(spec, block_size, dtype, self.device)
        assert reason is None or (isinstance(reason, str) and reason), f"{reason!r} for {spec}"
        assert reason == self.target.supports(spec, block_size, dtype, self.device), f"two answers for {spec}"

    def test_the_impossible_is_refused(self) -> None:
        """What nobody can mean is refused before an engine starts with it, and not computed somehow."""
        unknown = AttentionSpec(4, 2, self.head_sizes[-1], kind="no-such-kind")
        empty = AttentionSpec(4, 2, self.head_sizes[-1], kind="window", window=0)
        for spec, dtype in ((unknown, self._first_dtype), (empty, self._first_dtype), (self._plain(), "no-such-type")):
            reason = self.target.supports(spec, self.block_sizes[-1], dtype, self.device)
            assert isinstance(reason, str) and reason, f"supports says {reason!r} for {spec} in {dtype}"
        reason = self.target.supports(unknown, self.block_sizes[-1], self._first_dtype, self.device)
        assert "no-such-kind" in reason, f"the reason should name the kind it is against: {reason!r}"

    def test_types_that_are_accepted_have_a_tolerance(self) -> None:
        for dtype in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"):
            accepted = self.target.supports(self._plain(), self.block_sizes[-1], dtype, self.device) is None
            stated = dtype in self.tolerances
            assert stated or not accepted, f"{dtype} is accepted but has no entry in `tolerances`, so nobody tests it"

    def test_claims_are_known_words(self) -> None:
        assert self.target.graph_support in ("none", "decode"), self.target.graph_support
        assert isinstance(self.target.batch_invariant, bool)

    def test_cache_layout(self, seed: int) -> None:
        """Blocks come first and cost the same each; layers that share a KV group have the same layout."""
        rng = random.Random(seed)
        spec, block_size, dtype = self._draw(rng)
        one, two, many = (self._backend(spec, block_size, dtype).cache_layout(blocks) for blocks in (1, 2, 37))
        assert [layout.shape[0] for layout in (one, two, many)] == [1, 2, 37], "the first dimension counts blocks"
        assert [two.nbytes, many.nbytes] == [2 * one.nbytes, 37 * one.nbytes], "every block has the same size"
        nbytes = torch.Size(many.shape).numel() * getattr(torch, many.dtype).itemsize
        assert many.nbytes == nbytes, f"{many} states {many.nbytes} bytes, shape and dtype make {nbytes}"
        more_heads = AttentionSpec(2 * spec.num_heads, spec.num_kv_heads, spec.head_size, spec.kind, spec.window)
        if self.target.supports(more_heads, block_size, dtype, self.device) is None:
            assert self._backend(more_heads, block_size, dtype).cache_layout(37) == many, "equal kv_key, other layout"

    def test_random_traffic(self, seed: int) -> None:
        """Sequences of all lengths start, prefill in chunks, decode side by side, end and leave their blocks."""
        rng = random.Random(seed)
        paged = self._paged(rng)
        for step in range(6):
            for name in [name for name in paged.outputs if rng.random() < 0.15]:
                paged.free(name)
                del paged.outputs[name]
            names = rng.sample(range(9), rng.randint(1, 9))
            self._check(paged, {str(name): rng.choice([1, 1, 1, 2, 7, 33]) for name in names}, f"step {step}")

    def test_unwritten_slots_do_not_leak(self, poison: float) -> None:
        for window, softcap in ((0, 0.0), (6, 0.0), (0, 2.0), (6, 2.0)):
            kind = "window" if window else "full"
            spec = AttentionSpec(4, 2, self.head_sizes[-1], kind=kind, window=window, softcap=softcap)
            for paged in self._supported(spec, poison=poison):
                for lengths in ({"a": 9, "b": 3, "c": 1}, {"a": 1, "b": 1, "c": 1, "d": 5}, {"d": 13, "a": 1, "e": 1}):
                    self._check(paged, lengths, f"poison {poison}")

    def test_long_contexts(self) -> None:
        for window in (0, 100):
            spec = AttentionSpec(4, 2, self.head_sizes[-1], kind="window" if window else "full", window=window)
            for paged in self._supported(spec, max_len=2048, num_sequences=3):
                for lengths in ({"a": 1100, "b": 3}, {"b": 1, "a": 600}, {"a": 1, "b": 700, "c": 1}):
                    self._check(paged, lengths)

    def test_every_type(self, dtype: str) -> None:
        for paged in self._supported(AttentionSpec(6, 2, self.head_sizes[-1]), dtype):
            for lengths in ({"a": 40, "b": 7}, {"a": 1, "b": 9, "c": 1}):
                self._check(paged, lengths)

    def test_empty_batch(self) -> None:
        for paged in self._supported(self._plain()):
            self._check(paged, {})
            self._check(paged, {"a": 1})
            self._check(paged, {})

    def test_one_metadata_serves_every_layer(self, seed: int) -> None:
        rng = random.Random(seed)
        paged = self._paged(rng, layers=3)
        for _ in range(3):
            self._check(paged, {name: rng.choice([1, 1, 5, 20]) for name in "abc"})

    def test_decode_in_a_device_graph(self, seed: int) -> None:
        """If `graph_refusal` says None: metadata made once, over buffers that hold padding then, serves every later
        decode step, whatever is prefilled in between."""
        rng = random.Random(seed)
        paged = self._paged(rng, layers=2)
        if (reason := paged.backend.graph_refusal()) is not None:
            assert isinstance(reason, str) and reason, f"graph_refusal says {reason!r}"
            skip(f"no device graphs: {reason}")
        paged.capture(rng.choice([6, 8]))
        self._check(paged, {name: rng.choice([1, 2, 9, 40]) for name in "abcd"})
        for step in range(7):
            if rng.random() < 0.2:
                self._check(paged, {rng.choice("abcdef"): rng.choice([2, 7])}, "prefill between graphs")
            names = rng.sample("abcdef", rng.randint(1, 6))
            self._check(paged, dict.fromkeys(names, 1), f"decode step {step} in a device graph")

    def test_blocks_can_be_moved(self, seed: int) -> None:
        """A block holds all there is to know about its tokens: it may be copied, and used under another number."""
        rng = random.Random(seed)
        paged = self._paged(rng)
        for _ in range(3):
            self._check(paged, {name: rng.choice([1, 3, 18]) for name in "abc"}, "after blocks were moved")
            paged.move_blocks(rng)

    def test_batch_invariance_if_claimed(self, seed: int) -> None:
        """The same bits alone and in company, whole and in chunks."""
        if not self.target.batch_invariant:
            skip("the backend does not claim batch_invariant")
        rng = random.Random(seed)
        spec, block_size, dtype = self._draw(rng)
        alone, mixed = (self._make(spec, block_size, dtype, seed=seed) for _ in range(2))
        alone.step({"a": 50})
        for _ in range(10):
            alone.step({"a": 1})
        rest = 60
        while rest:
            length = min(rest, rng.choice([1, 1, 2, 9, 20]))
            rest -= length
            others = {name: rng.choice([1, 4, 9]) for name in rng.sample("bcdef", rng.randint(0, 5))}
            mixed.step(dict(shuffled([("a", length), *others.items()], rng)))
        same = torch.equal(torch.cat(alone.outputs["a"]), torch.cat(mixed.outputs["a"]))
        assert same, f"batch_invariant is claimed, and bits differ for {spec} in {dtype}, blocks of {block_size}"

    # ── Making cases ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _first_dtype(self) -> str:
        return next(iter(self.tolerances))

    @property
    def _dtypes(self) -> list[str]:
        return list(self.tolerances)

    def _plain(self) -> AttentionSpec:
        return AttentionSpec(num_heads=4, num_kv_heads=2, head_size=self.head_sizes[-1])

    def _check(self, paged: PagedAttention, lengths: Mapping[str, int], what: str = "") -> None:
        error, allowed = paged.step(lengths), self.tolerances[paged.backend.dtype]
        case = f"{paged.backend.dtype}, blocks of {paged.backend.block_size}, {paged.spec}"
        assert error < allowed, f"error {error:.3g}, allowed {allowed}, in {lengths} ({what}; {case})"

    def _backend(self, spec: AttentionSpec, block_size: int, dtype: str) -> AttentionBackend:
        made: AttentionBackend = self.target(self.target_options, spec, block_size, dtype, self.device)
        return made

    def _make(self, spec: AttentionSpec, block_size: int, dtype: str, **settings: Any) -> PagedAttention:
        return PagedAttention(
            self.target, spec, block_size, dtype, self.device, options=self.target_options, **settings
        )

    def _supported(self, spec: AttentionSpec, dtype: str = "", **settings: Any) -> Iterator[PagedAttention]:
        """One, or none if the backend refuses the spec."""
        dtype = dtype or self._first_dtype
        if self.target.supports(spec, self.block_sizes[-1], dtype, self.device) is None:
            yield self._make(spec, self.block_sizes[-1], dtype, **settings)

    def _paged(self, rng: random.Random, **settings: Any) -> PagedAttention:
        spec, block_size, dtype = self._draw(rng)
        return self._make(spec, block_size, dtype, seed=rng.randrange(1 << 30), **settings)

    def _draw(self, rng: random.Random) -> tuple[AttentionSpec, int, str]:
        """Something random that the backend supports: spec, block size, dtype."""
        for _ in range(50):
            spec, block_size, dtype = self._random_spec(rng), rng.choice(self.block_sizes), rng.choice(self._dtypes)
            if self.target.supports(spec, block_size, dtype, self.device) is None:
                return spec, block_size, dtype
        return self._plain(), self.block_sizes[-1], self._first_dtype

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


def _bytes(cache: torch.Tensor) -> torch.Tensor:
    """[blocks, bytes]."""
    return cache.contiguous().view(torch.uint8).flatten(1)
