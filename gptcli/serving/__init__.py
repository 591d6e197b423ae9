"""`gpt serve`: a model over HTTP, in OpenAI's interface, and the page that shows it."""
