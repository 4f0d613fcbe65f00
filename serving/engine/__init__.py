"""The inference engine: torch, no HTTP. Front ends reach it through `client` and `messages`."""
