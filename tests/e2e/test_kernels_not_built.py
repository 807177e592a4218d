"""An install without a C++ compiler, and a CPU without some instructions: torch serves, and what cannot is said."""

from __future__ import annotations

import logging

import pytest

from interlace import LLM, SamplingParams
from interlace.errors import PluginError
from interlace.plugins.native import library

NOT_BUILT = "not native: the C++ kernels were not built when Interlace was installed"


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    """The library is looked for where nothing was built."""
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))


def start(**settings):
    return LLM(dtype="bfloat16", cache={"memory": "16MiB"}, max_model_len=256, threads=1, **settings)


def test_torch_answers_and_the_log_says_why_once(not_built, caplog):
    caplog.set_level(logging.INFO, logger="interlace")
    with start() as llm:
        (answer,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=1, temperature=0.0))
    assert answer.outputs[0].text == " Paris"
    lines = [record.getMessage() for record in caplog.records]
    (attention,) = [line for line in lines if line.startswith("attention: ")]
    assert attention.startswith("attention: torch (auto") and NOT_BUILT in attention
    (reference,) = [line for line in lines if line.startswith("kernels: reference (")]
    assert reference.count("not native") == 1 and f"; {NOT_BUILT}" in reference
    assert any(line.startswith("kernels: torch (make_linear") for line in lines)


@pytest.mark.parametrize("kind", ["attention", "kernels"])
def test_what_is_asked_for_by_name_is_not_replaced(not_built, kind):
    with pytest.raises(PluginError) as raised:
        start(**{kind: {"use": "native"}})
    assert NOT_BUILT in str(raised.value) and f"install g++ and reinstall. Set {kind}.use to " in str(raised.value)


def test_ways_of_keeping_weights_that_only_the_kernels_have(not_built):
    with pytest.raises(PluginError) as raised:
        start(weights="int8")
    assert str(raised.value).count("not native") == 1 and NOT_BUILT in str(raised.value)


def test_only_reasons_that_concern_what_is_refused_are_told():
    """The native kernels compute in bfloat16; torch's have one op, which cannot do as asked."""
    with pytest.raises(PluginError) as raised:
        start(kernels={"use": "torch"}, weights="int8")
    assert str(raised.value).startswith(
        "no kernels can run make_linear as asked: not torch: keeps linear weights as auto, bf16 or float32, not as "
        "'int8'; not the reference for make_linear: "
    )


@pytest.mark.parametrize("kind", ["attention", "kernels"])
def test_an_instruction_set_that_the_cpu_has_not(monkeypatch, kind):
    monkeypatch.setattr(library, "supported_isas", lambda: ["avx2", "portable"])
    with pytest.raises(PluginError, match="isa = 'avx512' is not for this CPU, which has avx2, portable"):
        start(**{kind: {"use": "native", "options": {"native": {"isa": "avx512"}}}})
