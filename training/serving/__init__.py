"""Serve a registered version to OpenAI clients: requests, turns at the model, replies. From outside: `server`."""
