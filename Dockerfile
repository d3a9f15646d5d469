# GPU:  docker build -t partialfc .
# CPU:  docker build -t partialfc:cpu --build-arg VARIANT=cpu .
# The packages are those that are tested; the driver comes from the host (nvidia-container-toolkit).
# docker run --gpus all --shm-size 16g --stop-timeout 300 -v /data:/data partialfc torchrun ...
FROM python:3.11-slim

ARG VARIANT=gpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Triton compiles a small C file at the first step; OpenCV, which align needs, loads the others.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/partialfc
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN if [ "$VARIANT" = cpu ]; then \
        pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch torchvision; \
    fi
COPY partialfc partialfc
COPY configs configs
RUN pip install --constraint constraints.txt ".[train,slurm,align,export,search,cluster,timm,store,wandb,mlflow,huggingface]"

# Data and runs are mounted; a run's folder must be writable for this user or the one of --user.
RUN useradd --create-home partialfc
USER partialfc
WORKDIR /data
CMD ["partialfc", "--help"]
