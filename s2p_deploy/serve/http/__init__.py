"""The service over HTTP: OpenAI's images API, KServe's v2 protocol, metrics and a page. Needs FastAPI and uvicorn."""
