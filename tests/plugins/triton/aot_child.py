"""Compiles Triton kernels for a GPU that need not be there. A script, run without the interpreter: reads a JSON list
of cases from stdin and writes one result per case to stdout; see `compile_kernels` in conftest.py."""

from __future__ import annotations

import importlib
import json
import sys


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
    return {"shared": compiled.metadata.shared, "asm": asm}


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
