"""How the attention kernels are cut for a kind of layer and a device: sensible figures, before anything is measured."""

from __future__ import annotations

from typing import NamedTuple

_MAX_VERIFY = 8
_MAX_VERIFY_ROWS = 64
_MIN_ROWS = 16  # of a matrix product
_LANES_PER_MULTIPROCESSOR = 4


class KernelConfig(NamedTuple):
    """Compile-time figures of one kernel. They hold for the life of an engine, so bits do not change with them."""

    rows: int
    """Rows (token, head) of a program; for the decode kernel the least."""
    tile: int
    """Keys per step of a program; a power of two of at most 128."""
    warps: int
    stages: int
    """Tiles whose loads are under way."""


class LayerShape(NamedTuple):
    """What the figures depend on."""

    num_kv_heads: int
    group: int
    """Query heads per KV head."""
    head_size: int
    block_size: int
    itemsize: int
    """Bytes of a query's value: 2 or 4."""
    is_fp8: bool
    """Whether keys and values are kept in 8 bits."""
    window: int
    softcap: bool

    @property
    def block_d(self) -> int:
        """The head size as kernels compute with it."""
        return max(_MIN_ROWS, power_of_two(self.head_size))

    @property
    def precision(self) -> str:
        """Of matrix products: float32 is for exact results, so not rounded to 19 bits on the way."""
        return "ieee" if self.itemsize == 4 else "tf32"

    @property
    def max_splits(self) -> int:
        """Splits of the longest sequences: together with the KV heads, about two programs per multiprocessor of a large
        GPU if a single sequence runs. From the model alone, since sums must not depend on the device's size."""
        return max(32, min(128, power_of_two(256 // self.num_kv_heads)))

    @property
    def max_verify(self) -> int:
        """Query tokens of a sequence up to which the decode kernel serves it; a power of two."""
        count = _MAX_VERIFY
        while count > 1 and count * self.group > _MAX_VERIFY_ROWS:
            count //= 2
        return count

    def decode_rows(self, count: int) -> int:
        """Rows of a decode program for pieces of up to `count` tokens."""
        return max(_MIN_ROWS, power_of_two(count * self.group))

    def prefill_count(self, config: KernelConfig) -> int:
        """Tokens of a prefill piece."""
        return config.rows // self.group

    def split_slots(self, max_seq_len: int, count: int) -> int:
        """The most splits any piece of up to `count` tokens, of a sequence of up to `max_seq_len`, has; see
        `attention_parts.split_size`. The keys of a window may begin and end within splits, and several tokens see
        more keys than the window from which the size of splits follows."""
        span = min(max_seq_len, self.window) if self.window else max_seq_len
        found = -(-span // 128) if span <= 1024 else min(self.max_splits, max(8, -(-span // 256)))
        return found + (0 if not self.window else 1 if count == 1 else 2)


def default_decode(shape: LayerShape) -> KernelConfig:
    """Two or more programs per multiprocessor, with about 100 KiB under way each: reading the cache is all the work."""
    if shape.itemsize == 4:
        return KernelConfig(_MIN_ROWS, 32, 4, 2)
    return KernelConfig(_MIN_ROWS, 32 if shape.block_d >= 256 else 64, 4, 4)


def default_prefill(shape: LayerShape) -> KernelConfig:
    """As large as registers and shared memory allow: matrix products are all the work."""
    if shape.itemsize == 4:
        config = KernelConfig(_MIN_ROWS, 32, 4, 2)
    elif shape.block_d >= 256:
        config = KernelConfig(64, 64, 4, 2) if shape.is_fp8 else KernelConfig(128, 64, 8, 2)
    elif shape.is_fp8:
        config = KernelConfig(128, 64, 8, 2)
    else:
        config = KernelConfig(128, 128, 8, 2)
    return config._replace(rows=max(config.rows, power_of_two(shape.group)))


def fitted(config: KernelConfig, shape: LayerShape, shared_memory: int) -> KernelConfig:
    """`config` with as few stages, then as small tiles and rows, as `shared_memory` (bytes of a program) demands."""
    while _shared_bytes(config, shape) > shared_memory:
        if config.stages > 2:
            config = config._replace(stages=config.stages - 1)
        elif config.tile > _MIN_ROWS:
            config = config._replace(tile=config.tile // 2)
        elif config.rows > max(_MIN_ROWS, power_of_two(shape.group)):
            config = config._replace(rows=config.rows // 2)
        else:
            break  # left to the compiler, whose error says it better
    return config


def _shared_bytes(config: KernelConfig, shape: LayerShape) -> int:
    """What a kernel takes at most: queries, weights, and a buffer of keys and values per stage."""
    cached = 1 if shape.is_fp8 else shape.itemsize
    queries = max(config.rows, shape.decode_rows(shape.max_verify)) * (shape.block_d + config.tile) * shape.itemsize
    return queries + 2 * config.stages * config.tile * shape.block_d * cached


def decode_lanes(pieces: int, num_kv_heads: int, slots: int, multiprocessors: int) -> int:
    """Programs that share the splits of a piece: enough to fill the device, at most one per split."""
    wanted = -(-_LANES_PER_MULTIPROCESSOR * multiprocessors // (pieces * num_kv_heads))
    return max(1, min(wanted, slots))


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than `number`."""
    return 1 << max(0, number - 1).bit_length()
