# An image with the environment that setup.sh makes. alignyard is the entry point.
#
#   docker build -t alignyard .
#   docker build -t alignyard-gpu --build-arg EXTRA=gpu --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 .
#   docker run --gpus all --ipc=host -v "$PWD/runs:/opt/alignyard/runs" alignyard-gpu run qwen3_gsm8k_1gpu
#
# --ipc=host: NCCL and Ray keep buffers in /dev/shm, of which a container has 64 MiB otherwise. Judged programs run in a
# sandbox of their own, which needs --security-opt seccomp=unconfined --security-opt apparmor=unconfined in a container.
ARG BASE=python:3.11-bookworm
FROM ${BASE}
ARG EXTRA=cpu
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      g++ git libaio-dev make python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/alignyard
COPY . .
RUN make setup EXTRA=${EXTRA} && rm -rf /root/.cache
ENV PATH=/opt/alignyard/.venv/bin:${PATH}
ENTRYPOINT ["alignyard"]
CMD ["doctor"]
