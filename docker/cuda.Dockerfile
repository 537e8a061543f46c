# gpt-fast for NVIDIA GPUs: docker build -f docker/cuda.Dockerfile -t gpt-fast-cuda .
# Run it with: docker run --gpus all gpt-fast-cuda
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
ARG TORCH=torch==2.13.0
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/gpt-fast
ENV PATH=/opt/gpt-fast/bin:$PATH
RUN pip install --no-cache-dir "${TORCH}"
RUN pip install --no-cache-dir "setuptools>=77" wheel ninja numpy
COPY . /src
# The nvcc of this image compiles the CUDA C++ kernels. It needs no GPU, because
# kernels/architectures.py lists the architectures.
RUN GPT_FAST_PORTABLE=1 pip wheel --no-build-isolation --no-deps --wheel-dir /wheels /src
RUN pip install --no-cache-dir "$(echo /wheels/gpt_fast-*.whl)[train]"

# PyTorch's packages hold the CUDA libraries. Triton calls a C compiler when it first launches a kernel.
FROM ubuntu:24.04
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/gpt-fast /opt/gpt-fast
ENV PATH=/opt/gpt-fast/bin:$PATH
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["gpt-fast"]
CMD ["doctor"]
