"""Serving: requests for pictures, drawn together by one engine, and their way in over HTTP."""
