"""The service over HTTP: OpenAI's images API, health, metrics and a page. Needs FastAPI and uvicorn."""
