# superinfer serve on an NVIDIA GPU:
#   docker build -t superinfer . && docker run --gpus all -p 8000:8000 superinfer --model NAME
# Settings can be given as SUPERINFER_* variables too. Not built in CI: see docs/serving.md.
# CUDA 13: what torch's own wheels of 2.11 on are made with. Its compiler (devel) and the C compiler make kernels at the
# first use, FlashInfer's and Triton's.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12 python3.12-venv python3.12-dev build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/superinfer
RUN python3.12 -m venv .venv
ENV PATH=/opt/superinfer/.venv/bin:$PATH
COPY pyproject.toml README.md ./
COPY examples examples
COPY superinfer superinfer
RUN pip install --no-cache-dir ".[cuda,otel]"

RUN useradd --create-home serve
USER serve
EXPOSE 8000
HEALTHCHECK --start-period=600s CMD python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=3)"
# exec form: SIGTERM reaches the server, which lets running answers finish
ENTRYPOINT ["superinfer", "serve", "--host", "0.0.0.0", "--port", "8000"]
