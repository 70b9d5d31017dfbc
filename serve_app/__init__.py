"""How the model answers: a Ray Serve application and its HTTP API in OpenAI's shape."""
