"""Serve trained checkpoints: `engine` computes, `api` speaks HTTP, `app` joins the two."""
