# ki_ds with pinned packages. On a CPU:  docker build -t ki_ds .   With CUDA's PyTorch:
#   docker build -t ki_ds --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Then:  docker run --rm -it --gpus all --ipc=host -v "$PWD/runs:/workspace/ki_ds/runs" ki_ds deepspeed launchers/train_ki.sh --config ...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and headers: Triton compiles its launchers; pdsh and ssh: jobs on several hosts; libaio: ZeRO-Infinity on NVMe
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        gcc git libaio-dev libc6-dev make openssh-client pdsh python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/ki_ds PATH=/opt/ki_ds/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /workspace/ki_ds
COPY constraints.txt setup.py README.md pyproject.toml ./
COPY ki_ds/__init__.py ki_ds/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch first, of that index: a looser requirement would take the build of PyPI
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install -c constraints.txt --extra-index-url "$TORCH_INDEX" torch \
    && pip install -c constraints.txt -e '.[demo]' triton
COPY . .
# what was imported once is compiled once
RUN python -m compileall -q ki_ds && ki-ds --help
CMD ["ki-ds", "--help"]
