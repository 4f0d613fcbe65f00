# The server, for the CPU:
#
#     docker build -t nanogpt .
#     docker run -p 5001:5001 -v "$PWD/runs:/app/runs:ro" -e NANOGPT_API_KEYS=sk-mine nanogpt
#
# For NVIDIA GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128, and docker run --gpus all.
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# g++ compiles the engine's kernels when it starts
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
 && pip install --no-cache-dir "torch>=2.9,<2.14" --index-url "$TORCH_INDEX" \
 && useradd --create-home --uid 1000 nanogpt

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY nanogpt nanogpt
COPY serving serving
RUN pip install --no-cache-dir -e .

USER nanogpt
ENV NANOGPT_HOST=0.0.0.0 NANOGPT_PORT=5001 PYTHONUNBUFFERED=1
EXPOSE 5001
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"NANOGPT_PORT\"]}/ready', timeout=3)"]
CMD ["python", "-m", "serving"]
