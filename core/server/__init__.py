"""The HTTP server: an OpenAI-compatible API over `AsyncLLM`, for many clients and their operator."""
