"""Built-in kernels."""

from __future__ import annotations

from collections.abc import Iterable

from interlace.hookspecs import Provider, hookimpl


@hookimpl
def interlace_kernels() -> Iterable[Provider]:
    yield Provider(
        name="torch",
        target="interlace.plugins.kernels.torch:TorchKernels",
        summary="plain torch on any device; prepacked oneDNN linears on CPU",
        api="1",
        options="interlace.interfaces.kernels:Kernels.Options",  # none of its own
    )
    yield Provider(
        name="native",
        target="interlace.plugins.kernels.native:NativeKernels",
        summary="C++ for CPUs: AVX-512, AVX2 or portable; batch-invariant; whole steps in one call",
        api="1",
    )
    yield Provider(
        name="triton",
        target="interlace.plugins.kernels.triton:TritonKernels",
        summary="Triton for GPUs: norms, rotary embedding, activations, sampling without the host; linears by torch",
        api="1",
        options="interlace.interfaces.kernels:Kernels.Options",  # none of its own
    )
