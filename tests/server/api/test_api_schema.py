"""schemathesis makes requests from our own OpenAPI description, right and wrong ones: no answer is a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from interlace.testing.fakes import ScriptedClient
from interlace.testing.front import byte_tokenizer

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/version")


@pytest.fixture(scope="module")
def description(serving_engine):
    """Over an engine that answers at once, so that the requests are what takes the time."""
    answer = byte_tokenizer().encode("An answer, piece by piece.")
    with serving_engine(ScriptedClient(lambda request: answer, tokens_per_step=4)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        yield schema


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
@pytest.mark.parametrize("path", PATHS)
def test_no_request_makes_a_5xx(description, path, mode):
    [operation] = [found.ok() for found in description.get_all_operations() if found.ok().path == path]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # nothing that could be wrong
    counted = []

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def fuzz(case):
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("model", None)  # hardly any text is the name of a model
        counted.append(case.call_and_validate(checks=CHECKS, timeout=30).status_code)

    fuzz()
    assert counted and max(counted) < 500
    if operation.body and mode is GenerationMode.POSITIVE:
        assert 200 in counted, "some requests are right"


@pytest.mark.slow
def test_all_routes_are_fuzzed(description):
    assert {operation.ok().path for operation in description.get_all_operations()} >= set(PATHS)
