"""Compiles Triton kernels for a GPU that need not be there. A script, run without the interpreter: reads a JSON list
of cases from stdin and writes one result per case to stdout; see `compile_kernels` in conftest.py."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def compile_case(case: dict) -> dict:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constants, types = case["constants"], case["types"]
    unknown = {*constants, *types} - set(kernel.arg_names)
    assert not unknown, f"{case['kernel']} has no arguments {sorted(unknown)}"
    signature, values, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(index,)] = "constexpr", constants[argument]
            continue
        signature[argument] = types[argument].removesuffix("!")
        # As a launch specialises: addresses and numbers that 16 divides.
        aligned = signature[argument].startswith("*") or types[argument].endswith("!")
        if aligned and not kernel.params[index].do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", case.get("capability", 90), 32)
    compiled = compile(source, target=target, options=case.get("options", {}))
    asm = {kind: compiled.asm[kind] for kind in case.get("asm", ())}
    return {"shared": compiled.metadata.shared, "stack": stack_bytes(compiled.asm["cubin"]), "asm": asm}


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory that a thread takes: what did not fit into registers."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


def main() -> None:
    results = []
    for case in json.load(sys.stdin):
        try:
            results.append(compile_case(case))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
