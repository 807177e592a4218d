"""Builds the CPU kernels; everything else about the package is in pyproject.toml.

They are an optional extension: without a C++ compiler the package installs all the same, and the torch kernels serve.
The library has a plain C interface and is loaded with ctypes, so it depends on no Python and no torch version.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("plugins/native/src")
COMMON = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-Wall", "-g0"]
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": [
        *(f"-mavx512{feature}" for feature in ("f", "bw", "dq", "vl", "vnni", "bf16", "vbmi")),
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
    ],
}
"""Flags of the files that may use more than every processor of the architecture has; they are entered at run time only
where the processor has it."""
SANITIZER = os.environ.get("INTERLACE_KERNELS_SANITIZER", "")
"""For a build that finds errors, such as `address`; see `make asan`."""
SANITIZER_FLAGS = [f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer", "-O2", "-g1"] if SANITIZER else []


class BuildKernels(build_ext):
    """Each source with its own flags, several at a time."""

    def build_extension(self, ext: Extension) -> None:
        x86 = platform.machine() in ("x86_64", "AMD64")

        def compile_one(source: str) -> list[str]:
            extra = ISA_FLAGS.get(Path(source).name, []) if x86 else []
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*COMMON, *extra, *ext.extra_compile_args, *SANITIZER_FLAGS],
            )

        with ThreadPoolExecutor() as pool:
            objects = [item for part in pool.map(compile_one, ext.sources) for item in part]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-pthread", *ext.extra_link_args, *SANITIZER_FLAGS],
            target_lang="c++",
        )


setup(
    ext_modules=[
        Extension(
            "interlace.plugins.native._kernels",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.iterdir()),
            optional=True,
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
