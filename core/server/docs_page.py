"""`/docs`: the OpenAPI description as a page. It loads nothing from elsewhere, so it works offline and tells nobody."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.1rem; } h2 code { font-size: 1.1rem; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
td, th { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; }
summary { cursor: pointer; } code { font-family: ui-monospace, monospace; }
:root { color-scheme: light dark; }
"""
_VIEWPORT = "<meta name='viewport' content='width=device-width, initial-scale=1'>"


def router(app: FastAPI) -> APIRouter:
    """The page of `app`'s own description."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(render(app.openapi()))

    return routes


def render(schema: dict[str, Any]) -> str:
    """HTML for an OpenAPI description."""
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    parts = [f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    parts.append("<p>For programs: <a href='openapi.json'>openapi.json</a>.</p>")
    components = schema["components"]["schemas"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('summary', ''))}. {escape(operation.get('description', ''))}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            parts += _tables("Request", body, components)
            answer = operation["responses"].get("200", {}).get("content", {}).get("application/json", {})
            parts += _tables("Answer", answer.get("schema", {}), components)
    return "<!doctype html><html lang='en'><meta charset='utf-8'>" + _VIEWPORT + "".join(parts) + "</html>"


def _tables(what: str, schema: dict[str, Any], components: dict[str, Any]) -> Iterator[str]:
    """One table of fields for each object that `schema` may be."""
    for one in schema.get("anyOf", [schema]):
        name = one.get("$ref", "").rpartition("/")[2]
        if name not in components:
            continue
        described = components[name]
        required = described.get("required", ())
        rows = "".join(
            f"<tr><td><code>{escape(field)}</code>{' *' if field in required else ''}</td>"
            f"<td><code>{escape(kind(value))}</code></td><td>{escape(value.get('description', ''))}</td></tr>"
            for field, value in described.get("properties", {}).items()
        )
        yield f"<details><summary>{what}: {escape(name)}</summary><table>{rows}</table></details>"


def kind(schema: dict[str, Any]) -> str:
    """The type of a field in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(kind(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if schema.get("type") == "array":
        return f"list of {kind(schema.get('items', {}))}"
    return str(schema.get("type") or schema.get("const") or "any")
