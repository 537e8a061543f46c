# gpt-fast for CPUs: docker build -f docker/cpu.Dockerfile -t gpt-fast .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}"
RUN pip install --no-cache-dir "setuptools>=77" wheel ninja numpy
COPY . /src
# Compile one module for each instruction set, because the image runs on other machines than the one that builds it.
RUN GPT_FAST_PORTABLE=1 pip wheel --no-build-isolation --no-deps --wheel-dir /wheels /src

FROM python:${PYTHON}-slim
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "${TORCH}"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/gpt_fast-*.whl)[train]"
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["gpt-fast"]
CMD ["doctor"]
