"""Built-in attention backends."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_attention() -> Iterable[Provider]:
    yield Provider(
        name="torch",
        target="interlace.plugins.attention.torch:TorchAttention",
        summary="readable reference: any device, windows, soft cap",
        api="1",
        options="interlace.interfaces.attention:AttentionBackend.Options",  # none of its own
    )
    yield Provider(
        name="native",
        target="interlace.plugins.attention.native:NativeAttention",
        summary="C++ for CPUs: AVX-512, AVX2 or portable; batch-invariant; 8-bit cache as an option",
        api="1",
    )
    yield Provider(
        name="triton",
        target="interlace.plugins.attention.triton:TritonAttention",
        summary="paged attention for GPUs, in Triton: split keys at decode, device graphs; 8-bit cache as an option",
        api="1",
    )
    yield Provider(
        name="triton_invariant",
        target="interlace.plugins.attention.triton:InvariantTritonAttention",
        summary="as triton, and batch-invariant: bits do not depend on how a prefill is cut; slower at prefill",
        api="1",
    )
    yield Provider(
        name="flash",
        target="interlace.plugins.attention.flash:FlashAttention",
        summary="prompts through FlashAttention as installed (flash-attn 3 or 2, torch), decoding as triton",
        api="1",
    )
