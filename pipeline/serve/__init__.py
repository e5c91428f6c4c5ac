"""An HTTP server with OpenAI's interface over the sessions of `pipeline.runtime`."""
